"""What a run shows while it trains."""

import logging
import sys
import time

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar
from torch import Tensor

from src.callbacks.speed import RATES

log = logging.getLogger(__name__)


def make_progress(refresh_rate: int = 50, ci: str | None = None) -> ProgressBar:
    """A Rich progress bar on a terminal; elsewhere, and in CI, one plain line an epoch.

    Args:
        refresh_rate: Batches between two updates of the bar; an update costs a third of a millisecond.
        ci: What the environment variable CI says; the terminals of CI, where it is set, get lines.
    """
    if sys.stdout.isatty() and not ci:
        return RichProgressBar(refresh_rate=refresh_rate, leave=True)
    return EpochLines()


class EpochLines(ProgressBar):
    """Logs a line an epoch with all metrics that were logged in it, by a module or a callback, but for ``Speed``."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._start = 0.0
        self._ended: tuple[int, float] | None = None  # the epoch that has no line yet: its number and seconds
        self._before: dict[str, Tensor] | None = None  # the metrics when the last line was logged

    def disable(self) -> None:
        """Lightning calls this in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """The opposite of disable."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; a resumed run may start in the middle of an epoch."""
        self._start = time.perf_counter()
        self._before = None if trainer.fit_loop.is_resuming else {}

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        """Of a resumed run, the metrics so far are those of earlier epochs."""
        if self._before is None:
            self._before = dict(trainer.callback_metrics)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the line of the epoch before, and start the clock."""
        self._log_line(trainer)
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock; the module may still log metrics in its own hook, which comes after this one."""
        self._ended = trainer.current_epoch + 1, time.perf_counter() - self._start

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the line of the last epoch."""
        self._log_line(trainer)

    def _log_line(self, trainer: pl.Trainer) -> None:
        if self._ended is None:
            return
        (number, seconds), self._ended = self._ended, None
        before, self._before = self._before or {}, dict(trainer.callback_metrics)
        # Lightning keeps the metrics of all epochs, and replaces those that are logged anew.
        metrics = {name: float(value) for name, value in self._before.items() if value is not before.get(name)}
        # One that is logged by step and epoch is there three times: loss, loss_step, loss_epoch.
        twice = {f"{name}_{suffix}" for name in metrics for suffix in ("step", "epoch")}
        shown = [f"{name} {_show(metrics[name])}" for name in sorted(metrics.keys() - twice - set(RATES))]
        total = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        if self._enabled:
            log.info("  ".join([f"epoch {number}{total}", *shown, f"{seconds:.1f} s"]))


def _show(value: float) -> str:
    """Four decimals, unless the value is too large or too small for them."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
