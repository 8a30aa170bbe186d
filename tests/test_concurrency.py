"""Runs that are started at once, in the same folders, do not get into each other's way."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.build import load_checkpoint
from src.config import ROOT
from tests.conftest import Mirror

NUM_RUNS = 10


def start(root: Path, mirror: Mirror, md5: dict[str, str | None]) -> subprocess.Popen[str]:
    """A run of an epoch below a PROJECT_ROOT; ``data.root`` is its ``data/``."""
    checksums = ",".join(f"{name}:{checksum}" for name, checksum in md5.items())
    return subprocess.Popen(
        [
            sys.executable, "-m", "src.train", "trainer=cpu", "trainer.max_epochs=1", "data.source=download",
            f"data.mirrors=[{mirror.url}]", f"data.md5={{{checksums}}}", "data.val_size=60", "data.batch_size=32",
        ],
        cwd=ROOT,
        env={**os.environ, "PROJECT_ROOT": str(root), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def read_result(folder: Path) -> dict[str, Any]:
    """What is the same for all: without times, places, and who downloaded."""
    record: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    for key in ("seconds", "images_per_second", "git_commit", "arguments"):
        del record[key]
    del record["best"]["checkpoint"], record["data"]["source"], record["metrics"]["train/images_per_second"]
    return record


@pytest.mark.slow
def test_ten_runs_at_once_download_once_and_each_gives_the_right_result(
    serve: Callable[..., Mirror],
    mnist_files: dict[str, bytes],
    mnist_md5: dict[str, str | None],
    tmp_path: Path,
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    run = start(alone, serve(mnist_files), mnist_md5)
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    (folder,) = (alone / "logs" / "train").iterdir()
    truth = read_result(folder)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if "tfevents" not in path.name)

    mirror = serve(mnist_files, delay=0.2)  # one is still at it when the others come
    runs = [start(together, mirror, mnist_md5) for _ in range(NUM_RUNS)]
    try:
        outputs = [run.communicate(timeout=300)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0] * NUM_RUNS, "\n".join(outputs)
    assert "Traceback" not in "".join(outputs)

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
        best = json.loads((folder / "metrics.json").read_text())["best"]["checkpoint"]
        assert Path(best).parent == folder / "checkpoints"
        load_checkpoint(best)  # whole
    sources = [json.loads((folder / "metrics.json").read_text())["data"]["source"] for folder in folders]
    assert Counter(sources) == {"download": 1, "files": NUM_RUNS - 1}
