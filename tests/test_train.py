"""The train command: what it writes and what it shows."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from src.engine.runs.build import load_checkpoint
from src.engine.settings.check import ROOT
from src.train import train
from tests.engine.equality import assert_equal, scalars
from tests.engine.tiny import TINY, compose_tiny
from tests.forks import run_command
from tests.terminal import train_on_terminal


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs, by the command."""
    root = tmp_path_factory.mktemp("root with spaces")
    result = run_command("train", *TINY, "trainer.max_epochs=3", PROJECT_ROOT=str(root))
    assert result.returncode == 0, result.stderr
    (folder,) = (root / "logs" / "train").iterdir()
    (folder / "stdout").write_text(result.stdout)
    (folder / "stderr").write_text(result.stderr)
    return folder


def test_writes_everything_into_one_folder(run_dir: Path) -> None:
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert {"config.yaml", "metrics.json", "status.json", "train.log"} <= {path.name for path in run_dir.iterdir()}
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 3
    assert config["output_dir"] == str(run_dir)
    assert "${" not in (run_dir / "config.yaml").read_text()
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"


def test_records_metrics_versions_and_commit(run_dir: Path) -> None:
    record = json.loads((run_dir / "metrics.json").read_text())
    assert {"train/loss", "val/loss", "val/acc", "test/loss", "test/acc"} <= record["metrics"].keys()
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["seconds"] > 0
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", "-q", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (record["git_commit"] or "").removesuffix("-dirty") == commit.stdout.strip()


def test_a_pipe_gets_a_plain_line_an_epoch(run_dir: Path) -> None:
    stdout, stderr = ((run_dir / name).read_text() for name in ("stdout", "stderr"))
    assert "\x1b" not in stdout + stderr
    assert "\r" not in stdout + stderr
    lines = [line for line in stderr.splitlines() if line]
    assert [line.split()[:2] for line in lines] == [["epoch", "1/3"], ["epoch", "2/3"], ["epoch", "3/3"]]
    assert all("train/loss" in line and "val/acc" in line for line in lines)
    assert "58 parameters" in stdout
    assert "test/acc" in stdout


def test_a_metric_of_training_is_in_the_table_if_it_is_monitored(run_dir: Path, tmp_path: Path) -> None:
    assert "train/loss" not in (run_dir / "stdout").read_text()
    arguments = ("trainer.max_epochs=1", "monitor=train/loss", "mode=min", "callbacks=minimal", "logger=[]")
    result = run_command("train", *TINY, *arguments, PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "train/loss" in result.stdout


def test_shows_a_progress_bar_on_a_terminal_and_works_from_any_directory(tmp_path: Path) -> None:
    shown = train_on_terminal(
        *TINY, "data.num_rows=8000", "trainer.max_epochs=1", "hydra.run.dir=here", cwd=tmp_path, CI=""
    )
    assert b"epoch 1/1  [" in shown
    assert b"validation  [" in shown
    assert (tmp_path / "here" / "metrics.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_the_best_checkpoint_has_the_best_validation_accuracy(run_dir: Path) -> None:
    curves = scalars(run_dir)
    assert [step for step, _ in curves["train/loss"]] == [step for step, _ in curves["val/acc"]] == [11, 23, 35]
    accuracies = dict(curves["val/acc"])
    best = load_checkpoint(run_dir / "checkpoints" / "best.ckpt")
    assert accuracies[best["global_step"] - 1] == max(accuracies.values())


def test_the_score_is_of_the_monitor_where_the_checkpoint_goes_by_another(tmp_path: Path) -> None:
    other = ("callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min")
    metrics = train(compose_tiny(tmp_path, "trainer.max_epochs=1", "test=false", *other))
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["best"]["score"] == metrics["val/acc"]


def test_without_a_monitor_the_last_epochs_weights_are_kept_and_tested(tmp_path: Path) -> None:
    # By the monitor the first epoch would be kept.
    metrics = train(compose_tiny(tmp_path, "trainer.max_epochs=2", "callbacks.checkpoint.monitor=null", "mode=min"))
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    kept, last = (load_checkpoint(tmp_path / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert kept["epoch"] == 1
    assert_equal(kept["state_dict"], last["state_dict"])
    assert record["best"]["score"] == metrics["val/acc"]
    assert "test/acc" in metrics


@pytest.mark.slow
def test_runs_started_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "src.train", *TINY, "debug=fast", "logger=[]"]
    environment = {**os.environ, "PROJECT_ROOT": str(tmp_path)}
    time.sleep(1 - time.time() % 1)
    runs = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(3)
    ]
    assert [process.wait() for process in runs] == [0, 0, 0]
    assert len(list(tmp_path.glob("logs/train/*/metrics.json"))) == 3


def test_a_full_disk_is_named(mount_disk: Callable[[str], Path]) -> None:
    disk = mount_disk("16k")
    result = run_command("train", *TINY, "trainer.max_epochs=1", "logger=[]", f"hydra.run.dir={disk}/run")
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(disk.glob("run/checkpoints/*")) == []
