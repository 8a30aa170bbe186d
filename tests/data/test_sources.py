"""src/data/sources.py against torchvision's reader, real HTTP mirrors on loopback, and every damage we know of."""

import errno
import functools
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import pytest
import torch
from torchvision.datasets import MNIST

from src.data import sources
from src.data.sources import CHECKSUMS, IDX_FILES, download, read_files, read_package
from src.engine.errors import DataError
from tests.mnist.files import NUM_TEST, NUM_TRAIN, Mirror, make_digits, write_digits, write_idx

TRAIN_IMAGES, TRAIN_LABELS = IDX_FILES[:2]

# ---------------------------------------------------------------------------------------------------------------------
# Reading files


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder of the tiny data set's files, uncompressed; the test may change them."""
    folder = tmp_path / "MNIST" / "raw"
    write_digits(folder, gzipped=False)
    return folder


@pytest.fixture
def gzipped(mnist_root: Path, tmp_path: Path) -> Path:
    """The same, gzipped."""
    return shutil.copytree(mnist_root / "MNIST" / "raw", tmp_path / "gzipped" / "raw")


@pytest.mark.parametrize("kind", ["plain", "gzipped"])
def test_files_are_read_as_they_were_written(kind: str, request: pytest.FixtureRequest) -> None:
    train, test = read_files(request.getfixturevalue(kind), {})

    for split, (images, labels) in ((train, make_digits(NUM_TRAIN, 0)), (test, make_digits(NUM_TEST, 1))):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)


def test_files_are_read_as_torchvision_reads_them(plain: Path) -> None:
    for split, train in zip(read_files(plain, {}), (True, False), strict=True):
        truth = MNIST(str(plain.parents[1]), train=train)
        assert torch.equal(split.images, truth.data)
        assert torch.equal(split.labels, truth.targets)


@pytest.mark.parametrize("name", IDX_FILES)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-7], id="cut"),
        pytest.param(lambda content: content[:7], id="cut in the header"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content + b"more", id="appended"),
        pytest.param(lambda content: b"\0\0\x0d" + content[3:], id="magic of floats"),
        pytest.param(lambda content: content[:3] + b"\2" + content[4:], id="magic of 2 dimensions"),
    ],
)
def test_damaged_plain_file_is_named(name: str, damage: Callable[[bytes], bytes], plain: Path) -> None:
    (plain / name).write_bytes(damage((plain / name).read_bytes()))

    with pytest.raises(DataError, match=re.escape(str(plain / name))):
        read_files(plain, {})


@pytest.mark.parametrize("name", IDX_FILES)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-12], id="cut"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content + b"more", id="appended"),
        pytest.param(lambda content: content[:20] + bytes(20) + content[40:], id="overwritten"),
        pytest.param(lambda content: b"<html>moved</html>", id="another file"),
    ],
)
def test_damaged_gzipped_file_is_named(name: str, damage: Callable[[bytes], bytes], gzipped: Path) -> None:
    path = gzipped / f"{name}.gz"
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(DataError, match=re.escape(str(path))):
        read_files(gzipped, {})


