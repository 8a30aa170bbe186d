"""Pictures of every kind become what MNIST's digits are."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from src.data.images import read_digits, read_like
from src.data.sources import read_package
from src.engine.settings.check import ROOT
from tests.marks import by_default

Pixels = NDArray[np.uint8]
pytestmark = pytest.mark.filterwarnings("ignore:perhaps ")  # of one digit in a hundred


@pytest.fixture(scope="module")
def digits() -> Pixels:
    """Five real digits of each class, light on dark, (50, 28, 28)."""
    return read_package().images[::100].numpy()


def redraw(digit: Pixels, scale: int, size: tuple[int, int], place: tuple[int, int]) -> Image.Image:
    """A digit's ink, larger, somewhere in a larger picture: 255 where there is ink."""
    image = Image.fromarray(digit)
    image = image.crop(image.getbbox())
    ink = Image.new("L", size)
    ink.paste(image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC), place)
    return ink


def paint(ink: Image.Image, colour: tuple[int, ...], paper: tuple[int, ...]) -> Image.Image:
    """The ink in a colour on paper; with an opacity if these have one."""
    mode = "RGBA" if len(colour) == 4 else "RGB"
    return Image.composite(Image.new(mode, ink.size, colour), Image.new(mode, ink.size, paper), ink)


def similarity(one: Pixels, other: Pixels) -> float:
    """The correlation coefficient of two pictures' pixels, the one moved by up to a pixel: places are rounded."""
    moves = [(rows, columns) for rows in (-1, 0, 1) for columns in (-1, 0, 1)]
    moved = [np.roll(one, move, axis=(0, 1)).ravel() for move in moves]
    return float(np.corrcoef([other.ravel(), *moved])[0, 1:].max())


def test_28x28_pictures_keep_their_pixels(digits: Pixels, tmp_path: Path) -> None:
    for digit in digits:
        grey = Image.fromarray(digit)
        inverted = Image.fromarray(255 - digit)
        ink_alone = Image.merge("LA", [Image.new("L", (28, 28)), grey])
        for image in (grey, inverted, grey.convert("RGB"), inverted.convert("P"), ink_alone):
            image.save(tmp_path / "digit.png")
            np.testing.assert_array_equal(read_digits(tmp_path / "digit.png"), digit[np.newaxis])


def test_a_thick_digit_keeps_its_pixels(tmp_path: Path) -> None:
    page = Image.new("L", (28, 28))
    ImageDraw.Draw(page).ellipse([4, 4, 23, 23], fill=255)  # more than half of what is around its middle
    ImageDraw.Draw(page).ellipse([13, 12, 14, 15], fill=80)
    page.save(tmp_path / "zero.png")
    np.testing.assert_array_equal(read_digits(tmp_path / "zero.png"), np.asarray(page)[np.newaxis])


@pytest.mark.parametrize("move", [(-6, 0), (0, 4)])
def test_28x28_pictures_are_put_into_mnists_frame_where_they_are_not(
    move: tuple[int, int], digits: Pixels, tmp_path: Path
) -> None:
    for digit in digits[::5]:
        small = np.asarray(Image.fromarray(digit).resize((20, 20), Image.Resampling.BICUBIC))
        moved = np.roll(np.pad(small, 4), move, axis=(0, 1))
        Image.fromarray(255 - moved).save(tmp_path / "digit.png")
        assert similarity(read_digits(tmp_path / "digit.png")[0], digit) > 0.9


def draw_beside(kind: str, draw: ImageDraw.ImageDraw) -> None:
    """What pages of 260x300 pixels have beside the digit."""
    if kind == "frame":
        draw.rectangle([2, 2, 257, 297], outline=0, width=3)
    elif kind == "scanner's edges":
        draw.rectangle([0, 0, 6, 300], fill=0)
        draw.rectangle([0, 0, 260, 4], fill=0)
    elif kind == "ruled":
        for row in range(30, 300, 45):
            draw.line([0, row, 260, row], fill=120, width=2)
    else:
        for column in range(5, 250, 9):
            row = 7 * column % 300
            draw.ellipse([column, row, column + 4, row + 4], fill=0)


