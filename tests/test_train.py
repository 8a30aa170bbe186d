"""The train command: what it writes, what it shows, that it learns."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.engine.runs.build import load_checkpoint
from src.engine.settings.check import ROOT
from src.train import train
from tests import forks
from tests.compose import compose_cfg, run_command
from tests.terminal import train_on_terminal


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs over the package's digits, by the command."""
    root = tmp_path_factory.mktemp("root with spaces")
    result = run_command("train", "data=mnist5k", "trainer.max_epochs=3", "trainer=cpu", PROJECT_ROOT=str(root))
    assert result.returncode == 0, result.stderr
    (folder,) = (root / "logs" / "train").iterdir()
    (folder / "stdout").write_text(result.stdout)
    (folder / "stderr").write_text(result.stderr)
    return folder


def test_learns_real_digits(run_dir: Path) -> None:
    metrics = json.loads((run_dir / "metrics.json").read_text())["metrics"]
    assert metrics["test/acc"] > 0.9  # 0.95 over many seeds; chance is 0.1
    assert metrics["val/acc"] > 0.9


def test_writes_everything_into_one_folder(run_dir: Path) -> None:
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert {"config.yaml", "metrics.json", "train.log"} <= {path.name for path in run_dir.iterdir()}
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 3
    assert config["output_dir"] == str(run_dir)
    assert "${" not in (run_dir / "config.yaml").read_text()


def test_records_data_versions_and_commit(run_dir: Path) -> None:
    record = json.loads((run_dir / "metrics.json").read_text())
    assert record["data"] == {
        "source": "package",
        "num_images": {"train": 4000, "val": 500, "test": 500},
        "fingerprint": "crc32:5d9c45cd",  # the package never changes, nor do its splits
    }
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["seconds"] > 0
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (record["git_commit"] or "").removesuffix("-dirty") == commit.stdout.strip()


def test_says_one_line_an_epoch_where_the_output_is_no_terminal(run_dir: Path) -> None:
    lines = [line for line in (run_dir / "stderr").read_text().splitlines() if line]
    assert [line.split()[:2] for line in lines] == [["epoch", "1/3"], ["epoch", "2/3"], ["epoch", "3/3"]]
    assert all("train/loss" in line and "val/acc" in line for line in lines)
    assert "package: 4,000 train, 500 val, 500 test" in (run_dir / "stdout").read_text()


def test_a_pipe_gets_plain_lines_with_the_models_shapes(run_dir: Path) -> None:
    stdout, stderr = ((run_dir / name).read_text() for name in ("stdout", "stderr"))
    assert "\x1b" not in stdout + stderr
    assert "\r" not in stdout + stderr
    assert re.search(r"net\.c3 .*Conv2d .* 2\.4 K ", stdout)
    assert re.search(r"net\.f6 .*Linear .* 10\.2 K .* \[1, 84\] ", stdout)
    assert "Total params: 61.7 K" in stdout


def test_shows_a_progress_bar_on_a_terminal_and_works_from_any_directory(tmp_path: Path) -> None:
    settings = ("data=mnist5k", "trainer.max_epochs=1", "trainer=cpu", "hydra.run.dir=here")
    shown = train_on_terminal(*settings, cwd=tmp_path, CI="")
    assert b"Epoch 0/0" in shown
    assert "━".encode() in shown
    assert (tmp_path / "here" / "metrics.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_tensorboard_holds_the_curves_text_and_graph(run_dir: Path) -> None:
    events = EventAccumulator(str(run_dir))
    events.Reload()
    tags = events.Tags()
    scalars = {"train/loss", "train/acc", "val/loss", "val/acc", "train/images_per_second", "lr-Adam"}
    assert scalars <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [
        event.step for event in events.Scalars("val/loss")
    ]
    assert len(events.Scalars("val/acc")) == 3
    assert {"config/text_summary", "data/text_summary", "custom_scalars__config__"} <= set(tags["tensors"])
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "max_epochs: 3" in config
    assert tags["graph"]


def test_the_best_checkpoint_has_the_best_validation_accuracy(run_dir: Path) -> None:
    events = EventAccumulator(str(run_dir))
    events.Reload()
    accuracies = {event.step: event.value for event in events.Scalars("val/acc")}
    best = load_checkpoint(run_dir / "checkpoints" / "best.ckpt")
    assert accuracies[best["global_step"] - 1] == max(accuracies.values())


def test_the_score_is_of_the_monitor_where_the_checkpoint_goes_by_another(tmp_path: Path) -> None:
    cfg = compose_cfg(
        tmp_path, "data=mnist5k", "trainer=cpu", "trainer.max_epochs=1", "test=false", "logger=[]",
        "callbacks=minimal", "callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min",
        "callbacks.progress=null",
    )  # fmt: skip
    metrics = train(cfg)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["best"]["score"] == metrics["val/acc"]


def test_without_a_monitor_the_last_epochs_weights_are_kept_and_tested(tmp_path: Path) -> None:
    cfg = compose_cfg(
        tmp_path, "data=mnist5k", "trainer=cpu", "trainer.max_epochs=2", "scheduler=[]", "logger=[]",
        "callbacks=minimal", "callbacks.checkpoint.monitor=null", "callbacks.progress=null",
        "mode=min",  # by the monitor the first epoch would be kept
    )  # fmt: skip
    metrics = train(cfg)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    kept, last = (load_checkpoint(tmp_path / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert kept["epoch"] == 1
    assert all(torch.equal(kept["state_dict"][name], last["state_dict"][name]) for name in last["state_dict"])
    assert record["best"]["score"] == metrics["val/acc"]
    assert "test/acc" in metrics


@pytest.mark.slow
def test_runs_started_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "src.train", "data=mnist5k", "debug=fast", "trainer=cpu", "logger=[]"]
    environment = {**os.environ, "PROJECT_ROOT": str(tmp_path)}
    time.sleep(1 - time.time() % 1)
    runs = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(3)
    ]
    assert [process.wait() for process in runs] == [0, 0, 0]
    assert len(list(tmp_path.glob("logs/train/*/metrics.json"))) == 3


def test_a_full_disk_is_said(mount_disk: Callable[[str], Path]) -> None:
    disk = mount_disk("300k")
    result = forks.run_command(
        "train", "data=mnist5k", "trainer.max_epochs=1", "trainer=cpu", f"hydra.run.dir={disk}/run"
    )
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(disk.glob("run/checkpoints/*")) == []


@pytest.mark.gpu
@pytest.mark.parametrize("override", ["trainer=gpu", "accelerator=gpu"])
def test_trains_on_a_gpu(override: str, tmp_path: Path) -> None:
    result = run_command("train", "data=mnist5k", "trainer.max_epochs=3", override, PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 0, result.stderr
    (record,) = tmp_path.glob("logs/train/*/metrics.json")
    assert json.loads(record.read_text())["metrics"]["test/acc"] > 0.9