@pytest.mark.parametrize(("kind", "suffix", "byte"), [("plain", "", -1), ("gzipped", ".gz", 5)])
def test_checksum_finds_the_bit_flip_that_the_format_hides(
    kind: str, suffix: str, byte: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    path = folder / f"{TRAIN_IMAGES}{suffix}"
    content = bytearray(path.read_bytes())
    md5 = {path.name: hashlib.md5(content, usedforsecurity=False).hexdigest()}
    read_files(folder, md5)
    content[byte] ^= 1  # a pixel, and the time in gzip's header
    path.write_bytes(content)

    read_files(folder, {})
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_files(folder, md5)


@pytest.mark.parametrize("size", [(14, 56), (32, 32)])
def test_images_of_another_size_are_refused(size: tuple[int, int], plain: Path) -> None:
    write_idx(plain / TRAIN_IMAGES, np.zeros((NUM_TRAIN, *size), np.uint8), gzipped=False)

    with pytest.raises(DataError, match=f"{re.escape(str(plain / TRAIN_IMAGES))}.*{size[0]}x{size[1]}"):
        read_files(plain, {})


def test_images_without_a_label_are_refused(plain: Path) -> None:
    write_idx(plain / TRAIN_LABELS, np.zeros(NUM_TRAIN - 1, np.uint8), gzipped=False)

    with pytest.raises(DataError, match=f"{TRAIN_IMAGES} has 300 .*{TRAIN_LABELS} 299 "):
        read_files(plain, {})


def test_label_of_an_eleventh_class_is_refused(plain: Path) -> None:
    write_idx(plain / TRAIN_LABELS, np.full(NUM_TRAIN, 10, np.uint8), gzipped=False)

    with pytest.raises(DataError, match=re.escape(str(plain / TRAIN_LABELS))):
        read_files(plain, {})


def test_data_set_without_images_is_refused(plain: Path) -> None:
    write_idx(plain / TRAIN_IMAGES, np.zeros((0, 28, 28), np.uint8), gzipped=False)
    write_idx(plain / TRAIN_LABELS, np.zeros(0, np.uint8), gzipped=False)

    with pytest.raises(DataError, match=re.escape(str(plain))):
        read_files(plain, {})


@pytest.mark.parametrize("name", IDX_FILES)
def test_missing_file_is_named(name: str, gzipped: Path) -> None:
    (gzipped / f"{name}.gz").unlink()

    with pytest.raises(DataError, match=re.escape(f"{gzipped / name}[.gz] not found")):
        read_files(gzipped, {})


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        pytest.param((TRAIN_LABELS, IDX_FILES[3]), f"300 images but {TRAIN_LABELS} 60 labels", id="labels exchanged"),
        pytest.param((TRAIN_IMAGES, IDX_FILES[2]), f"60 images but {TRAIN_LABELS} 300 labels", id="images exchanged"),
        pytest.param(
            (TRAIN_IMAGES, TRAIN_LABELS),
            f"{TRAIN_IMAGES} is not .*wrong magic number",
            id="images and labels exchanged",
        ),
    ],
)
def test_exchanged_files_are_found_without_checksums(names: tuple[str, str], reason: str, plain: Path) -> None:
    first, second = (plain / name for name in names)
    first.rename(plain / "aside")
    second.rename(first)
    (plain / "aside").rename(second)

    with pytest.raises(DataError, match=f"{re.escape(str(plain))}.*{reason}"):
        read_files(plain, {})


def test_checksum_tells_which_file_lies_in_the_place(gzipped: Path, mnist_md5: dict[str, str | None]) -> None:
    shutil.copy(gzipped / f"{IDX_FILES[2]}.gz", gzipped / f"{TRAIN_IMAGES}.gz")

    with pytest.raises(DataError, match=rf"{TRAIN_IMAGES}\.gz .*\(that of {IDX_FILES[2]}\.gz\).*; delete it"):
        read_files(gzipped, mnist_md5)