@pytest.mark.parametrize("kind", ["frame", "scanner's edges", "ruled", "specks"])
def test_what_is_beside_the_digit_is_not_the_digit(kind: str, digits: Pixels, tmp_path: Path) -> None:
    similarities = []
    for digit in digits[::5]:
        page = paint(redraw(digit, 8, (260, 300), (50, 40)), (40, 40, 40), (235, 235, 235)).convert("L")
        draw_beside(kind, ImageDraw.Draw(page))
        page.save(tmp_path / "page.png")
        similarities.append(similarity(read_digits(tmp_path / "page.png")[0], digit))
    assert np.median(similarities) > 0.95
    assert min(similarities) > 0.8


def draw_row(digits: Pixels, scale: int = 8) -> Image.Image:
    """Digits side by side, of equal height, dark on light."""
    page = Image.new("L", (len(digits) * 28 * scale, 36 * scale), 240)
    for number, digit in enumerate(digits):
        ink = redraw(digit, scale, (28 * scale, 36 * scale), (2 * scale, 5 * scale))
        page.paste(paint(ink, (30, 30, 30), (240, 240, 240)), (number * 28 * scale, 0))
    return page


def test_several_digits_are_told(digits: Pixels, tmp_path: Path) -> None:
    draw_row(digits[[7, 31]]).save(tmp_path / "two.png")
    with pytest.warns(UserWarning, match="2 digits, read as one"):
        assert read_digits(tmp_path / "two.png").shape == (1, 28, 28)


def test_digits_that_touch_are_perhaps_several(digits: Pixels, tmp_path: Path) -> None:
    cropped = [digit[:, digit.any(axis=0)] for digit in digits[[10, 15, 20, 25, 40]]]  # 2, 3, 4, 5, 8
    for one, other in pairwise(cropped):
        page = np.hstack([one, other])
        page[13:15, one.shape[1] - 6 : one.shape[1] + 6] = 255
        Image.fromarray(np.pad(page, 4)).resize((page.shape[1] * 8 + 64, 288)).save(tmp_path / "two.png")
        with pytest.warns(UserWarning, match="perhaps several digits"):
            read_digits(tmp_path / "two.png")


def draw_shape(kind: str, draw: ImageDraw.ImageDraw) -> None:
    """What is no digit, on 280x280 pixels."""
    if kind == "flower":
        for angle in np.arange(0, 2 * np.pi, np.pi / 3):
            column, row = 140 + 58 * np.cos(angle), 140 + 58 * np.sin(angle)
            draw.ellipse([column - 34, row - 34, column + 34, row + 34], outline=0, width=8)
    elif kind == "house":
        draw.line([(70, 220), (70, 120), (210, 120), (210, 220), (70, 220)], fill=0, width=8)
        draw.line([(70, 120), (140, 50), (210, 120)], fill=0, width=8)
        draw.rectangle([125, 160, 155, 220], outline=0, width=8)
    elif kind == "star":
        points = [(140 + 100 * np.sin(angle), 140 - 100 * np.cos(angle)) for angle in np.arange(6) * 0.8 * np.pi]
        draw.line(points, fill=0, width=8, joint="curve")
    else:
        draw.ellipse([130, 130, 150, 150], fill=0)


@pytest.mark.parametrize("kind", ["flower", "house", "star", "dot"])
def test_a_shape_that_hardly_any_digit_has_is_doubted(kind: str, tmp_path: Path) -> None:
    page = Image.new("L", (280, 280), 255)
    draw_shape(kind, ImageDraw.Draw(page))
    page.save(tmp_path / "shape.png")
    with pytest.warns(UserWarning, match="perhaps no digit"):
        read_digits(tmp_path / "shape.png")


def test_hardly_any_digit_is_doubted(tmp_path: Path) -> None:
    images, doubted = read_package().images[3::10].numpy(), 0
    for image in images:
        Image.fromarray(image).save(tmp_path / "digit.png")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            read_digits(tmp_path / "digit.png")
        doubted += bool(told)
    assert doubted <= 0.04 * len(images)


def test_several_digits_are_split_from_left_to_right(digits: Pixels, tmp_path: Path) -> None:
    for start in range(0, 40, 10):
        chosen = digits[start : start + 10 : 3]
        draw_row(chosen).save(tmp_path / "row.png")
        found = read_digits(tmp_path / "row.png", split=True)
        assert len(found) == len(chosen) == 4
        for digit, expected in zip(found, chosen, strict=True):
            assert similarity(digit, expected) > 0.9
    Image.fromarray(digits[0]).save(tmp_path / "one.png")
    np.testing.assert_array_equal(read_digits(tmp_path / "one.png", split=True), digits[:1])


