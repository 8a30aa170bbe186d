"""How fast the training is."""

import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from src.callbacks.writers import count_images


class Speed(Callback):
    """Logs ``train/images_per_second`` of every epoch: images trained on, by the seconds of its training batches.

    Validation is not in them, wherever in the epoch it comes. An epoch that ends early has the rate up to its end.
    """

    def __init__(self) -> None:
        self.rates: list[float] = []  # of the epochs so far
        self._rate: float | None = None  # of this epoch, when its last batch has come
        self._read = 0.0  # when the clock was last read
        self._seconds = 0.0
        self._images = 0

    def state_dict(self) -> dict[str, list[float]]:
        """The rates, for a run that goes on."""
        return {"rates": self.rates}

    def load_state_dict(self, state_dict: dict[str, list[float]]) -> None:
        """Go on with the rates of a checkpoint."""
        self.rates = list(state_dict["rates"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, in the midst of an epoch where the run goes on there."""
        self._read, self._seconds, self._images, self._rate = time.perf_counter(), 0.0, 0, None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch's images and seconds; the rate is taken behind the last batch, ahead of validation."""
        self._images += count_images(batch)
        is_last = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        self._read_clock(pl_module, is_last)
        if is_last:
            self._add_rate(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count what a GPU is still at work on."""
        if pl_module.device.type == "cuda":
            self._read_clock(pl_module, True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from here on."""
        self._read = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the rate; there is none where the epoch had no batch."""
        self._add_rate(trainer)  # of an epoch that was stopped ahead of its last batch
        if self._rate is not None:
            pl_module.log("train/images_per_second", self._rate, sync_dist=True)

    def _read_clock(self, pl_module: pl.LightningModule, is_exact: bool) -> None:
        if is_exact and pl_module.device.type == "cuda":
            torch.cuda.synchronize()  # not at every batch: the GPU works behind the CPU's back
        now = time.perf_counter()
        self._seconds += now - self._read
        self._read = now

    def _add_rate(self, trainer: pl.Trainer) -> None:
        if self._images:
            self._rate = trainer.world_size * self._images / self._seconds
            self.rates.append(self._rate)
            self._images = 0
