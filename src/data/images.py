"""Pictures of digits from files of any kind, made to look as MNIST's do."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from scipy import ndimage

SIZE = 28
BOX = 20  # a digit's longer side
MASS_CENTRE = 14  # the pixel at which a digit's centre of mass lies, both ways: measured on MNIST
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # not all that Pillow opens: EPS starts a program
PAPER_SIZE, WINDOW = 32, 22  # in pixels: the paper's brightness, and the part of it that is looked at for a pixel's
EVEN = 8  # of 255: the differences in one colour
FULL = 0.95  # of a row or column that is ink: a line from edge to edge
SPECK = 0.15  # of the digit's longer side
IDX = "idx[34][-_.]"  # in an IDX file's name, if it is of images
KEPT_SIZE = 1024  # larger pictures are made smaller first
WORK_SIZE = 256  # at which a digit is looked for, which also takes out most noise
MAX_PIXELS = 30_000_000  # to read so many takes 480 MB at most, of WebP
OPAQUE = 240  # of 255
MIN_CONTRAST, FAINT = 32, 48  # of 255; below, a picture is blank, and its ink is faint
WIDE, THICK, HOLES = 1.45, 3.7, 2  # width to height, half a stroke's width, holes: 98 % of MNIST have no more
CLEAR = 0.8  # of the variance lies between ink and paper: of grainy pages with a digit 0.83, of only grain 0.75


def is_idx(path: Path) -> bool:
    """Whether a file's name says that it is an IDX file of images."""
    return re.search(IDX, path.name) is not None


def read_digits(path: Path, split: bool = False) -> NDArray[np.uint8]:
    """Read a picture of one digit, or of several side by side.

    A picture that is one of MNIST's already, by its size and what is in it, keeps its pixels (dark on light is turned
    into light on dark). Others become what MNIST's are: the digit fits into 20x20 pixels, its centre of mass in the
    middle of 28x28.

    Args:
        path: An image file, whose background is one colour.
        split: Whether digits that stand side by side, and do not touch, are read one by one.

    Returns:
        The digits from left to right, light (255) on dark (0), (N, 28, 28); without ``split`` one.

    Raises:
        ValueError: If it is no picture, damaged or blank; the message does not name the file.
        OSError: If it cannot be read.

    Warns:
        UserWarning: If what the picture shows is in doubt.
    """
    pixels = _open(path)
    ink = _find_ink(_reduce(pixels))
    if len(pixels) > len(ink) and (part := _find_part(ink)):
        scale = len(pixels) / len(ink)
        rows, columns = (slice(int(side.start * scale), int(side.stop * scale) + 1) for side in part)
        ink = _find_ink(_reduce(pixels[rows, columns]))
    if np.ptp(ink) < MIN_CONTRAST:
        raise ValueError("blank: nothing in it stands out from its background")
    if _fits(ink):
        return _check_shapes([ink])
    threshold, clearness = _otsu(ink)
    digits = _find_digits(ink, threshold)
    if clearness < CLEAR:
        warnings.warn("no clear ink", stacklevel=2)
    if np.median(ink[ink > threshold]) < FAINT:
        warnings.warn("faint ink", stacklevel=2)
    if split or len(digits) == 1:
        return _check_shapes([_normalise(digit, threshold) for digit in digits])
    warnings.warn(f"{len(digits)} digits, read as one", stacklevel=2)
    return _normalise(np.max(digits, axis=0), threshold)[np.newaxis]


def read_like(path: Path, channels: int = 1) -> NDArray[np.uint8]:
    """Read a picture as it is, in grey or in colours; the larger ones are made smaller.

    Args:
        path: An image file.
        channels: 1, 3 or 4.

    Returns:
        (1, H, W), or (1, C, H, W) in colours.
    """
    image = Image.fromarray(_open(path)).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    pixels = np.array(image)[np.newaxis]  # a copy, since torch warns of arrays that are read-only
    return pixels if channels == 1 else np.moveaxis(pixels, 3, 1)


