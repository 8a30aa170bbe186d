"""What the commands print on terminals: colours unless NO_COLOR is set, a bar unless CI is."""

import re
from pathlib import Path

import pytest

from tests.engine.tiny import TINY
from tests.terminal import train_on_terminal

ARGUMENTS = (*TINY, "trainer.max_epochs=1", "callbacks=minimal", "logger=[]")
COLOUR = re.compile(rb"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d|10\d)[;m]")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run prints on a user's terminal."""
    return train_on_terminal(*ARGUMENTS, PROJECT_ROOT=str(tmp_path_factory.mktemp("shown")), CI="")


@pytest.mark.slow
def test_no_colour_where_it_is_not_wanted(shown: bytes, tmp_path: Path) -> None:
    assert COLOUR.search(shown)
    assert not COLOUR.search(train_on_terminal(*ARGUMENTS, PROJECT_ROOT=str(tmp_path), NO_COLOR="1", CI=""))


UP, ERASE = b"\x1b[1A", b"\x1b[2K"  # a bar goes back over its own line


@pytest.mark.slow
def test_under_ci_a_terminal_gets_a_line_an_epoch_and_no_bar(shown: bytes, tmp_path: Path) -> None:
    assert UP in shown or ERASE in shown
    assert b"epoch 1/1  train/loss" not in shown
    quiet = train_on_terminal(*ARGUMENTS, PROJECT_ROOT=str(tmp_path), CI="1")
    assert UP not in quiet
    assert ERASE not in quiet
    assert quiet.count(b"epoch 1/1  train/loss") == 1
