"""What a person sees of a run: TensorBoard's pages and the demo's, in a real browser.

``SCREENSHOT_DIR=<folder>`` says where the pictures of the pages go; by default into the test's temporary folder.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from src.engine.settings.check import ROOT
from tests.compose import run_command
from tests.conftest import free_port
from tests.processes import wait_until

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip("selenium.webdriver")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
DRIVER = shutil.which("chromedriver") or ""
if not (BROWSER and DRIVER):
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)

OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-unsafe-swiftshader",
           "--window-size=1400,1000")  # fmt: skip
# TensorBoard's elements lie in shadow roots, which selectors do not look into.
FIND = """
const found = [];
const selector = arguments[0];
(function walk(root) {
  for (const element of root.querySelectorAll("*")) {
    if (element.matches(selector)) found.push(element);
    if (element.shadowRoot) walk(element.shadowRoot);
  }
})(document);
return found;
"""
READ = """
const parts = [];
(function walk(root) {
  for (const node of root.childNodes) {
    if (node.nodeType === Node.TEXT_NODE && node.data.trim()) parts.push(node.data.trim());
    if (node.nodeType === Node.ELEMENT_NODE && !["SCRIPT", "STYLE", "TEMPLATE"].includes(node.tagName)) {
      if (node.shadowRoot) walk(node.shadowRoot);
      walk(node);
    }
  }
})(document.body);
return parts.join("\\n");
"""


class Pages:
    """A browser."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver = driver
        self.folder = folder

    def open(self, url: str) -> None:
        self.driver.get("about:blank")  # another part behind # alone would not be a new page
        self.driver.get(url)

    def find(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.execute_script(FIND, selector)
        return found

    def text(self) -> str:
        return str(self.driver.execute_script(READ))

    def wait(self, condition: Callable[[], bool]) -> None:
        from selenium.common.exceptions import WebDriverException

        def holds() -> bool:
            try:
                return condition()
            except WebDriverException:  # a page that is being built exchanges its elements
                return False

        wait_until(holds, seconds=120)

    def keep(self, name: str) -> None:
        self.driver.save_screenshot(str(self.folder / f"{name}.png"))

    def complaints(self) -> list[str]:
        """Since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    folder = Path(os.environ.get("SCREENSHOT_DIR") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in OPTIONS:
        options.add_argument(option)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield Pages(driver, folder)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs of two epochs, with all that is on by default."""
    root = tmp_path_factory.mktemp("project")
    common = ("data=mnist5k", "trainer=cpu", "trainer.max_epochs=2")
    result = run_command("train", "-m", "optimizer.lr=0.001,0.004", *common, PROJECT_ROOT=str(root))
    assert result.returncode == 0, result.stderr
    (folder,) = root.glob("logs/multirun/*")
    return folder


@pytest.fixture(scope="module")
def tensorboard(sweep: Path) -> Iterator[str]:
    """Its address; it shows all of the project's logs, as the README has it."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(sweep.parents[1]), "--port", str(port)]
    server = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        # It reads them in the background, and what logs last is there when all is.
        wait_until(lambda: _fetch(f"{url}/data/plugin/scalars/tags").count("val_class_acc/9") == 2, seconds=120)
        yield url
    finally:
        server.terminate()
        server.wait()


def _fetch(url: str) -> str:
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return str(response.read().decode())
    except OSError:
        return ""


def pixels(element: Any) -> NDArray[np.int64]:
    """What an element looks like, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")).astype(np.int64)


def is_drawn(element: Any) -> bool:
    """Whether there are lines in the colours of runs in it, on which nothing else is drawn."""
    return int((np.ptp(pixels(element), axis=2) > 60).sum()) > 30


def test_the_curves_of_all_runs_are_drawn(pages: Pages, tensorboard: str, sweep: Path) -> None:
    pages.open(f"{tensorboard}/?tagFilter=val/acc#timeseries")
    records = [json.loads(path.read_text()) for path in sorted(sweep.glob("*/metrics.json"))]
    expected = {f"{record['metrics']['val/acc']:.4g}" for record in records}
    pages.wait(lambda: expected <= set(pages.text().split("\n")))  # in the table below the chart
    pages.wait(lambda: len(pages.find("line-chart")) == 2)  # val/acc, and the best one of each job
    pages.wait(lambda: is_drawn(pages.find("line-chart")[1]))
    pages.keep("timeseries")


def test_the_charts_of_our_own_layout_are_drawn(pages: Pages, tensorboard: str, sweep: Path) -> None:
    pages.open(f"{tensorboard}/#custom_scalars")
    pages.wait(lambda: len(pages.find("vz-line-chart2")) == 3)
    pages.wait(lambda: all(is_drawn(chart) for chart in pages.find("vz-line-chart2")))
    pages.keep("custom_scalars")
    said = pages.text().split("\n")
    for tag in ("train/loss", "val/loss", "train/acc", "val/acc", *(f"val_class_acc/{label}" for label in range(10))):
        for lr in ("0.001", "0.004"):
            assert f"{tag} (multirun/{sweep.name}/optimizer.lr={lr})" in said


def test_the_pictures_of_each_run_are_shown(pages: Pages, tensorboard: str) -> None:
    pages.open(f"{tensorboard}/#images")
    pages.wait(lambda: "val\n4" in [heading.text for heading in pages.find("button.heading")])
    for heading in pages.find("button.heading:not([open-button])"):
        pages.driver.execute_script("arguments[0].click()", heading)  # it may lie below the window
    size = "return [arguments[0].naturalWidth, arguments[0].naturalHeight]"
    sizes = {"confusion": (350, 350), "hardest_images": (350, 434), "feature_maps": (350, 352), "filters": (350, 39)}

    def shown() -> list[tuple[int, int]]:
        return [tuple(pages.driver.execute_script(size, image)) for image in pages.find("img")]

    pages.wait(lambda: all(shown().count(each) == 2 for each in sizes.values()))
    pages.keep("images_net")
    pages.driver.execute_script("arguments[0].scrollIntoView()", pages.find("button.heading")[-1])
    pages.keep("images_val")
    tags = ["val/confusion", "val/hardest_images", "net/feature_maps", "net/filters"]
    assert all(pages.text().count(f"\ntag:\n{tag}\n") == 2 for tag in tags)
    assert all(image.is_displayed() for image in pages.find("img"))


def test_hparams_has_a_row_a_job_with_its_score(pages: Pages, tensorboard: str, sweep: Path) -> None:
    pages.open(f"{tensorboard}/#hparams")
    jobs = {f"multirun/{sweep.name}/{path.name}": path for path in sweep.glob("optimizer.lr=*")}

    def cells() -> list[str]:
        return [cell.text for cell in pages.find("vaadin-grid-cell-content") if cell.text]

    pages.wait(lambda: jobs.keys() <= set(cells()))
    pages.keep("hparams")
    shown = cells()
    assert shown[:4] == ["Trial ID", "Show Metrics", "optimizer.lr", "best/val/acc"]
    for name, folder in jobs.items():
        rate, score = shown[shown.index(name) + 1 :][:2]
        assert float(rate) == float(folder.name.partition("=")[2])
        record = json.loads((folder / "metrics.json").read_text())
        assert float(score) == pytest.approx(record["best"]["score"], rel=1e-4)


def test_the_projector_shows_the_digits(pages: Pages, tensorboard: str) -> None:
    pages.open(f"{tensorboard}/#projector")
    for _ in range(2):  # a frame in a frame
        pages.wait(lambda: len(pages.find("iframe")) == 1)
        pages.driver.switch_to.frame(pages.find("iframe")[0])
    pages.wait(lambda: "256x84" in pages.text())
    canvas = pages.find("canvas")[0]  # of several in the same place
    pages.wait(lambda: (pixels(canvas).max(axis=2) < 64).mean() > 0.05)  # the digits are white on black squares
    pages.keep("projector")
    assert "taken for" in pages.text()
    pages.driver.switch_to.default_content()


def test_histograms_are_drawn(pages: Pages, tensorboard: str) -> None:
    pages.open(f"{tensorboard}/#histograms")
    pages.wait(lambda: len(pages.find("vz-histogram-timeseries")) >= 2)
    pages.wait(lambda: all(is_drawn(chart) for chart in pages.find("vz-histogram-timeseries")[:2]))
    pages.keep("histograms")
    assert "weights/net.c1.weight" in pages.text()


def test_config_and_data_stand_as_text_and_the_net_as_a_graph(pages: Pages, tensorboard: str) -> None:
    pages.open(f"{tensorboard}/#text")
    pages.wait(lambda: all(word in pages.text() for word in ("weight_decay: ", "source: package", '"fingerprint": ')))
    pages.keep("text")
    pages.open(f"{tensorboard}/#graphs")
    pages.wait(lambda: bool({"LeNet5", "ImageClassifier"} & set(pages.text().split("\n"))))
    pages.keep("graphs")


@pytest.fixture(scope="module")
def demo(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the demo command."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "src.demo", "port=0", f"ckpt_path={trained}", f"hydra.run.dir={folder}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.:]+", line)))
        finally:
            process.terminate()


LAYERS = ("input", "c1", "s2", "c3", "s4", "c5", "f6", "output")
Points = Sequence[tuple[float, float]]
# From the middle of a canvas of 280 x 280 pixels.
ONE: Points = [(0, -100), (0, -50), (0, 0), (0, 50), (0, 100)]
SEVEN: Points = [(-60, -90), (0, -90), (60, -90), (30, -30), (0, 30), (-20, 100)]
ZERO: Points = [(70 * np.sin(angle), -100 * np.cos(angle)) for angle in np.linspace(0, 2 * np.pi, 25)]


def draw(pages: Pages, points: Points) -> dict[str, str]:
    """Draw with the mouse on a clear page; the pictures that it then shows, by their descriptions."""
    pages.wait(lambda: len(pages.find("li")) == 10)
    (button,), (canvas,) = pages.find("#clear"), pages.find("canvas")
    button.click()
    actions = webdriver.ActionChains(pages.driver, duration=10)
    actions.move_to_element_with_offset(canvas, *map(int, points[0])).click_and_hold()
    for point in points[1:]:
        actions.move_to_element_with_offset(canvas, *map(int, point))
    actions.release().perform()
    answered = "return !busy && !changed && document.getAnimations().length === 0"  # the bars grow for a while
    pages.wait(lambda: pages.driver.execute_script(answered) and len(pages.find("img")) == len(LAYERS))
    return {image.get_attribute("alt"): image.get_attribute("src") for image in pages.find("img")}


def test_drawn_digits_are_recognised_and_their_maps_change(pages: Pages, demo: str) -> None:
    pages.complaints()  # of TensorBoard's pages
    pages.open(demo)
    shown = []
    for digit, points in {"1": ONE, "7": SEVEN, "0": ZERO}.items():
        shown.append(draw(pages, points))
        (best,) = pages.find("li.best")
        label, share = best.text.split("\n")
        assert label == digit
        assert float(share.removesuffix(" %")) > 50
        (said,) = pages.find("output")
        assert re.fullmatch(rf"{digit} with [\d.]+ %", said.text)
        (bar,) = pages.find("li.best i")
        pages.wait(lambda bar=bar: is_drawn(bar))  # type: ignore[misc]
    pages.keep("demo_light")
    assert [description.split()[1] for description in shown[0]] == [*LAYERS]
    assert shown[0].keys() == shown[1].keys()
    for description in shown[0]:  # all layers see another digit
        assert len({pictures[description] for pictures in shown}) == 3
    assert pages.complaints() == []


def test_the_page_can_be_cleared_and_is_dark_and_narrow_where_asked_for(pages: Pages, demo: str) -> None:
    pages.open(demo)
    draw(pages, SEVEN)
    bright = pixels(pages.find("body")[0]).mean()
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    try:
        pages.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        draw(pages, SEVEN)
        pages.keep("demo_dark")
        assert pixels(pages.find("body")[0]).mean() < 60 < 200 < bright
        assert pages.find("output")[0].text.startswith("7 ")  # light strokes are a digit, too
        pages.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        assert pages.driver.execute_script("return document.documentElement.scrollWidth") <= 360
        pages.keep("demo_phone")
    finally:
        pages.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        pages.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    pages.find("#clear")[0].click()
    assert pages.find("output")[0].text == "Draw one digit."
    assert pages.find("img") == []
    assert pages.find("li.best") == []


# What the page sends next: no picture, half a second after it was asked for.
SPOIL = """
document.querySelector("canvas").toBlob = give => setTimeout(() => give(new Blob(["no picture"])), 500);
"""


def test_an_error_leaves_no_older_answer_and_none_comes_behind_a_clear_page(pages: Pages, demo: str) -> None:
    pages.open(demo)
    draw(pages, SEVEN)
    (button,), (canvas,), (said,) = (pages.find(name) for name in ("#clear", "canvas", "output"))
    pages.driver.execute_script(SPOIL)
    canvas.click()
    pages.wait(lambda: "no image" in said.text)
    assert pages.find("li.best") == []
    assert pages.find("img") == []
    assert "%" not in pages.find("ol")[0].text
    button.click()
    for is_offline in (False, True):
        pages.driver.set_network_conditions(offline=is_offline, latency=0, throughput=-1)
        try:
            canvas.click()
            assert pages.driver.execute_script("return busy")
            button.click()
            pages.wait(lambda: not pages.driver.execute_script("return busy"))
        finally:
            pages.driver.delete_network_conditions()
        assert said.text == "Draw one digit."
    pages.complaints()  # of what has failed here


def test_fingers_draw_too(pages: Pages, demo: str) -> None:
    pages.open(demo)
    box = pages.find("canvas")[0].rect
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for kind, points in (("touchStart", SEVEN[:1]), *(("touchMove", [point]) for point in SEVEN), ("touchEnd", [])):
        touches = [{"x": middle[0] + x, "y": middle[1] + y} for x, y in points]
        pages.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
    pages.wait(lambda: pages.find("output")[0].text.startswith("7 "))


def test_a_second_finger_draws_nothing(pages: Pages, demo: str) -> None:
    pages.open(demo)
    (canvas,) = pages.find("canvas")
    left, top = canvas.rect["x"], canvas.rect["y"]
    for kind, places in (
        ("touchStart", [(40, 140)]),
        ("touchStart", [(40, 140), (240, 40)]),
        ("touchMove", [(40, 150), (240, 60)]),
        ("touchMove", [(40, 200), (240, 240)]),
        ("touchEnd", []),
    ):
        touches = [{"x": left + x, "y": top + y, "id": index} for index, (x, y) in enumerate(places)]
        pages.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
    pages.wait(lambda: pages.driver.execute_script("return drawn && !busy && !changed"))
    ink = "return Array.from(pen.getImageData(0, 0, 280, 280).data).filter((_, index) => index % 4 === 3)"
    columns = np.array(pages.driver.execute_script(ink)).reshape(280, 280).max(axis=0).nonzero()[0]
    assert 25 <= columns.min() <= 35
    assert 45 <= columns.max() <= 55  # the first finger's line alone


def test_a_dot_is_no_digit_and_what_was_drawn_can_be_undone(pages: Pages, demo: str) -> None:
    pages.open(demo)
    draw(pages, SEVEN)
    assert re.fullmatch(r"LeNet5 val/acc 0\.9\d{3}", pages.find("#model")[0].text)
    (said,), (canvas,), (undo,) = (pages.find(name) for name in ("output", "canvas", "#undo"))
    drawn = said.text
    canvas.send_keys(Keys.ESCAPE)
    assert said.text == "Draw one digit."
    canvas.click()  # a dot
    pages.wait(lambda: said.text == "Not sure: perhaps no digit.")
    undo.click()
    assert said.text == "Draw one digit."
    canvas.send_keys(Keys.CONTROL, "z")
    pages.wait(lambda: said.text == drawn)


def test_a_digit_is_drawn_by_keyboard(pages: Pages, demo: str) -> None:
    pages.open(demo)
    pages.wait(lambda: len(pages.find("li")) == 10)
    keys = webdriver.ActionChains(pages.driver)
    keys.send_keys(Keys.TAB, *[Keys.ARROW_UP] * 10, " ", *[Keys.ARROW_DOWN] * 20, " ").perform()
    pages.wait(lambda: pages.find("output")[0].text.startswith("1 "))
    reached = set()
    for _ in range(4):
        reached.add(pages.driver.execute_script("return document.activeElement.id || document.activeElement.tagName"))
        webdriver.ActionChains(pages.driver).send_keys(Keys.TAB).perform()
    assert reached == {"CANVAS", "clear", "undo", "file"}


PASTE = """
const [data, done] = [arguments[0], arguments[arguments.length - 1]];
const bytes = Uint8Array.from(atob(data.split(",")[1]), letter => letter.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], "seven.png", {type: "image/png"}));
document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer}));
done();
"""


def test_a_picture_is_opened_and_pasted(pages: Pages, demo: str, tmp_path: Path) -> None:
    page = Image.new("RGB", (640, 400), "#f4efe6")
    points = [(320 + 1.3 * x, 200 + 1.3 * y) for x, y in SEVEN]
    ImageDraw.Draw(page).line(points, fill="#203a70", width=26, joint="curve")
    page.save(tmp_path / "seven.png")
    pages.open(demo)
    pages.wait(lambda: len(pages.find("li")) == 10)
    (said,) = pages.find("output")
    pages.find("#file")[0].send_keys(str(tmp_path / "seven.png"))
    pages.wait(lambda: said.text.startswith("7 "))
    pages.keep("demo_opened")
    pages.find("#clear")[0].click()
    content = base64.b64encode((tmp_path / "seven.png").read_bytes()).decode()
    pages.driver.execute_async_script(PASTE, f"data:image/png;base64,{content}")
    pages.wait(lambda: said.text.startswith("7 "))
    (tmp_path / "note.png").write_text("no picture")
    pages.find("#file")[0].send_keys(str(tmp_path / "note.png"))
    pages.wait(lambda: "no picture" in said.text)