def _open(path: Path) -> NDArray[np.uint8]:
    """The picture upright, at most KEPT_SIZE wide and high, as red, green, blue and opacity, (H, W, 4)."""
    with warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore")
        is_jpeg = file.read(2) == b"\xff\xd8"
        file.seek(0)
        try:
            # A JPEG need not be decoded in full, so its size is no matter; Image.open would look at that first.
            image: Image.Image = JpegImageFile(file) if is_jpeg else Image.open(file, formats=FORMATS)
        except (UnidentifiedImageError, SyntaxError) as error:
            raise ValueError(f"no image of a kind that can be read ({', '.join(FORMATS)})") from error
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
        if "progressive" not in image.info:  # such a JPEG is held in full all the same
            image.draft(None, (KEPT_SIZE, KEPT_SIZE))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels: expected {MAX_PIXELS:,} or fewer; make it smaller")
        if image.mode.startswith("I;"):  # these cannot be averaged, as those below
            image = image.convert("I")
        elif image.mode in ("1", "P") or "transparency" in image.info:
            image = image.convert("RGBA")
        image.thumbnail((KEPT_SIZE, KEPT_SIZE), reducing_gap=3.0)  # before anything else: a copy of all pixels is large
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F"):  # more than 8 bits: from the darkest to the lightest
        values = np.asarray(image, np.float32)
        scale = 255 / max(float(np.ptp(values)), 1.0)
        image = Image.fromarray(((values - values.min()) * scale).round().astype(np.uint8))
    return np.asarray(image.convert("RGBA"))


