"""MNIST for the tests: a tiny one in the real file format, a mirror that serves it, and the real one.

The fixtures are there for all tests: ``tests/conftest.py`` takes this module as a plugin.
"""

import gzip
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

from src.engine.settings.check import ROOT

NUM_TRAIN, NUM_TEST = 300, 60


def write_idx(path: Path, array: NDArray[np.uint8], gzipped: bool) -> None:
    """Write bytes in the IDX format: two zeros, type 8, number of dimensions, big-endian sizes, data."""
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if gzipped else content)


def make_digits(num: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Noise with a bright patch whose place tells the class; as many of each class, in random order.

    Returns:
        Images (num, 28, 28) and labels (num,).
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num) % 10).astype(np.uint8)
    images = rng.integers(0, 50, (num, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = 4 + 12 * (label // 5), 2 + 5 * (label % 5)
        image[row : row + 8, column : column + 4] += 200
    return images, labels


def write_digits(folder: Path, gzipped: bool) -> None:
    """Write the tiny data set's four files."""
    for split, num, seed in (("train", NUM_TRAIN, 0), ("t10k", NUM_TEST, 1)):
        images, labels = make_digits(num, seed)
        suffix = ".gz" if gzipped else ""
        write_idx(folder / f"{split}-images-idx3-ubyte{suffix}", images, gzipped)
        write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", labels, gzipped)


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``data.root`` with the tiny data set, gzipped, at MNIST/raw; to be read, not changed."""
    root = tmp_path_factory.mktemp("data")
    write_digits(root / "MNIST" / "raw", gzipped=True)
    return root


@pytest.fixture(scope="session")
def mnist_files(mnist_root: Path) -> dict[str, bytes]:
    """The tiny data set's four gzipped files, by name."""
    return {path.name: path.read_bytes() for path in (mnist_root / "MNIST" / "raw").iterdir()}


@pytest.fixture(scope="session")
def mnist_md5(mnist_files: dict[str, bytes]) -> dict[str, str]:
    """Their MD5 checksums, by name."""
    return {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in mnist_files.items()}


@pytest.fixture(scope="session")
def full_mnist_root() -> Path:
    """A ``data.root`` with all of MNIST, for tests marked full_mnist."""
    root = Path(os.environ.get("MNIST_ROOT") or ROOT.parent / "shared" / "mnist")
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"no MNIST/raw/train-images-idx3-ubyte.gz below {root}: set MNIST_ROOT")
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best checkpoint of LeNet-5 after six epochs on the package's digits; to be read, not changed."""
    from src.engine.settings.trust import admit
    from src.train import train
    from tests.compose import compose_cfg

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"  # the same for all processes
    common = ("data=mnist5k", "trainer=cpu", "callbacks=minimal", "logger=[]", "test=false")
    cfg = compose_cfg(folder, *common, "trainer.max_epochs=6")
    admit(cfg)  # it may be another process that trains
    with FileLock(f"{folder}.lock"):
        if not (folder / "metrics.json").exists():
            train(cfg)
    return folder / "checkpoints" / "best.ckpt"


class Mirror(ThreadingHTTPServer):
    """Serves files by name, and keeps the names that were asked for."""

    def __init__(self, files: Mapping[str, bytes], delay: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.delay = delay
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/mnist"


class _Handler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        name = self.path.removeprefix("/mnist/")
        self.server.fetched.append(name)
        time.sleep(self.server.delay)
        if name not in self.server.files:
            self.send_error(404)
            return
        with suppress(ConnectionError):  # a client may hang up
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.files[name])))
            self.end_headers()
            self.wfile.write(self.server.files[name])

    def log_message(self, format: str, *args: object) -> None:
        """Keep still."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Mirror]]:
    """Start mirrors on loopback: ``serve(files, delay=0.0)``; they stop when the test ends."""
    monkeypatch.setenv("no_proxy", "*")
    with ExitStack() as stack:

        def start(files: Mapping[str, bytes], delay: float = 0.0) -> Mirror:
            mirror = stack.enter_context(Mirror(files, delay))
            threading.Thread(target=mirror.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(mirror.shutdown)
            return mirror

        yield start
