"""The model learns the data; its checkpoint can be tested."""

from pathlib import Path

import pytest
from sklearn.datasets import load_digits
from src.data.digits import Digits

from src.engine.runs.evaluate import test_checkpoint as run_test
from src.train import train
from tests.compose import compose_cfg


def test_each_image_is_in_one_split() -> None:
    data = Digits()
    data.setup()
    indices = [index for split in data.splits for index in split.indices]
    assert sorted(indices) == list(range(len(load_digits().target)))


def test_three_epochs_learn_the_digits_and_the_checkpoint_keeps_them(tmp_path: Path) -> None:
    cfg = compose_cfg(tmp_path, "trainer=cpu", "trainer.max_epochs=3", "callbacks=minimal", "logger=[]")
    metrics = train(cfg)
    assert metrics["test/acc"] > 0.8
    again = run_test(tmp_path / "checkpoints" / "best.ckpt", tmp_path / "again", cfg.accelerator)
    assert again["metrics"]["test/acc"] == pytest.approx(metrics["test/acc"])
