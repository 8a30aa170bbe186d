"""LeNet-5 learns real digits, and a run shows what it is and how it does."""

import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import compose
from tests.engine.equality import scalars
from tests.forks import run_command


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs over the package's digits, by the command."""
    root = tmp_path_factory.mktemp("root")
    result = run_command("train", "data=mnist5k", "trainer.max_epochs=3", "trainer=cpu", PROJECT_ROOT=str(root))
    assert result.returncode == 0, result.stderr
    (folder,) = (root / "logs" / "train").iterdir()
    (folder / "stdout").write_text(result.stdout)
    return folder


def test_learns_real_digits(run_dir: Path) -> None:
    metrics = json.loads((run_dir / "metrics.json").read_text())["metrics"]
    assert metrics["test/acc"] > 0.9  # 0.95 over many seeds; chance is 0.1
    assert metrics["val/acc"] > 0.9


def test_records_and_shows_the_data(run_dir: Path) -> None:
    assert json.loads((run_dir / "metrics.json").read_text())["data"] == {
        "source": "package",
        "num_images": {"train": 4000, "val": 500, "test": 500},
        "image_size": [28, 28],
        "fingerprint": "crc32:5d9c45cd",  # the package never changes, nor do its splits
    }
    assert "package: 4,000 train, 500 val, 500 test" in (run_dir / "stdout").read_text()


def test_shows_the_models_shapes(run_dir: Path) -> None:
    stdout = (run_dir / "stdout").read_text()
    assert re.search(r"net\.c3 .*Conv2d .* 2\.4 K ", stdout)
    assert re.search(r"net\.f6 .*Linear .* 10\.2 K .* \[1, 84\] ", stdout)
    assert "61,706 parameters" in stdout
    assert "Counts" not in stdout  # metrics have no weights


def test_tensorboard_holds_the_curves_text_and_graph(run_dir: Path) -> None:
    pytest.importorskip("src.callbacks.description")
    curves = scalars(run_dir)
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "train/lr"} <= curves.keys()
    assert [step for step, _ in curves["train/loss"]] == [step for step, _ in curves["val/loss"]]
    assert len(curves["val/acc"]) == 3
    events = EventAccumulator(str(run_dir))
    events.Reload()
    tags = events.Tags()
    assert {"config/text_summary", "data/text_summary", "custom_scalars__config__"} <= set(tags["tensors"])
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "max_epochs: 3" in config
    assert tags["graph"]


@pytest.mark.gpu
@pytest.mark.parametrize("override", ["trainer=gpu", "accelerator=gpu"])
def test_trains_on_a_gpu(override: str, tmp_path: Path) -> None:
    arguments = ("data=mnist5k", "trainer.max_epochs=3", override)
    result = compose.run_command("train", *arguments, PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 0, result.stderr
    (record,) = tmp_path.glob("logs/train/*/metrics.json")
    assert json.loads(record.read_text())["metrics"]["test/acc"] > 0.9


def test_a_run_whose_loss_is_not_finite_ends_at_once(tmp_path: Path) -> None:
    small = ("data=mnist5k", "trainer=cpu", "trainer.limit_train_batches=6", "callbacks=minimal", "optimizer.lr=1e30")
    result = run_command("train", *small, PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    assert "error: the training loss is nan in epoch 1, by step 6: try a lower optimizer.lr" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("logs/train/*/metrics.json"))
