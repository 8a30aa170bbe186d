"""Processes at work: waited for, and looked for where none should be left."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def living(word: str) -> set[int]:
    """The processes with a word on their command line; a zombie lives no more."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and word in (folder / "cmdline").read_bytes().decode(errors="replace"):
                found.add(int(folder.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until something holds, and fail where it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
