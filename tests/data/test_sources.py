"""src/data/sources.py against torchvision's reader, real HTTP mirrors on loopback, and every damage we know of."""

import errno
import functools
import gzip
import hashlib
import inspect
import io
import multiprocessing
import os
import re
import shutil
import socket
import socketserver
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from numpy.typing import NDArray
from torchvision.datasets import MNIST

from src.data.sources import IDX_FILES, NOTE, MissingError, download, parse_idx, read_files, read_package
from src.engine.errors import DataError
from src.engine.settings.check import CONF
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
def test_training_images_of_another_size_than_the_test_images_are_refused(size: tuple[int, int], plain: Path) -> None:
    write_idx(plain / TRAIN_IMAGES, np.zeros((NUM_TRAIN, *size), np.uint8), gzipped=False)

    with pytest.raises(DataError, match=f"{re.escape(str(plain))}: .*{size[0]}x{size[1]} pixels, .* 28x28 pixels;"):
        read_files(plain, {})


def test_images_without_a_label_are_refused(plain: Path) -> None:
    write_idx(plain / TRAIN_LABELS, np.zeros(NUM_TRAIN - 1, np.uint8), gzipped=False)

    with pytest.raises(DataError, match=f"{TRAIN_IMAGES} has 300 .*{TRAIN_LABELS} 299 "):
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


