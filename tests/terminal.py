"""Commands on a terminal, as users see them."""

import os
import pty
import subprocess
import sys
from pathlib import Path

from src.engine.settings.check import ROOT


def train_on_terminal(*arguments: str, cwd: Path = ROOT, **env: str) -> bytes:
    """What ``python -m src.train`` prints on a terminal of 120 columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "120", **env}
    command = [sys.executable, "-m", "src.train", *arguments]
    with subprocess.Popen(command, cwd=cwd, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 65536):
                shown += chunk
        except OSError:  # Linux's way to say that the other side has closed it
            pass
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    return shown
