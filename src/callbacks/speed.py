"""How fast the training is, and at which learning rate."""

import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from src.callbacks.pictures import logged_step

RATE = "train/samples_per_second"


class LearningRate(Callback):
    """Logs ``train/lr`` every ``trainer.log_every_n_steps`` steps, of all optimizers and their groups.

    A group with a ``name`` has it in its place, ``train/lr/<name>``; of others the second is ``train/lr_2``, and so on.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Log the rates of this step's optimizer."""
        step = logged_step(trainer)
        if step is None:
            return
        groups = [group for each in trainer.optimizers for group in each.param_groups]
        names = {id(group): f"train/lr{f'_{number}' * (number > 1)}" for number, group in enumerate(groups, 1)}
        names |= {id(group): f"train/lr/{group['name']}" for group in groups if "name" in group}
        rates = {names[id(group)]: float(group["lr"]) for group in optimizer.param_groups if "lr" in group}
        for logger in trainer.loggers:
            logger.log_metrics(rates, step)


class Speed(Callback):
    """Logs the samples that an epoch trained on, by the seconds of its training batches.

    The seconds have no validation in them, wherever in the epoch it comes. An epoch that ends early has the rate up to
    its end. Where the size of the batches is unknown, nothing is logged.
    """

    def __init__(self) -> None:
        self.rates: list[float] = []  # of the epochs since the start or a resume
        self._read = 0.0  # when the clock was last read
        self._seconds = 0.0
        self._samples = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; a resumed run may start in the middle of an epoch."""
        self._read, self._seconds, self._samples = time.perf_counter(), 0.0, 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch's samples and seconds."""
        self._samples += measure(batch)
        self._read_clock(pl_module, trainer.is_last_batch or trainer.global_step == trainer.max_steps)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count what a GPU is still computing."""
        self._read_clock(pl_module, True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from here on."""
        self._read = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the rate; there is none if the epoch had no batch."""
        if self._samples:
            self.rates.append(trainer.world_size * self._samples / self._seconds)
            pl_module.log(RATE, self.rates[-1], sync_dist=True, batch_size=1)

    def _read_clock(self, pl_module: pl.LightningModule, is_exact: bool) -> None:
        if is_exact and pl_module.device.type == "cuda":
            torch.cuda.synchronize()  # not at every batch: the GPU works while the CPU goes ahead
        now = time.perf_counter()
        self._seconds += now - self._read
        self._read = now


def measure(batch: Any) -> int:
    """The number of samples of a batch of any kind, 0 if unknown: the length of its first tensor.

    A batch of graphs has their number in ``num_graphs``.
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    if isinstance(num_graphs := getattr(batch, "num_graphs", None), int):
        return num_graphs
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next(filter(None, map(measure, parts)), 0)