def test_file_that_cannot_be_read_is_named(gzipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gzipped / f"{TRAIN_LABELS}.gz"
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read all
        monkeypatch.setattr(Path, "read_bytes", functools.partialmethod(refuse, Path.read_bytes, path))

    with pytest.raises(DataError, match=rf"{re.escape(str(path))} cannot be read \(Permission denied\); .*data\.root"):
        read_files(gzipped, {})


def refuse(self: Path, really: Callable[[Path], bytes], refused: Path) -> bytes:
    """Read a file unless it is the one that is refused."""
    if self == refused:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
    return really(self)


def test_reading_leaves_the_folder_as_it_is(gzipped: Path, mnist_md5: dict[str, str]) -> None:
    before = sorted(gzipped.iterdir())
    read_files(gzipped, mnist_md5)
    assert sorted(gzipped.iterdir()) == before


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
    """Content of every file by name, whatever its folder, but for the lock and the note."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != NOTE]
    return {path.name: path.read_bytes() for path in paths}


def test_download_puts_the_files_in_place_and_nothing_aside(
    serve: Callable[..., Mirror], mnist_files: dict[str, bytes], mnist_md5: dict[str, str], target: Path
) -> None:
    mirror = serve(mnist_files)

    assert download(target, [mirror.url + "/"], mnist_md5, timeout=5)
    assert files_below(target) == mnist_files
    assert set((target / NOTE).read_text().splitlines()) == set(mnist_files)
    assert {path.name for path in target.parent.iterdir()} <= {"raw", ".raw.lock"}
    assert socket.getdefaulttimeout() is None
    assert mirror.fetched == [f"{name}.gz" for name in IDX_FILES]


def test_files_that_are_there_are_not_downloaded_again(
    serve: Callable[..., Mirror], mnist_files: dict[str, bytes], mnist_md5: dict[str, str], gzipped: Path
) -> None:
    mirror = serve(mnist_files)

    assert not download(gzipped, [mirror.url], mnist_md5, timeout=5)
    assert mirror.fetched == []


def test_a_damaged_download_is_moved_aside_and_fetched_anew(
    serve: Callable[..., Mirror],
    mnist_files: dict[str, bytes],
    mnist_md5: dict[str, str],
    target: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mirror, name = serve(mnist_files), f"{TRAIN_IMAGES}.gz"
    assert download(target, [mirror.url], mnist_md5, timeout=5)
    moved = {}
    for damaged in (b"damaged", b"again"):
        (target / name).write_bytes(damaged)
        moved[f"{name}.damaged-{hashlib.md5(damaged).hexdigest()[:6]}"] = damaged
        with pytest.raises(MissingError, match="no mirror"):
            download(target, [], mnist_md5, timeout=5)
        assert (target / name).read_bytes() == damaged  # without another one in its place it stays

        assert download(target, [mirror.url], mnist_md5, timeout=5)
        assert files_below(target) == mnist_files | moved
        assert re.search(rf"{target / name} .*{list(moved)[-1]} and downloaded anew", caplog.messages[-1])
    assert not download(target, [mirror.url], mnist_md5, timeout=5)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("others", [False, True])
def test_files_of_the_users_own_are_never_touched(
    suffix: str,
    others: bool,
    serve: Callable[..., Mirror],
    mnist_files: dict[str, bytes],
    mnist_md5: dict[str, str],
    target: Path,
) -> None:
    """Whether the other three are missing or not, and before anything is downloaded."""
    mirror = serve(mnist_files)
    own = {f"{IDX_FILES[3]}{suffix}": b"letters"}
    if others:
        own |= {name: content for name, content in mnist_files.items() if IDX_FILES[3] not in name}
    target.mkdir(parents=True)
    for name, content in own.items():
        (target / name).write_bytes(content)

    with pytest.raises(DataError, match=rf"{target / IDX_FILES[3]}.* data\.md5=null .* another data\.root$"):
        download(target, [mirror.url], mnist_md5, timeout=5)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == own
    assert mirror.fetched == []


def test_a_missing_file_is_fetched_and_the_others_kept(
    serve: Callable[..., Mirror], mnist_files: dict[str, bytes], mnist_md5: dict[str, str], plain: Path
) -> None:
    (plain / TRAIN_LABELS).unlink()
    before = files_below(plain)

    assert download(plain, [serve(mnist_files).url], mnist_md5, timeout=5)
    name = f"{TRAIN_LABELS}.gz"
    assert files_below(plain) == before | {name: mnist_files[name]}


def test_without_checksums_files_are_the_users_own(
    serve: Callable[..., Mirror], mnist_files: dict[str, bytes], plain: Path
) -> None:
    (plain / TRAIN_LABELS).unlink()
    before = files_below(plain)

    with pytest.raises(
        DataError, match=re.escape(f"{plain / TRAIN_LABELS}[.gz] not found; put it there, or set data.root")
    ):
        download(plain, [serve(mnist_files).url], {}, timeout=5)
    assert files_below(plain) == before


@pytest.mark.parametrize("kind", BAD_MIRRORS)
def test_bad_mirror_is_passed_over(
    kind: str,
    bad_mirrors: dict[str, str],
    serve: Callable[..., Mirror],
    mnist_files: dict[str, bytes],
    mnist_md5: dict[str, str],
    target: Path,
) -> None:
    start = time.monotonic()

    assert download(target, [bad_mirrors[kind], serve(mnist_files).url], mnist_md5, timeout=0.5)
    assert files_below(target.parent) == mnist_files
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("kind", BAD_MIRRORS)
def test_bad_mirror_is_named_and_leaves_nothing(
    kind: str, checksums: bool, bad_mirrors: dict[str, str], mnist_md5: dict[str, str], target: Path
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
    serve: Callable[..., Mirror], mnist_files: dict[str, bytes], mnist_md5: dict[str, str], target: Path
) -> None:
    mirror = serve(mnist_files, delay=0.1)  # one is still at it when the others come
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["src.data.sources"])  # imported once, not 4 times

    with context.Pool(4) as pool:
        downloaded = pool.starmap(download, [(target, [mirror.url], mnist_md5, 5.0)] * 4, chunksize=1)

    assert sorted(downloaded) == [False, False, False, True]
    assert sorted(mirror.fetched) == sorted(mnist_files)
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


# ---------------------------------------------------------------------------------------------------------------------
# Files of other data sets


TYPES = {np.uint8: 8, np.int16: 11, np.int32: 12, np.float32: 13, np.float64: 14}


def make_idx(values: NDArray[Any]) -> bytes:
    """The IDX format as its page describes it."""
    header = bytes((0, 0, TYPES[values.dtype.type], values.ndim)) + np.array(values.shape, ">u4").tobytes()
    return header + values.astype(values.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(5,), (5, 8), (5, 6, 7), (5, 3, 6, 7)])
def test_idx_of_any_type_and_shape_is_read(kind: type, shape: tuple[int, ...]) -> None:
    values: NDArray[Any] = (np.random.default_rng(0).normal(size=shape) * 100).astype(kind)

    for content in (make_idx(values), gzip.compress(make_idx(values))):
        found = parse_idx(content).numpy()
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("pattern", [
    "emnist-digits-{0}-idx{1}-ubyte.gz",
    "{0}.idx{1}-ubyte",
    "{0}-idx{1}-ubyte/{0}-idx{1}-ubyte",
    "{0}.idx{1}-ubyte/{0}-idx{1}-ubyte.gz",
    "qmnist-{0}-idx{1}-int",
])  # fmt: skip
def test_names_that_others_leave_are_found(pattern: str, mnist_files: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in mnist_files.items():
        split, part, dims, _ = re.split("[-.]", name.removesuffix(".gz"))
        split = "test" if split == "t10k" and "mnist-" in pattern else split
        path = tmp_path / pattern.format(f"{split}-{part}", dims[-1])
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)  # gzipped, whatever its name says

    train, test = read_files(tmp_path, {})
    np.testing.assert_array_equal(train.images, make_digits(NUM_TRAIN, 0)[0])
    np.testing.assert_array_equal(test.labels, make_digits(NUM_TEST, 1)[1])


def test_of_several_data_sets_in_a_folder_one_is_chosen(mnist_files: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in mnist_files.items():
        for prefix in ("emnist-letters-", "emnist-mnist-"):
            (tmp_path / f"{prefix}{name}").write_bytes(content if prefix == "emnist-mnist-" else b"")

    with pytest.raises(DataError, match=r"choose by data\.prefix, emnist-letters- or emnist-mnist-"):
        read_files(tmp_path, {})
    assert len(read_files(tmp_path, {}, "emnist-mnist-")[0].images) == NUM_TRAIN


def test_of_qmnists_labels_the_first_column_is_the_class(gzipped: Path) -> None:
    labels = np.zeros((NUM_TRAIN, 8), np.int32)
    labels[:, 0], labels[:, 1] = np.arange(NUM_TRAIN) % 10, 4
    (gzipped / f"{TRAIN_LABELS}.gz").unlink()
    (gzipped / "train-labels-idx2-int").write_bytes(make_idx(labels))

    np.testing.assert_array_equal(read_files(gzipped, {})[0].labels, labels[:, 0])


def test_colours_may_come_last(gzipped: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (NUM_TRAIN + NUM_TEST, 9, 8, 3), dtype=np.uint8)
    for name, part in (("train", images[:NUM_TRAIN]), ("t10k", images[NUM_TRAIN:])):
        (gzipped / f"{name}-images-idx3-ubyte.gz").unlink()
        (gzipped / f"{name}-images-idx4-ubyte").write_bytes(make_idx(part))

    np.testing.assert_array_equal(read_files(gzipped, {})[0].images, np.moveaxis(images[:NUM_TRAIN], 3, 1))


def test_checksums_may_be_of_the_content(gzipped: Path) -> None:
    path = gzipped / f"{TRAIN_IMAGES}.gz"
    content = gzip.decompress(path.read_bytes())
    md5 = {TRAIN_IMAGES: hashlib.md5(content, usedforsecurity=False).hexdigest(), path.name: "0" * 32}
    path.write_bytes(gzip.compress(content, 1, mtime=7))
    read_files(gzipped, md5)
    path.write_bytes(gzip.compress(content[:-1] + b"?"))
    with pytest.raises(DataError, match=f"its MD5 checksum is .*, expected .*{md5[TRAIN_IMAGES]}"):
        read_files(gzipped, md5)


def test_an_archive_of_several_data_sets_is_downloaded(
    serve: Callable[..., Mirror], mnist_files: dict[str, bytes], tmp_path: Path
) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in mnist_files.items():
            name = name.replace("t10k", "test")
            file.writestr(f"gzip/emnist-letters-{name}", content)
            file.writestr(f"gzip/emnist-mnist-{name}", b"others")
    md5 = {"gzip.zip": hashlib.md5(archive.getvalue(), usedforsecurity=False).hexdigest()}
    target, mirror = tmp_path / "EMNIST" / "raw", serve({"gzip.zip": archive.getvalue()})

    with pytest.raises(DataError, match=r"gzip\.zip is damaged: expected the MD5 checksum 0{32}"):
        download(target, [mirror.url], {"gzip.zip": "0" * 32}, 5, "emnist-letters-")
    assert files_below(tmp_path) == {}
    assert download(target, [mirror.url], md5, 5, "emnist-letters-")
    expected = {f"emnist-letters-{name.replace('t10k', 'test')}": content for name, content in mnist_files.items()}
    assert files_below(tmp_path) == expected
    assert not download(target, [mirror.url], md5, 5, "emnist-letters-")


@pytest.mark.parametrize("preset", ["mnist", "fashion_mnist", "kmnist", "qmnist", "emnist_letters"])
def test_the_presets_mirrors_and_checksums_are_torchvisions(preset: str) -> None:
    settings = yaml.safe_load((CONF / "data" / f"{preset}.yaml").read_text())
    source = inspect.getsource(getattr(torchvision.datasets, settings["name"]))
    fetched = {file: checksum for file, checksum in settings["md5"].items() if file.endswith((".gz", ".zip"))}

    for mirror in settings["mirrors"]:
        assert mirror in source
    assert len(fetched) == (1 if preset == "emnist_letters" else 4)
    for file, checksum in fetched.items():
        assert file in source
        assert re.fullmatch("[0-9a-f]{32}", checksum)
        assert checksum in source