def _reduce(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The picture at most WORK_SIZE wide and high, (H, W, 4)."""
    image = Image.fromarray(pixels)
    image.thumbnail((WORK_SIZE, WORK_SIZE))
    return np.asarray(image, np.float32)


def _find_part(ink: NDArray[np.uint8]) -> tuple[slice, slice] | None:
    """Where the ink lies, with a margin, if that is a small part of the picture, which deserves a closer look."""
    box = ndimage.find_objects(np.int8(np.max(_find_digits(ink, _otsu(ink)[0]), axis=0) > 0))
    if not box or (longer := max(side.stop - side.start for side in box[0])) > WORK_SIZE / 4:
        return None
    rows, columns = (slice(max(0, side.start - longer), side.stop + longer) for side in box[0])
    return rows, columns


def _find_ink(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """How much each pixel differs from the background, (H, W), whatever is the darker."""
    colours: NDArray[Any] = pixels[..., :3]
    opacity = pixels[..., 3]
    if opacity.min() < 128:
        opaque = colours[opacity >= OPAQUE]
        spread = np.ptp(np.percentile(opaque, [5, 95], axis=0), axis=0).max() if len(opaque) else 0
        if spread < MIN_CONTRAST:  # of one colour: the digit is what is not transparent
            return opacity.astype(np.uint8)
        share = opacity[..., np.newaxis] / 255
        colours = share * colours + (1 - share) * np.median(opaque, axis=0)
    away = _find_background(colours) - colours
    darker = (away.clip(min=0) ** 4).sum(axis=(0, 1)) >= (away.clip(max=0) ** 4).sum(axis=(0, 1))
    ink: NDArray[np.uint8] = (away * np.where(darker, 1, -1)).clip(min=0).max(axis=2).astype(np.uint8)
    return ink


def _find_background(colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """The paper without what is on it, but with its shadows: the median around each pixel, (H, W, 3).

    Where the picture's edge has one colour all around, that is the paper's; a thick digit has no share in it.
    """
    edge = np.concatenate([colours[0], colours[-1], colours[:, 0], colours[:, -1]])
    if np.ptp(edge, axis=0).max() < EVEN:
        return np.broadcast_to(np.median(edge, axis=0), colours.shape)
    height, width = colours.shape[:2]
    small = (min(width, PAPER_SIZE), min(height, PAPER_SIZE))
    reduced = Image.fromarray(colours.round().astype(np.uint8)).resize(small, Image.Resampling.BOX)
    paper = Image.fromarray(ndimage.median_filter(np.asarray(reduced), size=(WINDOW, WINDOW, 1), mode="reflect"))
    return np.asarray(paper.resize((width, height), Image.Resampling.BILINEAR), np.float32)


def _fits(ink: NDArray[np.uint8]) -> bool:
    """Whether a picture is one of MNIST's already: its size, the digit's size, place and contrast."""
    if ink.shape != (SIZE, SIZE):
        return False
    rows, columns = (np.flatnonzero((ink > 0).any(axis=axis)) for axis in (1, 0))
    longer = max(np.ptp(rows), np.ptp(columns)) + 1
    mass = ndimage.center_of_mass(ink)
    is_central = all(abs(place - MASS_CENTRE) <= 1 for place in mass)
    return bool(17 <= longer <= BOX and is_central and ink.max() >= OPAQUE)


def _find_digits(ink: NDArray[np.uint8], threshold: int) -> list[NDArray[np.uint8]]:
    """The ink of each digit that stands beside others, from left to right, without what is beside them, (H, W).

    Lines from edge to edge go, marks that touch an edge while others do not, and specks.
    """
    mask = ink > threshold
    mask[mask.mean(axis=1) > FULL] = False
    mask[:, mask.mean(axis=0) > FULL] = False
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if not count:
        return [ink]
    boxes = ndimage.find_objects(labels)
    lengths = np.array([max(part.stop - part.start for part in box) for box in boxes])
    edges = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    inner = lengths * ~np.isin(np.arange(1, count + 1), edges)
    if inner.max() > SPECK * lengths.max():
        lengths = inner
    kept = np.flatnonzero(lengths > SPECK * lengths.max())
    spans = [boxes[part][1] for part in kept if boxes[part][0].stop - boxes[part][0].start > lengths.max() / 2]
    spans.sort(key=lambda span: span.start)
    reached = np.maximum.accumulate([0, *(span.stop for span in spans)])[1:]
    gaps = [(left + right.start) / 2 for left, right in zip(reached, spans[1:], strict=False) if right.start > left]
    numbers = np.searchsorted(gaps, [(boxes[part][1].start + boxes[part][1].stop) / 2 for part in kept])
    digits = []
    for number in range(len(gaps) + 1):
        own = np.isin(labels, kept[numbers == number] + 1)
        near = ndimage.binary_dilation(own, iterations=2) & (own | ~mask)  # with the strokes' soft edges
        digits.append(np.where(near, ink, 0).astype(np.uint8))
    return digits


def _normalise(ink: NDArray[np.uint8], threshold: int) -> NDArray[np.uint8]:
    """Fit the digit into BOX x BOX pixels, in full contrast, with its centre of mass in the middle, (28, 28)."""
    level = float(np.median(ink[ink > threshold]))
    floor = 0.2 * level  # what is fainter is paper
    ink = (np.clip((ink - floor) / (level - floor), 0, 1) * 255).astype(np.uint8)
    rows, columns = ndimage.find_objects(np.int8(ink > 127))[0]  # the box around it
    scale = BOX / max(rows.stop - rows.start, columns.stop - columns.start)
    height, width = (max(1, round((side.stop - side.start) * scale)) for side in (rows, columns))
    box = (columns.start, rows.start, columns.stop, rows.stop)
    digit = Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC, box)
    values = np.asarray(digit, np.float32)
    values *= 255 / values.max()  # a thin line has become faint
    row, column = (round(MASS_CENTRE - place) for place in ndimage.center_of_mass(values))
    row, column = min(max(row, 0), SIZE - height), min(max(column, 0), SIZE - width)
    result = np.zeros((SIZE, SIZE), np.uint8)
    result[row : row + height, column : column + width] = values.round()
    return result


def _check_shapes(digits: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The digits, stacked, (N, 28, 28); warns of shapes that hardly any digit has."""
    for mask in (digit > 127 for digit in digits):
        rows, columns = ndimage.find_objects(np.int8(mask))[0]
        parts, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))  # of the paper: beside the digit, and holes
        num_holes = (np.bincount(parts[parts > 0]) > 1).sum() - 1
        if columns.stop - columns.start > WIDE * (rows.stop - rows.start):
            warnings.warn("perhaps several digits", stacklevel=3)
        elif num_holes > HOLES or ndimage.distance_transform_edt(mask).max() > THICK:
            warnings.warn("perhaps no digit", stacklevel=3)
    return np.stack(digits)


def _otsu(values: NDArray[np.uint8]) -> tuple[int, float]:
    """The threshold that tells two groups of values apart best, and how well, in 0..1 (Otsu, 1979).

    It has the largest variance between the groups, which is that share of the whole variance.
    """
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below, sums = counts.cumsum(), (counts * np.arange(256)).cumsum()
    between = (sums[-1] * below / below[-1] - sums) ** 2 / np.maximum(below * (below[-1] - below), 1)
    return int(between.argmax()), float(between.max() / max(values.var(), 1e-9))
