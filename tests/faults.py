"""What can go wrong in a step of training, as callbacks for the tests."""

import os
import signal
import time

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class FailAt(Callback):
    """Raises within a step, where out of memory would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError(f"step {self.step} fails")


class KillAt(Callback):
    """Kills its process ahead of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class SlowAt(Callback):
    """Takes its time for a step, and says so."""

    def __init__(self, step: int, seconds: float) -> None:
        self.step = step
        self.seconds = seconds

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, idx: int) -> None:
        if trainer.global_step == self.step:
            print(f"slow step in {trainer.default_root_dir}", flush=True)
            time.sleep(self.seconds)
