"""Pictures of digits from files of any kind, made to look as MNIST's do."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from src.data.sources import parse_idx

SIZE = 28
BOX = 20  # a digit's longer side
MASS_CENTRE = 14  # the pixel at which a digit's centre of mass lies, both ways: measured on MNIST
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # not all that Pillow opens: EPS starts a program
IDX = "idx3-ubyte"  # in an IDX file's name
WORK_SIZE = 256  # larger pictures are made smaller first, which also takes out most noise
OPAQUE = 240  # of 255
MIN_CONTRAST = 32  # of 255; below, a picture is blank


def read_digits(path: Path) -> NDArray[np.uint8]:
    """Read a picture of one digit, or an IDX file of many.

    The digits of an IDX file and pictures of 28x28 pixels keep their pixels (dark on light is turned into light on
    dark). Others become what MNIST's are: the digit fits into 20x20 pixels, its centre of mass in the middle of 28x28.

    Args:
        path: An image file, whose background is one colour, or an IDX file, gzipped (``.gz``) or not.

    Returns:
        Digits, light (255) on dark (0), (N, 28, 28).

    Raises:
        ValueError: If it is no picture, damaged or blank; the message does not name the file.
        OSError: If it cannot be read.
    """
    if IDX in path.name:
        return parse_idx(path.read_bytes(), path.name).numpy()
    ink = _find_ink(_open(path))
    if np.ptp(ink) < MIN_CONTRAST:
        raise ValueError("blank: nothing in it stands out from its background")
    return (ink if ink.shape == (SIZE, SIZE) else _normalise(ink))[np.newaxis]


def read_like(path: Path) -> NDArray[np.uint8]:
    """Read a picture that has the format of another data set in MNIST's files already; as ``read_digits`` otherwise.

    Returns:
        The grey pixels as they are, (N, 28, 28).
    """
    if IDX in path.name:
        return parse_idx(path.read_bytes(), path.name).numpy()
    pixels = np.asarray(Image.fromarray(_open(path).astype(np.uint8)).convert("L"))
    if pixels.shape != (SIZE, SIZE):
        raise ValueError("not 28x28 pixels, as the data set's; only to digits is it known how others are made so")
    return pixels[np.newaxis]


def _open(path: Path) -> NDArray[np.float32]:
    """The picture upright, at most WORK_SIZE wide and high, as red, green, blue and opacity in 0..255, (H, W, 4)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # a small file that would fill the memory
        try:
            with Image.open(path, formats=FORMATS) as file:
                file.draft(None, (WORK_SIZE, WORK_SIZE))  # a JPEG need not be decoded in full
                image: Image.Image = ImageOps.exif_transpose(file)
        except UnidentifiedImageError as error:
            raise ValueError(f"no image of a kind that can be read ({', '.join(FORMATS)})") from error
    if image.mode.startswith(("I", "F")):  # 16 bits and more: from the darkest to the lightest
        values = np.asarray(image, np.float64)
        scale = 255 / max(float(np.ptp(values)), 1.0)
        image = Image.fromarray(((values - values.min()) * scale).round().astype(np.uint8))
    image = image.convert("RGBA")
    image.thumbnail((WORK_SIZE, WORK_SIZE), reducing_gap=3.0)
    return np.asarray(image, np.float32)


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
    border = np.concatenate([colours[0], colours[-1], colours[:, 0], colours[:, -1]])
    ink: NDArray[np.uint8] = np.abs(colours - np.median(border, axis=0)).max(axis=2).astype(np.uint8)
    return ink


def _normalise(ink: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Fit the digit into BOX x BOX pixels, in full contrast, with its centre of mass in the middle, (28, 28)."""
    threshold = _otsu(ink)
    level = float(np.median(ink[ink > threshold]))
    floor = 0.2 * level  # what is fainter is paper
    ink = (np.clip((ink - floor) / (level - floor), 0, 1) * 255).astype(np.uint8)
    rows, columns = (np.flatnonzero((ink > 127).any(axis=axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    scale = BOX / max(bottom - top, right - left)
    height, width = (max(1, round(side * scale)) for side in (bottom - top, right - left))
    digit = Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC, (left, top, right, bottom))
    values = np.asarray(digit, np.float32)
    values *= 255 / values.max()  # a thin line has become faint
    mass = values.sum()
    row = round(MASS_CENTRE - float(values.sum(axis=1) @ np.arange(height)) / float(mass))
    column = round(MASS_CENTRE - float(values.sum(axis=0) @ np.arange(width)) / float(mass))
    row, column = min(max(row, 0), SIZE - height), min(max(column, 0), SIZE - width)
    result = np.zeros((SIZE, SIZE), np.uint8)
    result[row : row + height, column : column + width] = values.round()
    return result


def _otsu(values: NDArray[np.uint8]) -> int:
    """The threshold that tells two groups of values apart best: with the largest variance between them (Otsu, 1979)."""
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below, sums = counts.cumsum(), (counts * np.arange(256)).cumsum()
    between = (sums[-1] * below / below[-1] - sums) ** 2 / np.maximum(below * (below[-1] - below), 1)
    return int(between.argmax())
