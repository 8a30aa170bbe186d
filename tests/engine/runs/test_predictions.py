"""What was predicted becomes a file, whole or not at all."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from src.engine.runs import predictions, preflight
from src.engine.runs.predictions import Predictions

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows, batch_size: int = 3) -> Predictions:
    with Predictions(path) as written:
        for start in range(0, len(rows), batch_size):
            written.extend(rows[start : start + batch_size])
    return written


def test_a_name_that_is_not_utf_8_costs_no_table(tmp_path: Path) -> None:
    rows = [{"file": os.fsdecode(b"\xff.png"), "class": 7}, {"file": "é.png", "class": 8}]
    for suffix in ("csv", "json", "parquet"):
        write(tmp_path / f"rows.{suffix}", rows)
    assert (tmp_path / "rows.csv").read_bytes() == b"file,class\n\xff.png,7\n\xc3\xa9.png,8\n"
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    names = pyarrow.parquet.read_table(tmp_path / "rows.parquet")["file"].to_pylist()
    assert names == [r"\xff.png", "é.png"]


def test_a_column_may_come_late_and_its_values_may_become_fractions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "ROW_GROUP", 4)
    rows: Rows = [{"file": f"{index}.png", "value": None if index < 5 else 1, "boxes": []} for index in range(10)]
    rows += [{"file": "blurred.png", "value": 0.5, "boxes": [[1, 2.5]], "sure": "blurred"}]
    columns = ("file", "value", "boxes", "sure")
    for suffix in ("csv", "json", "parquet"):
        written = write(tmp_path / f"rows.{suffix}", rows)
        assert (written.first, written.count, written.num_unsure) == (rows, 11, 1)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    full = [{name: row.get(name) for name in columns} for row in rows]
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet")
    assert table.to_pylist() == full
    with (tmp_path / "rows.csv").open() as file:
        found = list(csv.DictReader(file))
    assert found == [{name: "" if row[name] is None else str(row[name]) for name in columns} for row in full]


def test_whatever_ends_the_predictions_what_there_is_by_then_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "new" / "rows.json"

    def end_early(*batches: Rows) -> None:
        with Predictions(path) as written:
            for batch in batches:
                written.extend(batch)
            assert [each.name for each in path.parent.iterdir()] == [
                "rows.json"
            ] * path.exists()  # a kill leaves nothing
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        end_early()
    assert list(path.parent.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        end_early([{"x": 1}, {"x": 2}], [{"x": 3}])
    assert json.loads(path.read_text()) == [{"x": 1}, {"x": 2}, {"x": 3}]
    assert "ended early: the first 3 rows are in" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        end_early()
    assert len(json.loads(path.read_text())) == 3  # nothing is no reason to replace it


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/last.ckpt", "predictions.csv"])
def test_a_run_that_is_refused_late_keeps_its_results(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setattr(preflight.this, "made", [tmp_path / "run"])
    preflight.remove_folders()
    assert path.exists() == (name != "config.yaml")
