"""What a run says at its end, on the console and in files."""

import json
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


class PrintableFormatter(logging.Formatter):
    """Log messages for a terminal: what they quote of a checkpoint or a file must not steer it."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, printable but for its line breaks and tabs."""
        return re.sub(r"[^\n\t]+", lambda part: printable(part[0]), super().format(record))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as aside:
        aside.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes a file's place once it is whole; what a kill has left there is written over."""
    aside = path.with_name(f".{path.name}.part")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def shown(path: str | Path, follow_links: bool = True) -> str:
    """A path as a person would type it: from the working directory where it lies below; printable."""
    path = Path(path).resolve() if follow_links else Path(path)
    return printable(str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path))


def listed(names: Sequence[str], limit: int = 10) -> str:
    """Some names in a line, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def printable(text: str) -> str:
    """Text for a terminal: what would steer it, as an escape sequence in a file's name, is written as its code."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def cell(value: Any) -> "Text":
    """A cell of a table: its brackets are text, as in a path, no markup, and it is printable."""
    from rich.text import Text  # here: a config that is rejected needs no tables

    return Text(printable(str(value)))


def print_table(title: str, rows: Mapping[str, Any]) -> None:
    """A table of two columns."""
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")  # a path is to be copied whole
    for name, value in rows.items():
        table.add_row(cell(name), cell(f"{value:.4f}" if isinstance(value, float) else value))
    make_console().print(table)


def print_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[Any] | None = None) -> None:
    """Accuracy per class and the confusion matrix, (num_classes, num_classes), a row a true class."""
    from rich.table import Table

    names = [cell(name) for name in classes or range(len(confusion))]
    table = Table(title="confusion matrix (row: true class, column: predicted)", title_justify="left")
    table.add_column("class")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("accuracy", justify="right")
    for label, (row, accuracy) in enumerate(zip(confusion, class_accuracies(confusion), strict=True)):
        cells = [f"[bold]{count}[/bold]" if column == label else str(count or "·") for column, count in enumerate(row)]
        table.add_row(names[label], *cells, "-" if accuracy is None else f"{accuracy:.4f}")
    make_console().print(table)


def class_accuracies(confusion: Sequence[Sequence[int]]) -> list[float | None]:
    """Share of each class's images that were taken for it; None for a class without images."""
    return [row[label] / sum(row) if sum(row) else None for label, row in enumerate(confusion)]


def make_console() -> "Console":
    """Wide enough for paths where the output is no terminal, which has no width."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, soft_wrap=False)


def describe_data(data: Mapping[str, Any]) -> str:
    """The source and the number of images a split, in a line."""
    splits = ", ".join(f"{count:,} {split}" for split, count in data.get("num_images", {}).items())
    return f"{data.get('source', '?')}: {splits}"


def print_next(commands: Mapping[str, str]) -> None:
    """The commands to try next, each with what it does; they run where they are printed.

    Args:
        commands: What each does, by command. ``python`` becomes the path of this one where the shell has another.
    """
    from rich.text import Text

    # Links are kept, as they are the environment.
    python = "python" if shutil.which("python") == sys.executable else shlex.quote(shown(sys.executable, False))
    for command, purpose in commands.items():
        command = re.sub(r"^python\b", lambda _: python, command)
        line = Text.assemble(f"  {command}  ", (f"# {purpose}", "dim"))
        make_console().print(line, soft_wrap=True)  # a line's end within a command would be copied, too