def test_file_that_cannot_be_read_is_named(gzipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gzipped / f"{TRAIN_LABELS}.gz"
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read all
        monkeypatch.setattr(Path, "open", functools.partialmethod(refuse, Path.open, path))

    with pytest.raises(DataError, match=rf"{re.escape(str(path))} cannot be read \(Permission denied\); .*data\.root"):
        read_files(gzipped, {})


def refuse(self: Path, really: Callable[..., IO[Any]], refused: Path, *how: Any, **settings: Any) -> IO[Any]:
    """Open a file unless it is the one that is refused."""
    if self == refused:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
    return really(self, *how, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Checksums that are known already


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what has been hashed, in order."""
    sizes = []
    md5 = hashlib.md5

    def count(content: bytes, **settings: bool) -> Any:
        sizes.append(len(content))
        return md5(content, **settings)

    monkeypatch.setattr(hashlib, "md5", count)
    return sizes


def spoil(content: bytes) -> bytes:
    """Change what nothing but the checksum sees: the time in gzip's header."""
    return content[:5] + bytes([content[5] ^ 1]) + content[6:]


@pytest.fixture
def old(gzipped: Path) -> Path:
    """The tiny data set's files, gzipped, of long ago."""
    for path in gzipped.iterdir():
        os.utime(path, (1.6e9, 1.6e9))
    (gzipped / CHECKSUMS).unlink(missing_ok=True)  # another test's
    return gzipped


def test_files_that_have_not_changed_are_hashed_once(
    old: Path, mnist_md5: dict[str, str | None], hashed: list[int]
) -> None:
    first = read_files(old, mnist_md5)
    assert hashed == [(old / f"{name}.gz").stat().st_size for name in IDX_FILES]

    again = read_files(old, mnist_md5)
    assert len(hashed) == 4
    assert all(torch.equal(*pair) for pair in zip(first[0] + first[1], again[0] + again[1], strict=True))


def test_file_that_was_touched_is_hashed_again(old: Path, mnist_md5: dict[str, str | None], hashed: list[int]) -> None:
    path = old / f"{TRAIN_LABELS}.gz"
    read_files(old, mnist_md5)
    hashed.clear()
    os.utime(path, (1.7e9, 1.7e9))

    read_files(old, mnist_md5)
    assert hashed == [path.stat().st_size]


def test_another_checksum_asked_for_is_not_taken_as_known(old: Path, mnist_md5: dict[str, str | None]) -> None:
    read_files(old, mnist_md5)
    other = {**mnist_md5, f"{TRAIN_LABELS}.gz": "0" * 32}

    with pytest.raises(DataError, match=f"{TRAIN_LABELS}.*expected {'0' * 32}"):
        read_files(old, other)


def test_file_of_this_moment_is_not_yet_known(old: Path, mnist_md5: dict[str, str | None], hashed: list[int]) -> None:
    path = old / f"{TRAIN_LABELS}.gz"
    path.touch()  # whatever befalls it now may have the same time

    for _ in range(2):
        hashed.clear()
        read_files(old, mnist_md5)
    assert hashed == [path.stat().st_size]


def test_damage_with_its_time_set_back_is_found(old: Path, mnist_md5: dict[str, str | None]) -> None:
    path = old / f"{TRAIN_IMAGES}.gz"
    read_files(old, mnist_md5)
    time.sleep(0.05)  # the clock of a file system's times is a coarse one
    path.write_bytes(spoil(path.read_bytes()))
    os.utime(path, (1.6e9, 1.6e9))

    with pytest.raises(DataError, match=re.escape(str(path))):
        read_files(old, mnist_md5)


@pytest.mark.parametrize("known", [True, False])
def test_change_while_reading_is_found(
    known: bool, old: Path, mnist_md5: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = old / f"{TRAIN_IMAGES}.gz"
    whole = path.read_bytes()
    if known:
        read_files(old, mnist_md5)
    stamp = sources._get_stamp
    stamps = []

    def change_after(file: BinaryIO) -> list[int]:
        stamps.append(stamp(file))
        if len(stamps) == 1:  # looked at, not yet read
            path.write_bytes(spoil(whole))
        return stamps[-1]

    monkeypatch.setattr(sources, "_get_stamp", change_after)
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_files(old, mnist_md5)


def test_whole_file_put_in_place_while_reading_is_not_blessed_by_its_forerunner(
    old: Path, mnist_md5: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, hashed: list[int]
) -> None:
    path = old / f"{TRAIN_IMAGES}.gz"
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    os.utime(path, (1.6e9, 1.6e9))
    stamp = sources._get_stamp
    stamps = []

    def mend_after(file: BinaryIO) -> list[int]:
        stamps.append(stamp(file))
        if len(stamps) == 1:
            path.write_bytes(whole)
        return stamps[-1]

    monkeypatch.setattr(sources, "_get_stamp", mend_after)
    read_files(old, mnist_md5)
    assert f"{TRAIN_IMAGES}.gz" not in json.loads((old / CHECKSUMS).read_text())


def forge(entry: Callable[[Path], Any]) -> Callable[[Path], bytes]:
    """A list of checksums that says the same of each file."""
    return lambda old: json.dumps({f"{name}.gz": entry(old / f"{name}.gz") for name in IDX_FILES}).encode()


BAD_CHECKSUMS: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda old: b"",
    "cut": lambda old: b'{"train-images-idx3-ubyte.gz": [77',
    "not text": lambda old: bytes(range(256)),
    "deep": lambda old: b"[" * 9_000,
    "long": lambda old: b" " * 1_000_000 + b"{}",
    "a long number": lambda old: b'{"a": ' + b"9" * 9_000 + b"}",
    "another type": lambda old: b"[]",
    "entries of another type": forge(lambda path: True),
    "entries too short": forge(lambda path: [path.stat().st_size]),
    "no checksums": forge(lambda path: [path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ctime_ns, None]),
    "other checksums": forge(
        lambda path: [path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ctime_ns, "0" * 32]
    ),
}


@pytest.mark.parametrize("kind", BAD_CHECKSUMS)
def test_bad_list_of_checksums_neither_stops_nor_misleads(
    kind: str, old: Path, mnist_md5: dict[str, str | None], hashed: list[int]
) -> None:
    content = BAD_CHECKSUMS[kind](old)
    (old / CHECKSUMS).write_bytes(content)

    read_files(old, mnist_md5)
    assert len(hashed) == 4
    assert (old / CHECKSUMS).read_bytes() != content  # mended
    read_files(old, mnist_md5)
    assert len(hashed) == 4

    path = old / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(spoil(path.read_bytes()))
    (old / CHECKSUMS).write_bytes(BAD_CHECKSUMS[kind](old))
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_files(old, mnist_md5)


def make_huge(path: Path) -> None:
    """Zeros, more than memory holds; on the disk they take no space."""
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(os.mkfifo, id="pipe"),
        pytest.param(lambda path: (path / "full").mkdir(parents=True), id="folder"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), id="endless"),
        pytest.param(make_huge, id="huge"),
        pytest.param(lambda path: path.symlink_to(path.name), id="circle"),
    ],
)
def test_anything_in_place_of_the_list_is_passed_over(
    make: Callable[[Path], None], old: Path, mnist_md5: dict[str, str | None], hashed: list[int]
) -> None:
    make(old / CHECKSUMS)

    read_files(old, mnist_md5)
    assert len(hashed) == 4
    assert {path.name for path in old.iterdir()} == {f"{name}.gz" for name in IDX_FILES} | {CHECKSUMS}


