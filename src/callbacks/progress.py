"""What a run shows while it goes on."""

import logging
import os
import sys
import time

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar

log = logging.getLogger(__name__)


def make_progress(refresh_rate: int = 50) -> ProgressBar:
    """A Rich progress bar on a terminal, else, and under CI, one plain line an epoch.

    Args:
        refresh_rate: Batches between two updates of the bar; an update costs a third of a millisecond.
    """
    if sys.stdout.isatty() and not os.environ.get("CI"):
        return RichProgressBar(refresh_rate=refresh_rate, leave=True)
    return EpochLines()


class EpochLines(ProgressBar):
    """Logs one line an epoch with its metrics; for files, pipes and CI."""

    def __init__(self) -> None:
        super().__init__()
        self._start = 0.0
        self._enabled = True

    def disable(self) -> None:
        """Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """The opposite of disable."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, in the midst of an epoch where the run goes on there."""
        self._start = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say the epoch's metrics; they are complete, since the validation comes before."""
        if not self._enabled:
            return
        metrics = {name: value for name, value in trainer.callback_metrics.items() if name.count("/") == 1}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()) if "per_second" not in name)
        seconds = time.perf_counter() - self._start
        log.info(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {shown}  {seconds:.1f} s")
