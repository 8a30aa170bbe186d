"""The README's table "From laptop to cluster", a command a row."""

import re
import shlex
import sys

from src.engine.settings.check import ROOT


def read_table() -> dict[str, str]:
    """The commands by the left column.

    Raises:
        AssertionError: If a row is anything but words and one command.
    """
    section = (ROOT / "README.md").read_text().split("## From laptop to cluster\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [re.fullmatch(r"\| ([^|`]+) \| `([^|`]+)` \|", row) for row in rows]
    assert all(cells), [row for row, cell in zip(rows, cells, strict=True) if not cell]
    return {cell[1]: cell[2] for cell in cells if cell}


def words_of(row: str, **values: object) -> list[str]:
    """The words of a row's command, with this Python.

    Args:
        row: Its left column.
        values: What to put in the place of ``<the first>``, as ``the_first``, and so on.
    """
    command = read_table()[row]
    for name, value in values.items():
        assert f"<{name.replace('_', ' ')}>" in command
        command = command.replace(f"<{name.replace('_', ' ')}>", shlex.quote(str(value)))
    assert "<" not in command
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return [part for word in shlex.split(command) for part in programs.get(word, [word])]
