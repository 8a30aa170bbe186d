"""The test command: finds the run, reads the rest from its checkpoint, writes what it shows."""

import json
from pathlib import Path

import pytest
import torch

from src.data.mnist import MNISTDataModule
from src.data.sources import read_package
from src.engine.runs.build import restore, restore_datamodule
from src.train import train
from tests.compose import compose_cfg
from tests.forks import run_command


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
    train(compose_cfg(root / "logs/train/old", *common, "trainer.max_epochs=1", "trainer.limit_train_batches=2"))
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
    result = run_command("test", f"ckpt_path={checkpoint}", f"hydra.run.dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["checkpoint"] == str(checkpoint)


def test_the_test_split_is_the_one_that_training_left_out(root: Path) -> None:
    datamodule = restore_datamodule(root / "logs/train/new/checkpoints/best.ckpt")
    datamodule.setup("test")
    assert isinstance(datamodule, MNISTDataModule)
    splits = {name: {image.numpy().tobytes() for image in split.images} for name, split in datamodule.splits.items()}
    assert not splits["test"] & (splits["train"] | splits["val"])
    assert set.union(*splits.values()) == {image.numpy().tobytes() for image in read_package().images}


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
