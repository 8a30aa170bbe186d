"""Keeps what was predicted in a temporary file, and writes it as CSV, JSON or Parquet."""

import csv
import json
import logging
import pickle
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self

from src.engine.runs import report

log = logging.getLogger(__name__)

SUFFIXES = (".csv", ".json", ".parquet")
MAX_SHOWN = 50  # rows of the table on the terminal
ROW_GROUP = 10_000  # rows of Parquet at a time
Row = dict[str, Any]  # a sample, by column
CLASS_COLUMNS = ("class", "probability", "runner_up", "runner_up_probability")  # a classifier's


class Predictions:
    """Rows that become a file at the end; in memory are the first ones only, however many there are.

    They are written whatever ends the predictions: what there is by then, whole or not at all.

    Args:
        path: The file, whose suffix is one of SUFFIXES. In its folder is a temporary one without a name, of which
            nothing stays, however the process ends.

    Attributes:
        first: The first MAX_SHOWN rows.
        count: How many there are.
        num_unsure: How many have another ``sure`` than "yes".
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.first: list[Row] = []
        self.count = self.num_unsure = 0
        self._num_batches, self._columns = 0, Row()

    def __enter__(self) -> Self:
        """Begin, before the work: a folder that cannot be written to is an error now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = TemporaryFile(dir=self.path.parent)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Write the file, unless there is no row."""
        with self._file:
            if not self.count:
                return
            with report.replacing(self.path) as aside:
                self._write(aside)
        if error:
            log.warning(f"ended early: the first {self.count:,} rows are in {report.shown(self.path)}")

    def extend(self, rows: Sequence[Row]) -> None:
        """Add the rows of a batch."""
        pickle.dump(rows, self._file)
        self._num_batches += 1
        self.first += rows[: MAX_SHOWN - len(self.first)]
        self.count += len(rows)
        self.num_unsure += sum(row.get("sure", "yes") != "yes" for row in rows)
        self._columns |= dict.fromkeys(chain.from_iterable(rows))

    def _rows(self) -> Iterator[Row]:
        self._file.seek(0)
        for _ in range(self._num_batches):
            yield from pickle.load(self._file)

    def _write(self, path: Path) -> None:
        if self.path.suffix == ".parquet":
            return self._write_parquet(path)
        # A file's name can be any bytes.
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            if self.path.suffix == ".csv":
                writer = csv.DictWriter(file, self._columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self._rows())
            else:
                texts = (json.dumps(row, default=str) for row in self._rows())
                file.writelines(f"{',' if number else '['}\n{text}" for number, text in enumerate(texts))
                file.write("\n]\n")

    def _write_parquet(self, path: Path) -> None:
        import pyarrow  # of the extra export
        from lightning_utilities.core.apply_func import apply_to_collection
        from pyarrow import parquet

        def readable(text: str) -> str:  # a file's name can be any bytes, this format's texts cannot
            return text.encode(errors="surrogateescape").decode(errors="backslashreplace")

        def tables(schema: Any = None) -> Iterator[Any]:
            rows = self._rows()
            while part := apply_to_collection(list(islice(rows, ROW_GROUP)), str, readable):
                yield pyarrow.table({name: [row.get(name) for row in part] for name in self._columns}, schema)

        schema = pyarrow.unify_schemas([table.schema for table in tables()], promote_options="permissive")
        with parquet.ParquetWriter(path, schema) as writer:
            for table in tables(schema):
                writer.write_table(table)
