"""What the commands print on terminals: colours unless NO_COLOR is set, a bar unless CI is."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from src.config import ROOT

ARGUMENTS = ("data=mnist5k", "debug=fast", "trainer=cpu", "logger=[]")
COLOUR = re.compile(rb"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d|10\d)[;m]")


def shown_on_terminal(root: Path, **env: str) -> bytes:
    """What a run prints on a terminal of 120 columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PROJECT_ROOT": str(root), "TERM": "xterm-256color", "COLUMNS": "120", **env}
    command = [sys.executable, "-m", "src.train", *ARGUMENTS]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=theirs, stderr=theirs) as process:
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


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run prints on a user's terminal."""
    return shown_on_terminal(tmp_path_factory.mktemp("shown"), CI="")


@pytest.mark.slow
def test_no_colour_where_it_is_not_wanted(shown: bytes, tmp_path: Path) -> None:
    assert COLOUR.search(shown)
    assert not COLOUR.search(shown_on_terminal(tmp_path, NO_COLOR="1", CI=""))


UP, ERASE = b"\x1b[1A", b"\x1b[2K"  # a bar goes back over its own line


@pytest.mark.slow
def test_under_ci_a_terminal_gets_a_line_an_epoch_and_no_bar(shown: bytes, tmp_path: Path) -> None:
    assert UP in shown or ERASE in shown
    assert b"epoch 1/1  train/acc" not in shown
    quiet = shown_on_terminal(tmp_path, CI="1")
    assert UP not in quiet
    assert ERASE not in quiet
    assert quiet.count(b"epoch 1/1  train/acc") == 1
