"""The test command: finds the run, reads the rest from its checkpoint, writes what it shows."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from src.data.mnist import MNISTDataModule
from src.data.sources import read_package
from src.engine.errors import ConfigError
from src.engine.runs.build import restore, restore_datamodule
from src.test import test as run_test
from src.train import train
from tests.compose import compose_cfg
from tests.engine.tiny import TinyData, TinyTask, compose_tiny
from tests.forks import run_command

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project root with two runs; the newer one has other data settings than the defaults."""
    root = tmp_path_factory.mktemp("root")
    common = (
        "data=mnist5k",
        "trainer=cpu",
        "callbacks=minimal",
        "logger=[]",
        "trainer.log_every_n_steps=1",
        "test=false",
    )
    names = f"data.classes=[{','.join(NAMES)}]"
    short = ("trainer.max_epochs=1", "trainer.limit_train_batches=2")
    train(compose_cfg(root / "logs/train/old", *common, *short, names))
    train(compose_cfg(root / "logs/train/new", *common, "trainer.max_epochs=1", "data.split_seed=5", "seed=3"))
    return root


def test_tests_the_newest_run_without_its_overrides(root: Path) -> None:
    result = run_command("test", "accelerator=cpu", PROJECT_ROOT=str(root))
    assert result.returncode == 0, result.stderr
    (path,) = root.glob("logs/test/*/metrics.json")
    record = json.loads(path.read_text())
    checkpoint = root / "logs/train/new/checkpoints/best.ckpt"
    assert record["checkpoint"] == str(checkpoint)
    assert record["data"]["num_images"]["test"] == 500

    datamodule = restore_datamodule(checkpoint)
    datamodule.setup("test")
    module = restore(checkpoint)
    with torch.no_grad():
        batches = [datamodule.on_after_batch_transfer(batch, 0) for batch in datamodule.test_dataloader()]
        predicted = torch.cat([module(images).argmax(dim=1) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert record["metrics"]["test/acc"] == pytest.approx((predicted == labels).float().mean().item())
    assert [sum(row) for row in record["confusion"]] == [50] * 10
    for digit in range(10):
        expected = (predicted[labels == digit] == digit).float().mean().item()
        assert record["class_accuracy"][digit] == pytest.approx(expected)
    assert "confusion matrix" in result.stdout
    assert f"{record['class_accuracy'][3]:.4f}" in result.stdout


def test_tests_the_checkpoint_that_is_named(root: Path, tmp_path: Path) -> None:
    checkpoint = root / "logs/train/old/checkpoints/last.ckpt"
    result = run_command("test", f"ckpt_path={checkpoint}", f"hydra.run.dir={tmp_path}", PROJECT_ROOT=str(root))
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["checkpoint"] == str(checkpoint)
    assert record["classes"] == NAMES  # its data's
    assert all(name in result.stdout for name in NAMES)


def test_the_test_split_is_the_one_that_training_left_out(root: Path) -> None:
    datamodule = restore_datamodule(root / "logs/train/new/checkpoints/best.ckpt")
    datamodule.setup("test")
    assert isinstance(datamodule, MNISTDataModule)
    splits = {name: {image.numpy().tobytes() for image in split.images} for name, split in datamodule.splits.items()}
    assert not splits["test"] & (splits["train"] | splits["val"])
    assert set.union(*splits.values()) == {image.numpy().tobytes() for image in read_package().images}


class TwoSets(TinyData):
    """Two test loaders of dicts."""

    def test_dataloader(self) -> Any:
        splits = [torch.randn(20, 4, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
        samples: Any = [[{"rows": row} for row in rows] for rows in splits]
        return [DataLoader(each, batch_size=20) for each in samples]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch if isinstance(batch, dict) else super().on_after_batch_transfer(batch, dataloader_idx)


class Regressor(TinyTask):
    """No classifier: its one metric has a name of its own."""

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("sum_mae", (self(batch["rows"])[:, 0] - batch["rows"].sum(dim=1)).abs().mean(), batch_size=20)


class Untested(TinyTask):
    test_step = pl.LightningModule.test_step  # type: ignore[assignment]


def train_and_test(folder: Path, model: str, data: str = "engine.tiny.TinyData") -> dict[str, Any]:
    nodes = (f"model._target_=tests.{model}", f"data._target_=tests.{data}")
    train(compose_tiny(folder / "run", *nodes, "trainer.max_epochs=1", "test=false"))
    checkpoint = f"ckpt_path={folder}/run/checkpoints/last.ckpt"
    (folder / "test").mkdir()
    return run_test(compose_cfg(folder / "test", checkpoint, "accelerator=cpu", config_name="test"))


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_whatever_a_module_logs_is_shown_for_each_loader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train_and_test(tmp_path, "test_test.Regressor", "test_test.TwoSets")
    module = restore(tmp_path / "run/checkpoints/last.ckpt")
    said = capsys.readouterr().out
    assert result["confusion"] is None
    for index, seed in enumerate((2, 3)):
        rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = (module(rows)[:, 0] - rows.sum(dim=1)).abs().mean().item()
        name = f"sum_mae/dataloader_idx_{index}"
        assert result["metrics"][name] == pytest.approx(expected, rel=1e-5)
        assert f"{name} │ {expected:.4f}" in said
    for word in ("confusion", "class", "?", "data "):
        assert word not in said


def test_a_module_without_a_test_step_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Untested has no test_step: there is nothing to test$"):
        train_and_test(tmp_path, "test_test.Untested")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ckpt_path=nowhere.ckpt"], "ckpt_path=nowhere.ckpt: no such file"),
        ([], "train first (python -m src.train)"),
    ],
)
def test_a_missing_checkpoint_is_said(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run_command("test", *arguments, PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_checkpoint_is_said(root: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes((root / "logs/train/new/checkpoints/best.ckpt").read_bytes()[:100_000])
    result = run_command("test", f"ckpt_path={truncated}", PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    assert "not a checkpoint, or a truncated one" in result.stderr
