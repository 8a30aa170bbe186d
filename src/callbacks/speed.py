"""How fast the training is."""

import time

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback


class Speed(Callback):
    """Logs ``train/images_per_second`` of every epoch: images trained on, by the seconds of its training batches."""

    def __init__(self) -> None:
        self.rates: list[float] = []  # of the epochs so far
        self._start = 0.0
        self._images = 0

    def state_dict(self) -> dict[str, list[float]]:
        """The rates, for a run that goes on."""
        return {"rates": self.rates}

    def load_state_dict(self, state_dict: dict[str, list[float]]) -> None:
        """Go on with the rates of a checkpoint."""
        self.rates = list(state_dict["rates"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, in the midst of an epoch where the run goes on there."""
        self._start, self._images = time.perf_counter(), 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start, self._images = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: tuple, batch_idx: int
    ) -> None:
        """Count the batch's images; stop the clock behind the last batch, ahead of validation."""
        self._images += len(batch[1])
        if trainer.is_last_batch:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()  # once an epoch: the GPU works behind the CPU's back
            self.rates.append(trainer.world_size * self._images / (time.perf_counter() - self._start))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the rate."""
        pl_module.log("train/images_per_second", self.rates[-1], sync_dist=True)
