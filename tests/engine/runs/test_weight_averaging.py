"""Averaged weights: those computed by hand, tested as they are, and resumed."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from src.engine.runs.build import build_datamodule, build_module, load_checkpoint, restore, restore_datamodule
from src.engine.runs.trainer import build_trainer
from src.train import train
from tests.engine.equality import assert_equal
from tests.engine.tiny import TinyTask, compose_tiny

AVERAGING = ("callbacks=[minimal,weight_averaging]", "callbacks.weight_averaging.decay=0.8", "trainer.max_epochs=2")


class Recorder(Callback):
    """The weights before the training and after each step, each in a row."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights.append(torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()]))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.on_train_start(trainer, pl_module)


def test_averaged_weights_are_those_computed_by_hand(tmp_path: Path) -> None:
    cfg = compose_tiny(tmp_path, *AVERAGING)
    trainer, recorder = build_trainer(cfg), Recorder()
    trainer.callbacks.insert(0, recorder)  # type: ignore[attr-defined]
    trainer.fit(build_module(cfg), build_datamodule(cfg))
    _, average, *others = recorder.weights
    for weights in others:
        average = 0.8 * average + 0.2 * weights
    state = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    found = torch.cat([tensor.flatten() for tensor in state.values()])
    torch.testing.assert_close(found, average, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, recorder.weights[-1], rtol=1e-3)


class MadeInSetup(TinyTask):
    """Makes its last layer in setup."""

    def setup(self, stage: str) -> None:
        self.late = nn.Linear(2, 2)

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.late(self.net(rows))
        return logits


LATE = f"model._target_={__name__}.MadeInSetup"


@pytest.mark.parametrize("more", [(), (LATE,)])
def test_averaged_weights_are_tested(more: tuple[str, ...], tmp_path: Path) -> None:
    metrics = train(compose_tiny(tmp_path, *AVERAGING, *more))
    best = tmp_path / "checkpoints" / "best.ckpt"
    tester = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    (again,) = tester.test(restore(best), restore_datamodule(best), verbose=False)
    assert again["test/loss"] == pytest.approx(metrics["test/loss"])
    assert again["test/acc"] == metrics["test/acc"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as the command ignores it
@pytest.mark.parametrize("more", [(), (LATE,)])
def test_a_resumed_run_continues_the_average(more: tuple[str, ...], tmp_path: Path) -> None:
    arguments = (*AVERAGING[:2], "test=false", *more)
    train(compose_tiny(tmp_path / "whole", *arguments, "trainer.max_epochs=2"))
    train(compose_tiny(tmp_path / "first", *arguments, "trainer.max_epochs=1"))
    path = tmp_path / "first" / "checkpoints" / "last.ckpt"
    train(compose_tiny(tmp_path / "second", *arguments, "trainer.max_epochs=2", f"ckpt_path={path}"))
    one, other = (load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "second"))
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert_equal(one[key], other[key])
    assert one["state_dict"].keys() == one["current_model_state"].keys()
