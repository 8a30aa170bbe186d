"""The demo's server, by real requests: what it answers and refuses, how it ends; test_browser.py draws on its page."""

import base64
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from src.data.images import read_digits
from src.data.mnist import preprocess
from src.demo import PAGE, make_classifier
from src.engine.errors import ConfigError
from src.engine.runs.build import restore
from src.engine.runs.server import MAX_BYTES, PageServer
from src.engine.settings.check import ROOT
from tests.compose import run_command
from tests.marks import by_default


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def stroke(points: list[tuple[int, int]]) -> bytes:
    """A drawing as the page's canvas gives it: opaque on transparent."""
    image = Image.new("RGBA", (280, 280))
    ImageDraw.Draw(image).line(points, fill="#1f2328", width=20, joint="curve")
    return png(image)


ONE, SEVEN = stroke([(140, 30), (140, 250)]), stroke([(70, 40), (210, 40), (120, 250)])


@pytest.fixture(scope="module")
def server(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    with PageServer(0, PAGE.read_bytes(), *make_classifier(trained, tmp_path_factory.mktemp("demo"))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: PageServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes, Any]:
    """Status, content and headers of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, content, reply.headers


def classify(server: PageServer, drawing: bytes) -> dict[str, Any]:
    status, content, _ = ask(server, "POST", "/predict", drawing)
    assert status == 200, content
    answer: dict[str, Any] = json.loads(content)
    return answer


def test_the_page_needs_nothing_from_elsewhere(server: PageServer) -> None:
    status, content, headers = ask(server, "GET", "/")
    page = content.decode()
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "<canvas" in page
    assert not re.search(r"https?://|@import|(src|href)=\"(?!data:)", page)


def test_the_page_is_told_of_the_model(server: PageServer, trained: Path) -> None:
    status, content, _ = ask(server, "GET", "/about")
    assert status == 200
    about = json.loads(content)
    assert about["model"] == "LeNet5"
    assert about["classes"] == [str(digit) for digit in range(10)]
    assert re.fullmatch(r"val/acc 0\.9\d{3}", about["score"])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_its_own_page_is_answered_also_through_another_port(host: str, server: PageServer) -> None:
    headers = {"Host": f"{host}:9999", "Origin": f"http://{host}:9999"}
    assert ask(server, "POST", "/predict", ONE, **headers)[0] == 200


@pytest.mark.parametrize(("drawing", "digit"), [(ONE, 1), (SEVEN, 7)], ids=["one", "seven"])
def test_a_drawing_gets_the_checkpoints_probabilities_and_maps(
    drawing: bytes, digit: int, server: PageServer, trained: Path, tmp_path: Path
) -> None:
    answer = classify(server, drawing)
    (tmp_path / "drawing.png").write_bytes(drawing)
    inputs = preprocess(torch.from_numpy(read_digits(tmp_path / "drawing.png")))
    net: Any = restore(trained).net
    with torch.no_grad():
        expected = net(inputs).softmax(dim=1)[0]
        c1 = net.act(net.c1(inputs))[0]
    assert answer["probabilities"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert np.argmax(answer["probabilities"]) == digit
    assert [(layer["name"], layer["shape"]) for layer in answer["layers"]] == [
        ("input", "1 x 32 x 32"), ("c1", "6 x 28 x 28"), ("s2", "6 x 14 x 14"), ("c3", "16 x 10 x 10"),
        ("s4", "16 x 5 x 5"), ("c5", "120"), ("f6", "84"), ("output", "10"),
    ]  # fmt: skip
    layers = pytest.importorskip("src.callbacks.layers")
    kind, _, content = answer["layers"][1]["picture"].partition(",")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    assert kind == "data:image/png;base64"
    assert np.abs(picture.astype(int) - layers.draw_values(c1, tile=56)).max() <= 1


def test_what_the_reader_doubts_is_told(server: PageServer) -> None:
    assert classify(server, ONE)["doubt"] == ""
    assert classify(server, stroke([(130, 140), (150, 140)]))["doubt"] == "perhaps no digit"


def test_many_at_once_get_their_own_answers(server: PageServer) -> None:
    alone = [classify(server, drawing)["probabilities"] for drawing in (ONE, SEVEN)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda drawing: classify(server, drawing)["probabilities"], [ONE, SEVEN] * 10))
    assert answers == alone * 10


HUGE = Image.new("1", (9_500, 9_500))  # some kilobytes that would become a hundred megabytes and more
# Method, path, body, headers; status and what is said.
BAD: dict[str, tuple[str, str, bytes | None, dict[str, str], int, str]] = {
    "another page": ("GET", "/nowhere", None, {}, 404, "only / is here"),
    "a file": ("GET", "/../conf/train.yaml", None, {}, 404, "only / is here"),
    "a drawing for the page": ("POST", "/", ONE, {}, 404, "drawings go to /predict"),
    "nothing": ("POST", "/predict", b"", {}, 400, "no image"),
    "text": ("POST", "/predict", b"no picture", {}, 400, "no image"),
    "half a drawing": ("POST", "/predict", ONE[:-100], {}, 400, ""),
    "a blank page": ("POST", "/predict", png(Image.new("RGBA", (280, 280))), {}, 400, "blank"),
    "a pixel": ("POST", "/predict", png(Image.new("L", (1, 1))), {}, 400, "blank"),
    "a bomb": ("POST", "/predict", png(HUGE), {}, 400, "9500x9500 pixels: expected"),
    "too many bytes": ("POST", "/predict", None, {"Content-Length": str(MAX_BYTES + 1)}, 400, f"{MAX_BYTES} or less"),
    "far too many": ("POST", "/predict", None, {"Content-Length": "9" * 20}, 400, "or less"),
    "a number without end": (
        "POST",
        "/predict",
        None,
        {"Content-Length": "9" * 9999},
        400,
        "expected a number of bytes",
    ),
    "a negative number": ("POST", "/predict", None, {"Content-Length": "-1"}, 400, "expected a number of bytes"),
    "no number": ("POST", "/predict", None, {"Content-Length": "many"}, 400, "expected a number of bytes"),
    "chunks": ("POST", "/predict", None, {"Transfer-Encoding": "chunked"}, 400, "expected a number of bytes"),
    "another host's name": ("GET", "/", None, {"Host": "rebound.example:8000"}, 403, "Host or Origin"),
    "no host": ("GET", "/", None, {"Host": ""}, 403, "Host or Origin"),
    "another site's drawing": ("POST", "/predict", ONE, {"Origin": "http://elsewhere.example"}, 403, "Host or Origin"),
    "another port's": ("POST", "/predict", ONE, {"Origin": "http://127.0.0.1:1"}, 403, "Host or Origin"),
    "a sandboxed page's": ("POST", "/predict", ONE, {"Origin": "null"}, 403, "Host or Origin"),
    "another method": ("PUT", "/predict", ONE, {}, 501, ""),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_in_a_line(name: str, server: PageServer, capfd: pytest.CaptureFixture[str]) -> None:
    method, path, body, headers, status, said = BAD[name]
    found, content, _ = ask(server, method, path, body, **headers)
    assert found == status
    if status != 501:
        error = json.loads(content)["error"]
        assert said in error
        assert error
        assert "\n" not in error
    assert "Traceback" not in content.decode()
    assert capfd.readouterr() == ("", "")
    assert np.argmax(classify(server, ONE)["probabilities"]) == 1  # it goes on


def test_a_net_that_fails_and_a_browser_that_hangs_up_are_survived(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(content: bytes) -> dict[str, Any]:
        raise RuntimeError("the net's own")

    with PageServer(0, b"", {}, fail) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        status, content, _ = ask(server, "POST", "/predict", ONE)
        assert (status, json.loads(content)) == (400, {"error": "the net's own"})
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"too few")
        connection.close()
        assert ask(server, "GET", "/")[0] == 200
        server.shutdown()
    assert capfd.readouterr() == ("", "")


def test_a_taken_port_is_said(server: PageServer) -> None:
    with pytest.raises(ConfigError, match=rf"port={server.server_port}: Address already in use; choose another one"):
        PageServer(server.server_port, b"", {}, server.classify)


def test_other_machines_cannot_reach_it(server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.slow
def test_the_command_says_where_it_is_and_ends_as_its_signal_says(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "src.demo", f"ckpt_path={trained}", "port=0", "hydra.run.dir=run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = next(found for line in process.stdout if (found := re.search(r"http://127.0.0.1:(\d+)", line)))
        connection = http.client.HTTPConnection("127.0.0.1", int(url[1]), timeout=120)
        connection.request("POST", "/predict", ONE)
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert errors == ""
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert {"config.yaml", "drawing.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    by_default(
        [
            (["port=65536"], "port=65536: expected a whole number from 0 to 65535"),
            ([], "train first (python -m src.train) or set ckpt_path"),
            (["port=http"], "port=http: expected a whole number from 0 to 65535"),
            (["prot=8001"], "prot: no such key; did you mean port?"),
        ],
        2,
    ),
)
def test_a_bad_setting_is_said_and_nothing_written(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run_command("demo", *arguments, cwd=tmp_path, PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
