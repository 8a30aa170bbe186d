"""Commands on a terminal, as users see them."""

import os
import pty
import select
from pathlib import Path

from src.engine.settings.check import ROOT
from tests import forks


def train_on_terminal(*arguments: str, cwd: Path = ROOT, **env: str) -> bytes:
    """What ``python -m src.train`` prints on a terminal of 120 columns."""
    ours, theirs = pty.openpty()
    environment = {"TERM": "xterm-256color", "COLUMNS": "120", **env}
    process = forks.start("train", arguments, Path(os.ttyname(theirs)), environment, cwd=cwd)
    shown = b""
    is_ended = False
    while not is_ended:
        is_ended = process.exitcode is not None  # looked up first: what it has printed is then all there
        while select.select([ours], [], [], 0.05)[0]:
            shown += os.read(ours, 65536)
    os.close(theirs)
    os.close(ours)
    assert process.exitcode == 0, shown.decode()
    return shown
