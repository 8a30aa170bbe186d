"""When a Lightning run has got how far."""

import os
import resource
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class Clock(Callback):
    """Writes the seconds since 1970 of the first step and of each epoch's validation to a file, and the peak memory.

    Args:
        path: The file.
        ends: Whether the first step ends the process.
    """

    def __init__(self, path: str, ends: bool = False) -> None:
        self.path = Path(path)
        self.ends = ends

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, index: int
    ) -> None:
        """Behind the first optimizer step, write that."""
        if trainer.global_step == 1:
            self._write("step", time.time())
            if self.ends:
                os._exit(0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write that an epoch is over, but for what follows its validation: from one to the next all is in it."""
        if not trainer.sanity_checking:
            self._write("epoch", time.time())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the peak of memory so far."""
        self._write("peak", get_peak())

    def _write(self, what: str, value: float) -> None:
        with self.path.open("a") as file:
            file.write(f"{what} {value}\n")


def get_peak() -> float:
    """This process's peak of resident memory so far, in MB; torch's end takes another 100, with all sides."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
