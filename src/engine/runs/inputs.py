"""Finds the files that ``inputs=`` means."""

import glob
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from src.engine.errors import ConfigError
from src.engine.runs import report

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".pbm", ".pgm", ".ppm")
OTHERS = (".heic", ".heif", ".avif", ".jxl", ".svg", ".pdf", ".psd")  # pictures that are not read
IDX = "idx[34][-_.]"  # in an IDX file's name, if it is of images
AS_IN = "name files, folders or patterns, as in inputs='digits/*.png'"


class Inputs:
    """Files, in order, each once. They are looked up again at each pass: a list of millions would fill the memory.

    Args:
        names: Files, folders (their image and IDX files at any depth) and patterns (``*``, ``?``, ``**``); or one.

    Attributes:
        others: How many other pictures there are, of kinds that cannot be read, by suffix.

    Raises:
        ConfigError: If one of the names leads to no file.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = [names] if isinstance(names, str) else list(names)
        if not self._names:
            raise ConfigError(f"inputs=[]: {AS_IN}")
        self.others: Counter[str] = Counter()
        self._count = sum(1 for _ in self._find(self.others))

    def __len__(self) -> int:
        """How many there are."""
        return self._count

    def __iter__(self) -> Iterator[Path]:
        """Find them."""
        return self._find(Counter())

    def _find(self, others: Counter[str]) -> Iterator[Path]:
        can_repeat = len(self._names) > 1 or "**" in self._names[0]  # one folder, or one pattern, names no file twice
        seen: set[str] = set()
        for name in self._names:
            path = Path(name).expanduser()
            found = [str(path)] if path.exists() else glob.iglob(str(path), recursive=True)  # noqa: PTH207
            entered: set[str] = set()
            is_empty = True
            for place in map(Path, sorted(found, key=lambda each: each.replace("/", "\0"))):  # by folder, then by name
                for file in list_folder(place, others, entered) if place.is_dir() else [place]:
                    if not file.is_file():  # a pipe would be waited for
                        continue
                    is_empty = False
                    if str(file) not in seen:
                        yield file
                    if can_repeat:
                        seen.add(str(file))
            if is_empty:
                unread = f"; there are {describe(others)}" if others else ""
                raise ConfigError(
                    f"inputs={report.printable(name)}: no such file, or no image or IDX file in there{unread}; {AS_IN}"
                )


def describe(others: Counter[str]) -> str:
    """How many files of which kinds cannot be read, and what to do."""
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(others.items()))
    return f"{kinds}, which cannot be read: save them as PNG or JPEG"


def list_folder(folder: Path, others: Counter[str], entered: set[str]) -> Iterator[Path]:
    """The image and IDX files of a folder at any depth, in order, each folder once; nothing that is hidden.

    Args:
        folder: It may have links to folders, even to itself.
        others: Counts the pictures of a kind that cannot be read, by suffix.
        entered: The folders that were listed.
    """
    if (real := str(folder.resolve())) in entered:
        return
    entered.add(real)
    for name in sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
        path = folder / name
        if path.is_dir():
            yield from list_folder(path, others, entered)
        elif (suffix := path.suffix.lower()) in SUFFIXES or re.search(IDX, name):
            yield path
        elif suffix in OTHERS:
            others[suffix] += 1
