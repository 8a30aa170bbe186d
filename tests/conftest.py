"""What the tests of several rooms share."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# The fixtures of MNIST, as long as it is here.
pytest_plugins = ["tests.mnist.files"] if Path(__file__).with_name("mnist").exists() else []
# The commands' tests are made on it.
is_left_out = not Path(__file__).parents[1].joinpath("src", "data", "mnist.py").exists()
collect_ignore = ["test_demo.py", "test_export.py", "test_predict.py", "test_test.py"] if is_left_out else []


# Each checkpoint is forced to the disk, a thousand in all, which a busy disk delays by seconds each: memory does not.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


# A script that runs the tests in the background has them ignore these, and the commands under test would, too.
for ignored in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system of its own, as small as ``mount_disk("300k")`` says."""
    disk = tmp_path / "disk"
    with ExitStack() as stack:

        def mount(size: str) -> Path:
            disk.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
            if subprocess.run(command, check=False, capture_output=True).returncode:
                pytest.skip("only root can mount the small file system that this needs")
            stack.callback(lambda: subprocess.run(["umount", disk], check=True))
            return disk

        yield mount
