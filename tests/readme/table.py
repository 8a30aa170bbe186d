"""What the READMEs say: their text, their commands, and the table "From laptop to cluster"."""

import re
import shlex
import sys

from src.engine.settings.check import ROOT

SWEEPS = "src/engine/sweeps/README.md"
# By path from the root. CONTRIBUTING.md and CHANGELOG.md are read like them.
READMES = {
    name: (ROOT / name).read_text()
    for name in (
        "README.md", "conf/README.md", "src/engine/README.md", SWEEPS, "tests/README.md", "notebooks/README.md",
        "CONTRIBUTING.md", "CHANGELOG.md",
    )
    if (ROOT / name).exists()  # a page goes with its room
}  # fmt: skip


def read_commands() -> list[str]:
    """Each command of a ```bash block, and of the README's table of commands, once."""
    blocks = [block for text in READMES.values() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    table = re.findall(r"^\| `([^`]+)` \|", READMES["README.md"], re.MULTILINE)
    return list(dict.fromkeys([*(line for block in blocks for line in block.splitlines()), *table]))


def read_table() -> dict[str, str]:
    """The commands of "From laptop to cluster" by the left column.

    Raises:
        AssertionError: If a row is anything but words and one command.
    """
    section = READMES[SWEEPS].split("## From laptop to cluster\n")[1].split("\n## ")[0]
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