@pytest.mark.parametrize("side", [112, 256, 1024, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_faint_digit_is_the_same_whatever_the_size_of_its_picture(side: int, digits: Pixels, tmp_path: Path) -> None:
    for digit in digits[::10]:
        ink = Image.new("L", (side, side))
        ink.paste(Image.fromarray(digit).resize((112, 112), Image.Resampling.BICUBIC), ((side - 112) // 3,) * 2)
        paint(ink, (190,) * 3, (230,) * 3).save(tmp_path / "faint.png", compress_level=1)
        with pytest.warns(UserWarning, match="faint ink"):
            (found,) = read_digits(tmp_path / "faint.png")
        assert similarity(found, digit) > 0.9
        paint(ink, (210,) * 3, (230,) * 3).save(tmp_path / "fainter.png", compress_level=1)
        with pytest.raises(ValueError, match="blank"):
            read_digits(tmp_path / "fainter.png")


def test_noise_is_no_clear_ink(tmp_path: Path) -> None:
    for seed, side in enumerate((28, 40, 100, 300)):
        noise = np.random.default_rng(seed).normal(128, 20, (side, side)).clip(0, 255)
        Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "noise.png")
        with pytest.warns(UserWarning) as told:  # noqa: PT030  (some is faint, too)
            read_digits(tmp_path / "noise.png")
        assert "no clear ink" in [str(each.message) for each in told]


def test_a_digit_that_fills_its_picture_is_no_line(tmp_path: Path) -> None:
    page = Image.new("L", (28, 28), 255)
    ImageDraw.Draw(page).rectangle([10, 1, 16, 26], fill=0)
    page.save(tmp_path / "one.png")
    (found,) = read_digits(tmp_path / "one.png")  # which warns of nothing
    assert found[4:24, 13:15].min() > 200


def test_a_jpeg_may_have_more_pixels_than_would_fit(digits: Pixels, tmp_path: Path) -> None:
    page = paint(redraw(digits[13], 50, (2000, 2000), (300, 300)), (30, 30, 30), (240, 240, 240)).convert("L")
    page.resize((8000, 8000)).save(tmp_path / "large.jpg", quality=50)
    assert similarity(read_digits(tmp_path / "large.jpg")[0], digits[13]) > 0.9


def test_redrawn_digits_come_back_as_mnist_has_them(digits: Pixels, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    similarities = []
    for digit in digits:
        place = (int(rng.integers(0, 200)), int(rng.integers(0, 400)))
        paint(redraw(digit, 10, (400, 600), place), (0, 0, 0), (255, 255, 255)).save(tmp_path / "digit.png")
        (found,) = read_digits(tmp_path / "digit.png")
        rows, columns = np.nonzero(found)
        assert max(np.ptp(rows), np.ptp(columns)) + 1 <= 20
        mass = found / found.sum()
        assert mass.sum(axis=1) @ np.arange(28) == pytest.approx(14, abs=0.51)
        assert mass.sum(axis=0) @ np.arange(28) == pytest.approx(14, abs=0.51)
        similarities.append(similarity(found, digit))
    assert np.median(similarities) > 0.98
    assert min(similarities) > 0.9


KINDS: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "grey": ("png", lambda ink: ink.point(lambda value: 255 - value)),
    "light on dark": ("png", lambda ink: ink),
    "bilevel": ("png", lambda ink: ink.point(lambda value: 255 * (value < 128)).convert("1")),
    "colours": ("png", lambda ink: paint(ink, (200, 0, 0), (230, 220, 140))),
    "colours of one lightness": ("png", lambda ink: paint(ink, (200, 0, 0), (0, 102, 0))),
    "pale": ("png", lambda ink: paint(ink, (150, 150, 150), (220, 220, 220))),
    "palette": ("png", lambda ink: paint(ink, (20, 20, 90), (255, 255, 200)).quantize(16)),
    "opaque": ("png", lambda ink: paint(ink, (0, 0, 0, 255), (255, 255, 255, 255))),
    "dark on transparent": ("png", lambda ink: paint(ink, (0, 0, 0, 255), (0, 0, 0, 0))),
    "light on transparent": ("png", lambda ink: paint(ink, (255, 255, 255, 255), (0, 0, 0, 0))),
    "16 bit": ("png", lambda ink: Image.fromarray(65535 - np.asarray(ink).astype(np.uint16) * 200)),
    "float": ("tiff", lambda ink: Image.fromarray(np.asarray(ink).astype(np.float32) / 255)),
    "CMYK": ("jpg", lambda ink: paint(ink, (0, 0, 0), (255, 255, 255)).convert("CMYK")),
    "jpeg": ("jpg", lambda ink: paint(ink, (0, 0, 0), (255, 255, 255))),
    "webp": ("webp", lambda ink: paint(ink, (0, 0, 0), (255, 255, 255))),
    "gif": ("gif", lambda ink: paint(ink, (0, 0, 0), (255, 255, 255))),
    "bmp": ("bmp", lambda ink: paint(ink, (0, 0, 0), (255, 255, 255))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_shows_the_same_digit(kind: str, digits: Pixels, tmp_path: Path) -> None:
    suffix, draw = KINDS[kind]
    path = tmp_path / f"digit.{suffix}"
    for digit in digits[::10]:
        draw(redraw(digit, 8, (300, 260), (50, 40))).save(path)
        assert similarity(read_digits(path)[0], digit) > 0.93


def _shade(height: int, width: int) -> dict[str, NDArray[np.float64]]:
    """What is added to paper of 235, (height, width): grain, light from the left, light in the middle, both."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    noise = rng.normal(0, 20, (height, width))
    slope = -40 * (columns + 1)
    return {"noise": noise, "slope": slope, "lamp": -30 * (rows**2 + columns**2), "both": slope / 2 + noise / 2}


@pytest.mark.parametrize("kind", by_default(["both", "noise", "slope", "lamp"]))
def test_grain_and_uneven_light_are_not_the_digit(kind: str, digits: Pixels, tmp_path: Path) -> None:
    similarities = []
    for digit in digits:
        share = np.asarray(redraw(digit, 8, (300, 260), (50, 40)), np.float64) / 255
        paper = 235 + _shade(*share.shape)[kind]
        page = (paper * (1 - share) + 40 * share).clip(0, 255).astype(np.uint8)
        Image.fromarray(page).save(tmp_path / "page.png")
        similarities.append(similarity(read_digits(tmp_path / "page.png")[0], digit))
    assert np.median(similarities) > 0.98
    assert min(similarities) > 0.9


def test_a_card_with_transparent_margins_shows_what_is_on_it(digits: Pixels, tmp_path: Path) -> None:
    card = paint(redraw(digits[22], 8, (300, 260), (50, 40)), (0, 0, 80, 255), (255, 250, 240, 255))
    image = Image.new("RGBA", (500, 500))
    image.paste(card, (100, 120))
    image.save(tmp_path / "card.png")
    card.save(tmp_path / "alone.png")
    assert similarity(read_digits(tmp_path / "card.png")[0], read_digits(tmp_path / "alone.png")[0]) > 0.99


def test_a_photo_held_sideways_is_turned_upright(digits: Pixels, tmp_path: Path) -> None:
    upright = paint(redraw(digits[37], 8, (300, 260), (50, 40)), (0, 0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    upright.save(tmp_path / "upright.jpg", quality=95)
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "sideways.jpg", quality=95, exif=exif)
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.jpg", quality=95)
    found = {name: read_digits(tmp_path / f"{name}.jpg")[0] for name in ("upright", "sideways", "lying")}
    assert similarity(found["sideways"], found["upright"]) > 0.98
    assert similarity(found["lying"], found["upright"]) < 0.7


def test_size_does_not_matter(digits: Pixels, tmp_path: Path) -> None:
    digit = digits[13]
    cases = (("tiny", 1, (40, 60), 0.95), ("huge", 100, (4000, 4000), 0.95), ("lost", 4, (2000, 1000), 0.8))
    for name, scale, size, expected in cases:
        path = tmp_path / f"{name}.jpg"
        paint(redraw(digit, scale, size, (10, 20)), (30, 30, 30), (240, 240, 240)).save(path)
        assert similarity(read_digits(path)[0], digit) > expected, name


def test_a_thin_line_is_not_faint(tmp_path: Path) -> None:
    page = Image.new("L", (1000, 1000), 255)
    ImageDraw.Draw(page).line([(200, 800), (500, 100), (800, 800)], fill=0, width=4)
    page.save(tmp_path / "thin.png")
    assert read_digits(tmp_path / "thin.png").max() == 255


@pytest.mark.parametrize(
    "blank",
    [
        Image.new("RGB", (300, 200), "white"),
        Image.new("L", (28, 28)),
        Image.new("RGBA", (60, 60)),
        Image.new("RGBA", (60, 60), (10, 10, 10, 100)),
        Image.new("RGB", (1, 1), "red"),
    ],
    ids=["white", "28x28", "transparent", "half transparent", "a pixel"],
)
def test_a_blank_picture_is_refused(blank: Image.Image, tmp_path: Path) -> None:
    blank.save(tmp_path / "blank.png")
    with pytest.raises(ValueError, match="blank"):
        read_digits(tmp_path / "blank.png")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_picture_is_refused(suffix: str, digits: Pixels, tmp_path: Path) -> None:
    path = tmp_path / f"digit.{suffix}"
    paint(redraw(digits[5], 8, (300, 260), (50, 40)), (0, 0, 0), (255, 255, 255)).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(OSError, match="truncated"):
        read_digits(path)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.png", b"hello"), ("b.png", b""), ("c.eps", None)):
        if content is None:
            Image.new("L", (50, 50)).save(tmp_path / name)  # which would start Ghostscript
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="no image of a kind that can be read"):
            read_digits(tmp_path / name)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="10000x10000 pixels: expected 30,000,000 or fewer"):
        read_digits(tmp_path / "bomb.png")


def test_pictures_of_other_data_sets_are_taken_as_they_are(digits: Pixels, tmp_path: Path) -> None:
    Image.fromarray(255 - digits[0]).save(tmp_path / "shirt.png")
    np.testing.assert_array_equal(read_like(tmp_path / "shirt.png"), 255 - digits[:1])
    np.testing.assert_array_equal(read_like(tmp_path / "shirt.png", 3), np.stack([255 - digits[:1]] * 3, axis=1))


MEMORY = """
import sys
from pathlib import Path
from src.data.images import read_digits

def peak():  # of this process only: ru_maxrss would start at its parent's
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024

before = peak()
for name in sys.argv[1:]:
    try:
        read_digits(Path(name))
    except ValueError as error:
        print(error, peak() - before, sep="|")
"""
PIXELS = "pixels: expected 30,000,000 or fewer; make it smaller"
LARGE = [
    ("1", 9000, "bomb.png", f"9000x9000 {PIXELS}"),
    ("1", 13_500, "larger bomb.png", "exceeds limit of"),
    ("CMYK", 9000, "progressive bomb.jpg", f"9000x9000 {PIXELS}"),
    ("L", 14_200, "progressive of 200 megapixels.jpg", f"14200x14200 {PIXELS}"),
    ("L", 14_200, "of 200 megapixels.jpg", "blank"),
    ("1", 5400, "bilevel.png", "blank"),
    ("P", 5400, "palette.png", "blank"),
    ("LA", 5400, "opacity.png", "blank"),
    ("I;16", 5400, "16 bit.png", "blank"),
    ("I", 5400, "32 bit.tif", "blank"),
    ("F", 5400, "float.tif", "blank"),
    ("CMYK", 5400, "progressive.jpg", "blank"),
    ("RGB", 5400, "lossless.webp", "blank"),
    ("RGBA", 5400, "lossless opacity.webp", "blank"),
]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says there what the most memory was")
def test_no_picture_takes_more_than_500_mb(tmp_path: Path) -> None:
    for mode, side, name, _ in LARGE:
        compression = "tiff_deflate" if name.endswith("tif") else None
        image = Image.new(mode, (side, side), 1 if mode in ("1", "P", "I;16", "I", "F") else None)
        image.save(tmp_path / name, progressive="progressive" in name, lossless=True, compression=compression)
    command = [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for _, _, name, _ in LARGE)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for line, (_, _, name, reason) in zip(result.stdout.splitlines(), LARGE, strict=True):
        said, megabytes = line.split("|")
        print(f"{name}: {megabytes} MB")
        assert reason in said
        assert int(megabytes) < (500 if reason == "blank" else 20)
