"""What can go wrong in a step of training, as callbacks for the tests."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from tests.processes import wait_until


class FailAt(Callback):
    """Raises within a step, where out of memory would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError(f"step {self.step} fails")


class KillAt(Callback):
    """Kills its process behind some steps: ahead of the next one, or at the end of the validation."""

    def __init__(self, step: int, in_validation: bool = False) -> None:
        self.step = step
        self.in_validation = in_validation

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, idx: int) -> None:
        if trainer.global_step == self.step and not self.in_validation:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.step and self.in_validation:
            os.kill(os.getpid(), signal.SIGKILL)


class FillDiskAt(Callback):
    """Fills a disk up behind some steps."""

    def __init__(self, step: int, path: str) -> None:
        self.step = step
        self.path = Path(path)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, idx: int) -> None:
        if trainer.global_step == self.step:
            with suppress(OSError), self.path.open("wb", buffering=0) as file:
                while file.write(bytes(1024)):
                    pass


class WaitAt(Callback):
    """Waits in a step until a file is there, and says so."""

    def __init__(self, step: int, path: str) -> None:
        self.step = step
        self.path = Path(path)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, idx: int) -> None:
        if trainer.global_step == self.step:
            print(f"waiting in {trainer.default_root_dir}", flush=True)
            wait_until(self.path.exists, seconds=300)


class SlowAt(Callback):
    """Takes its time for a step, and says so."""

    def __init__(self, step: int, seconds: float) -> None:
        self.step = step
        self.seconds = seconds

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, idx: int) -> None:
        if trainer.global_step == self.step:
            print(f"slow step in {trainer.default_root_dir}", flush=True)
            time.sleep(self.seconds)
