"""The line an epoch: all metrics that any module logged in it, and no others."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader

from src.callbacks.progress import EpochLines, make_progress
from src.callbacks.speed import Speed
from src.data.loader import BatchLoader
from src.engine.runs.last_checkpoint import LastCheckpoint
from tests.callbacks.tasks import Plain, make_images, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


class Talker(Plain):
    """Logs in every place that Lightning knows; the epoch's number, mostly."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", self.current_epoch + 0.5, on_step=True, on_epoch=True)
        if self.current_epoch == 0:
            self.log("warm/up", 1e-6)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val/acc", self.current_epoch + dataloader_idx / 10)

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", 123_456.0)

    def on_train_epoch_end(self) -> None:
        self.log("train/acc", torch.tensor(self.current_epoch + 0.25))


def lines(folder: Path, caplog: pytest.LogCaptureFixture, module: pl.LightningModule, **arguments: Any) -> list[str]:
    """The lines of a run with two validation loaders, without their seconds."""
    train, *validation = (DataLoader(make_images(24, drawn_by=seed), 8) for seed in range(3))
    trainer = make_trainer(folder, [Speed(), EpochLines()], enable_progress_bar=True, **arguments)
    with caplog.at_level(logging.INFO, logger="src"):
        trainer.fit(module, train, validation)
    found = [record.getMessage() for record in caplog.records if record.name == "src.callbacks.progress"]
    assert all(re.search(r"  \d+\.\d s$", line) for line in found)
    return [line.rpartition("  ")[0] for line in found]


def test_a_line_has_whatever_was_logged_in_its_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = lines(tmp_path, caplog, Talker(), max_epochs=4, check_val_every_n_epoch=2, num_sanity_val_steps=1)
    first, second = (
        f"val/acc/dataloader_idx_0 {epoch}.0000  val/acc/dataloader_idx_1 {epoch}.1000  val_loss 1.235e+05"
        for epoch in (1, 3)
    )
    assert found == [
        "epoch 1/4  train/acc 0.2500  train_loss 0.5000  warm/up 1e-06",
        f"epoch 2/4  train/acc 1.2500  train_loss 1.5000  {first}",
        "epoch 3/4  train/acc 2.2500  train_loss 2.5000",
        f"epoch 4/4  train/acc 3.2500  train_loss 3.5000  {second}",
    ]


@pytest.mark.parametrize("max_epochs", [-1, None])
def test_a_run_of_some_steps_has_no_number_of_epochs(
    max_epochs: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = lines(tmp_path, caplog, Talker(), max_epochs=max_epochs, max_steps=5)
    assert [line.partition("  ")[0] for line in found] == ["epoch 1", "epoch 2"]
    assert "train/acc 1.2500  train_loss 1.5000" in found[1]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_line_of_a_resumed_epoch_lacks_what_an_earlier_one_has_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 4:
                raise KeyError

    def fit(*callbacks: Callback, **arguments: Any) -> None:
        images, labels = make_images(24, drawn_by=0).tensors
        loader = BatchLoader(images, labels, 8)
        last = LastCheckpoint(str(tmp_path), every_n_steps=1)
        trainer = make_trainer(
            tmp_path,
            [EpochLines(), last, *callbacks],
            max_epochs=2,
            enable_progress_bar=True,
            enable_checkpointing=True,
        )
        trainer.fit(Talker(), loader, loader, **arguments)

    with pytest.raises(KeyError):
        fit(Stop())
    with caplog.at_level(logging.INFO, logger="src"):
        fit(ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    (line,) = (record.getMessage() for record in caplog.records if record.name == "src.callbacks.progress")
    assert line.startswith("epoch 2/2  train/acc 1.2500  train_loss 1.5000  val/acc 1.0000  val_loss 1.235e+05  ")


def test_an_epoch_without_metrics_has_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert lines(tmp_path, caplog, Plain()) == ["epoch 1/1"]


def test_other_processes_say_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    class Other(EpochLines):
        def enable(self) -> None:
            """As Lightning leaves it in all processes but the first."""

    other = Other()
    other.disable()
    loader = DataLoader(make_images(24, drawn_by=0), 8)
    with caplog.at_level(logging.INFO, logger="src"):
        make_trainer(tmp_path, [other], enable_progress_bar=True).fit(Plain(), loader, loader)
    assert "epoch 1/1" not in caplog.text


def test_pipes_get_lines() -> None:
    assert isinstance(make_progress(), EpochLines)  # pytest's output is no terminal
