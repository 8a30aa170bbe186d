"""Runs that are started at once, in the same folders, do not get into each other's way."""

import json
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.engine.runs.build import load_checkpoint
from tests import forks
from tests.mnist.files import Mirror

NUM_RUNS = 10


def start(root: Path, said: Path, mirror: Mirror, md5: dict[str, str | None]) -> ForkServerProcess:
    """A run of an epoch below a PROJECT_ROOT; ``data.root`` is its ``data/``."""
    checksums = ",".join(f"{name}:{checksum}" for name, checksum in md5.items())
    arguments = [
        "trainer=cpu", "trainer.max_epochs=1", "data.source=download", f"data.mirrors=[{mirror.url}]",
        f"data.md5={{{checksums}}}", "data.val_size=60", "data.batch_size=32",
    ]  # fmt: skip
    return forks.start("train", arguments, said, {"PROJECT_ROOT": str(root)})


def read_result(folder: Path) -> dict[str, Any]:
    """What is the same for all: without times, places, and who downloaded."""
    record: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    for key in ("seconds", "images_per_second", "git_commit", "arguments"):
        del record[key]
    del record["best"]["checkpoint"], record["data"]["source"], record["metrics"]["train/samples_per_second"]
    return record


@pytest.mark.slow
def test_ten_runs_at_once_download_once_and_each_gives_the_right_result(
    serve: Callable[..., Mirror],
    mnist_files: dict[str, bytes],
    mnist_md5: dict[str, str | None],
    tmp_path: Path,
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    run = start(alone, tmp_path / "said", serve(mnist_files), mnist_md5)
    run.join(300)
    assert run.exitcode == 0, (tmp_path / "said").read_text()
    (folder,) = (alone / "logs" / "train").iterdir()
    truth = read_result(folder)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if "tfevents" not in path.name)

    mirror = serve(mnist_files, delay=0.2)  # one is still at it when the others come
    runs = [start(together, tmp_path / "all said", mirror, mnist_md5) for _ in range(NUM_RUNS)]
    for run in runs:
        run.join(300)
    said = (tmp_path / "all said").read_text()
    assert [run.exitcode for run in runs] == [0] * NUM_RUNS, said
    assert "Traceback" not in said

    assert sorted(mirror.fetched) == sorted(mnist_files)  # each once
    raw = together / "data" / "MNIST" / "raw"
    assert {path.name: path.read_bytes() for path in raw.iterdir() if not path.name.startswith(".")} == mnist_files
    assert [path.name for path in raw.parent.iterdir() if path.name.startswith(".download")] == []

    folders = list((together / "logs" / "train").iterdir())
    assert len(folders) == NUM_RUNS
    for folder in folders:
        assert read_result(folder) == truth
        assert sorted(path.relative_to(folder) for path in folder.rglob("*") if "tfevents" not in path.name) == names
        assert yaml.safe_load((folder / "config.yaml").read_text())["output_dir"] == str(folder)
        best = folder / json.loads((folder / "metrics.json").read_text())["best"]["checkpoint"]
        assert best.parent == folder / "checkpoints"
        load_checkpoint(best)  # whole
    sources = [json.loads((folder / "metrics.json").read_text())["data"]["source"] for folder in folders]
    assert Counter(sources) == {"download": 1, "files": NUM_RUNS - 1}
