"""What can go wrong in a run, as callbacks for the tests, and as a net."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from tests.engine.tiny import TinyNet
from tests.processes import wait_until


class FailAt(Callback):
    """Raises within a step, where out of memory would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError(f"step {self.step} fails")


class KillAt(Callback):
    """Kills its process after some steps: before the next one, or at the end of the validation."""

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
    """Fills a disk up after some steps."""

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


class HoldSecond(Callback):
    """Holds the second process in the second epoch, as a fault of the network or of a disk would."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        while trainer.current_epoch == 1 and trainer.global_rank == 1:
            time.sleep(0.1)


class FailSecond(Callback):
    """Fails in the second process, in the second epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1 and trainer.global_rank == 1:
            raise ValueError("the second process fails")


class SlowValidation(Callback):
    """Takes five seconds for a batch of validation, and says when it begins."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            print("validates", flush=True)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if not trainer.sanity_checking:
            time.sleep(5)


class HeldNet(TinyNet):
    """Waits in a test, as long as HOLD_TEST is in the environment, and says so."""

    def forward(self, rows: Tensor) -> Tensor:
        if "HOLD_TEST" in os.environ:
            print("tests", flush=True)
            time.sleep(600)
        logits: Tensor = super().forward(rows)
        return logits