def test_list_that_may_not_be_read_is_passed_over(
    old: Path, mnist_md5: dict[str, str | None], hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_files(old, mnist_md5)
    monkeypatch.setattr(Path, "open", functools.partialmethod(refuse, Path.open, old / CHECKSUMS))

    read_files(old, mnist_md5)
    assert len(hashed) == 8


def test_folder_that_is_read_only_stays_as_it_is(
    old: Path, mnist_md5: dict[str, str | None], hashed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    old.chmod(0o555)
    try:
        for _ in range(2):
            read_files(old, mnist_md5)
    finally:
        old.chmod(0o755)

    assert len(hashed) == 8
    assert {path.name for path in old.iterdir()} == {f"{name}.gz" for name in IDX_FILES}
    assert caplog.records == []


def test_files_without_checksums_leave_the_list_alone(old: Path, mnist_md5: dict[str, str | None]) -> None:
    read_files(old, {})
    assert not (old / CHECKSUMS).exists()

    read_files(old, mnist_md5)
    before = (old / CHECKSUMS).read_bytes()
    read_files(old, {})
    assert (old / CHECKSUMS).read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# Download


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The folder, not there yet, to download to."""
    return tmp_path / "data" / "MNIST" / "raw"


class MailServer(socketserver.BaseRequestHandler):
    """What answers here does not speak HTTP."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"220 this is a mail server\r\n")


@pytest.fixture
def bad_mirrors(serve: Callable[..., Mirror], mnist_files: dict[str, bytes]) -> Iterator[dict[str, str]]:
    """URLs of mirrors that do not deliver, by what is wrong with them."""
    last = f"{IDX_FILES[-1]}.gz"
    with (
        socket.socket() as down,
        socket.create_server(("127.0.0.1", 0)) as silent,  # the kernel takes the call, nobody answers
        socketserver.ThreadingTCPServer(("127.0.0.1", 0), MailServer) as mail,
    ):
        down.bind(("127.0.0.1", 0))  # nobody listens
        threading.Thread(target=mail.serve_forever, args=(0.01,), daemon=True).start()
        yield {
            "down": f"http://127.0.0.1:{down.getsockname()[1]}",
            "silent": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "lacks a file": serve({name: mnist_files[name] for name in mnist_files if name != last}).url,
            "corrupts": serve(mnist_files | {last: mnist_files[last][:-1] + b"?"}).url,
            "cuts short": serve(mnist_files | {last: mnist_files[last][:-12]}).url,
            "not HTTP": f"http://127.0.0.1:{mail.server_address[1]}",
            "no URL": "example.org/mnist",
        }
        mail.shutdown()


BAD_MIRRORS = ["down", "silent", "lacks a file", "corrupts", "cuts short", "not HTTP", "no URL"]


def files_below(folder: Path) -> dict[str, bytes]:
    """Content of every file by name, whatever its folder, but for the lock."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_download_puts_the_files_in_place_and_nothing_aside(
    serve: Callable[..., Mirror], mnist_files: dict[str, bytes], mnist_md5: dict[str, str | None], target: Path
) -> None:
    mirror = serve(mnist_files)

    assert download(target, [mirror.url + "/"], mnist_md5, timeout=5)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == mnist_files
    assert {path.name for path in target.parent.iterdir()} <= {"raw", ".raw.lock"}
    assert socket.getdefaulttimeout() is None
    assert mirror.fetched == [f"{name}.gz" for name in IDX_FILES]


def test_files_that_are_there_are_not_downloaded_again(
    serve: Callable[..., Mirror], mnist_files: dict[str, bytes], mnist_md5: dict[str, str | None], gzipped: Path
) -> None:
    mirror = serve(mnist_files)

    assert not download(gzipped, [mirror.url], mnist_md5, timeout=5)
    assert mirror.checked == mirror.fetched == []


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_damaged_file_is_replaced(
    suffix: str,
    serve: Callable[..., Mirror],
    mnist_files: dict[str, bytes],
    mnist_md5: dict[str, str | None],
    target: Path,
) -> None:
    target.mkdir(parents=True)
    (target / f"{TRAIN_IMAGES}{suffix}").write_bytes(b"damaged")

    assert download(target, [serve(mnist_files).url], mnist_md5, timeout=5)
    assert files_below(target) == mnist_files


@pytest.mark.parametrize("kind", BAD_MIRRORS)
def test_bad_mirror_is_passed_over(
    kind: str,
    bad_mirrors: dict[str, str],
    serve: Callable[..., Mirror],
    mnist_files: dict[str, bytes],
    mnist_md5: dict[str, str | None],
    target: Path,
) -> None:
    start = time.monotonic()

    assert download(target, [bad_mirrors[kind], serve(mnist_files).url], mnist_md5, timeout=0.5)
    assert files_below(target.parent) == mnist_files
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("kind", BAD_MIRRORS)
def test_bad_mirror_is_named_and_leaves_nothing(
    kind: str, checksums: bool, bad_mirrors: dict[str, str], mnist_md5: dict[str, str | None], target: Path
) -> None:
    with pytest.raises(DataError, match=re.escape(bad_mirrors[kind])):
        download(target, [bad_mirrors[kind]], mnist_md5 if checksums else {}, timeout=0.5)
    assert files_below(target.parent) == {}


def test_every_mirror_is_named_when_none_delivers(bad_mirrors: dict[str, str], target: Path) -> None:
    down, silent = bad_mirrors["down"], bad_mirrors["silent"]

    with pytest.raises(DataError, match=f"{down}: .*{silent}: .*timed out"):
        download(target, [down, silent], {}, timeout=0.5)


def test_download_without_mirrors_says_so(target: Path) -> None:
    with pytest.raises(DataError, match=r"data\.mirrors .*empty"):
        download(target, [], {}, timeout=0.5)


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"a file, not a folder")

    with pytest.raises(DataError, match=re.escape(str(tmp_path / "data" / "raw"))):
        download(tmp_path / "data" / "raw", [], {}, timeout=0.5)


@pytest.mark.slow
def test_processes_at_once_download_each_file_once(
    serve: Callable[..., Mirror], mnist_files: dict[str, bytes], mnist_md5: dict[str, str | None], target: Path
) -> None:
    mirror = serve(mnist_files, delay=0.1)  # one is still at it when the others come
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["src.data.sources", "torchvision.datasets.utils"])  # imported once, not 4 times

    with context.Pool(4) as pool:
        downloaded = pool.starmap(download, [(target, [mirror.url], mnist_md5, 5.0)] * 4, chunksize=1)

    assert sorted(downloaded) == [False, False, False, True]
    assert sorted(mirror.fetched) == sorted(mirror.checked) == sorted(mnist_files)
    assert files_below(target.parent) == mnist_files


# ---------------------------------------------------------------------------------------------------------------------
# The package


def test_package_has_500_digits_of_each_class() -> None:
    images, labels = read_package()

    assert images.shape == (5000, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [500] * 10


@pytest.mark.full_mnist
def test_package_has_the_first_training_images_of_each_class(full_mnist_root: Path) -> None:
    images, labels = (
        np.frombuffer(gzip.decompress((full_mnist_root / "MNIST" / "raw" / f"{name}.gz").read_bytes()), np.uint8)
        for name in IDX_FILES[:2]
    )
    images, labels = images[16:].reshape(-1, 28, 28), labels[8:]
    package = read_package()

    for label in range(10):
        np.testing.assert_array_equal(package.images[package.labels == label], images[labels == label][:500])
