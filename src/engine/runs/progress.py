"""What a run shows in the terminal while it trains."""

import logging
import math
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import callbacks
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics import Metric, MetricCollection

log = logging.getLogger(__name__)

REDRAWN = 0.25  # seconds between two updates of the bar; one takes some 0.2 ms
BAR = 8  # columns of the bar
RATES = "per_second"  # so end metrics that a line leaves out: it has the seconds


class Progress(callbacks.ProgressBar):
    """Logs a line an epoch with all metrics that were logged in it; on a terminal a bar stands below.

    A run that ends by its steps has a line every tenth of them, too. The bar has the metrics of the step, or the loss
    that the training step returned, then those of the last validation, as many as there is room for. A module may name
    figures of the epoch so far, which then come first, by a method ``running_metrics`` that returns a dict of scalars;
    it is called in the first process only.

    Args:
        ci: What the environment variable CI says; the terminals of CI, where it is set, have no bar.
    """

    def __init__(self, ci: str | None = None) -> None:
        super().__init__()
        self._has_bar = sys.stderr.isatty() and not ci
        self.is_enabled = True  # as Lightning's own bars have it: self.print asks for it
        self._start = self._drawn = 0.0  # when the epoch began, and when the bar was last drawn
        self._length = 0  # of the bar on the terminal
        self._first: tuple[float, float] | None = None  # when the first batch ended, and how much was done then
        self._tenth = 0  # of the steps that have a line
        self._ended: tuple[str, float] | None = None  # the epoch that has no line yet: its label and seconds
        self._before: dict[str, Tensor] | None = None  # the metrics when the last line was logged

    def disable(self) -> None:
        """Lightning calls this in all processes but the first."""
        self.is_enabled = False

    def enable(self) -> None:
        """The opposite of disable."""
        self.is_enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print what a module says by ``self.print``, in the place of the bar."""
        self.teardown()
        super().print(*args, **kwargs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; a resumed run may start in the middle of an epoch."""
        done = find_place(trainer, 0)[2]
        self._start, self._first, self._tenth = time.perf_counter(), None, 0 if math.isnan(done) else int(10 * done)
        self._before = None if trainer.fit_loop.is_resuming else {}

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        """Of a resumed run, the metrics so far are those of earlier epochs."""
        if self._before is None:
            self._before = dict(trainer.callback_metrics)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the line of the epoch before, and start the clock."""
        self.on_train_end(trainer, pl_module)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw the bar if it is time."""
        label, share, done = find_place(trainer, batch_idx + 1)
        if label.startswith("step") and self._tenth < int(10 * done) < 10:
            self._tenth = int(10 * done)
            self._write(trainer, label, self._running(trainer, pl_module, outputs), time.perf_counter() - self._start)
        now = time.perf_counter()
        self._first = self._first or (now, done)
        if self._is_due():
            gain = done - self._first[1]
            left = (now - self._first[0]) * (1 - done) / gain if gain > 0 else math.nan
            self._draw(label, share, self._running(trainer, pl_module, outputs), left)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock; the module may still log metrics in its own hook, which comes after this one."""
        self._ended = find_place(trainer, 0)[0], time.perf_counter() - self._start

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the line of the last epoch."""
        if self._ended is not None:
            (label, seconds), self._ended = self._ended, None
            self._write(trainer, label, _shown(dict(sorted(self._fresh(trainer).items()))), seconds)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Draw how far a validation is; the arguments are module, outputs, batch, its index and its loader's."""
        if self._is_due():
            self._draw("validation", (args[3] + 1) / trainer.num_val_batches[args[4] if len(args) > 4 else 0])

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """The same of a test."""
        if self._is_due():
            self._draw("test", (args[3] + 1) / trainer.num_test_batches[args[4] if len(args) > 4 else 0])

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Remove the bar."""
        if self._length:
            sys.stderr.write(f"\r{' ' * self._length}\r")
            sys.stderr.flush()
        self._length = 0

    on_exception = teardown  # the error gets a line of its own

    def _write(self, trainer: pl.Trainer, label: str, metrics: Iterable[str], seconds: float) -> None:
        self._before = dict(trainer.callback_metrics)
        if self.is_enabled:
            self.teardown()
            log.info("  ".join([label, *metrics, f"{seconds:.1f} s"]))

    def _fresh(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        """The metrics that were logged since the last line.

        Lightning keeps the metrics of all epochs, and replaces those that are logged anew. One that is logged by step
        and epoch is there three times: loss, loss_step, loss_epoch.
        """
        before, now = self._before or {}, trainer.callback_metrics
        metrics = {k: v for k, v in now.items() if v is not before.get(k) and not k.endswith(RATES)}
        twice = {f"{name}_{suffix}" for name in metrics for suffix in ("step", "epoch")}
        return {name: value for name, value in metrics.items() if name not in twice}

    def _running(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any) -> list[str]:
        """What the bar says of the model, the most telling first."""
        own = getattr(pl_module, "running_metrics", None)
        metrics: dict[str, Any] = own() if callable(own) else self._fresh(trainer)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and not any("loss" in name for name in metrics):
            metrics = {"loss": loss, **metrics}
        last = {name: value for name, value in (self._before or {}).items() if name.startswith("val")}
        return _shown({**metrics, **last})

    def _is_due(self) -> bool:
        return self._has_bar and self.is_enabled and time.perf_counter() - self._drawn >= REDRAWN

    def _draw(self, label: str, share: float, metrics: Iterable[str] = (), left: float = math.nan) -> None:
        """Write the bar over the last one, as wide as the terminal; the cursor stays at its end."""
        text = draw_bar(label, share, metrics, left, shutil.get_terminal_size().columns - 1)
        sys.stderr.write(f"\r{text.ljust(self._length)}")
        sys.stderr.flush()
        self._length, self._drawn = len(text), time.perf_counter()


def find_place(trainer: pl.Trainer, num_batches: int) -> tuple[str, float, float]:
    """Where a training stands after some batches of its epoch.

    Returns:
        What is counted, as ``epoch 3/10`` or, where steps end the run, ``step 500/5000``; how much of that is done, 0
        to 1, and how much of the whole run. NaN: the end is not known.
    """
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs or 0
    batches = trainer.num_training_batches  # inf of a loader that does not know its length
    if 0 < trainer.max_steps <= epochs * batches / trainer.accumulate_grad_batches:
        share = trainer.global_step / trainer.max_steps
        return f"step {trainer.global_step}/{trainer.max_steps}", share, share
    share = num_batches / batches if 0 < batches < math.inf else math.nan
    number = trainer.current_epoch + 1
    if epochs == math.inf:
        return f"epoch {number}", share, math.nan
    return f"epoch {number}/{epochs}", share, (number - 1 + share) / max(epochs, 1)


def draw_bar(label: str, share: float, metrics: Iterable[str], left: float, width: int) -> str:
    """A line of ``width`` columns or fewer, in plain characters, as ``epoch 3/10  [###.....]  loss 0.0812  0:21 left``.

    Args:
        label: What is counted.
        share: How much of it is done, 0 to 1; NaN: not known, without a bar.
        metrics: Name and value each, the most important first; those that find no room are left out.
        left: Seconds; NaN: not known.
        width: Columns.
    """
    parts, end = [label], []
    if not math.isnan(share):
        parts.append(f"[{'#' * int(BAR * min(share, 1)):.<{BAR}}]")
    if not math.isnan(left):
        minutes, seconds = divmod(round(left), 60)
        clock = f"{minutes // 60}:{minutes % 60:02}" if minutes >= 60 else f"{minutes}"
        end = [f"{clock}:{seconds:02} left"]
    for metric in metrics:
        if len("  ".join([*parts, metric, *end])) <= width:
            parts.append(metric)
    return "  ".join([*parts, *end])[:width]


def _shown(metrics: Mapping[str, Any]) -> list[str]:
    """Names and values: four decimals, unless a value is too large or too small for them."""
    values = {name: float(value) for name, value in metrics.items()}
    return [f"{k} {v:.4f}" if v == 0 or 1e-3 <= abs(v) < 1e4 else f"{k} {v:.4g}" for k, v in values.items()]


class Summary(callbacks.ModelSummary):
    """A table of the model's parts; metrics, which have no weights, are left out."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print it."""
        kinds = Metric | MetricCollection
        self._metrics = {name for name, part in pl_module.named_modules() if isinstance(part, kinds)}
        super().on_fit_start(trainer, pl_module)

    def summarize(  # type: ignore[override]
        self, summary_data: list[tuple[str, list[str]]], total_parameters: int, trainable_parameters: int, *_: Any,
        **__: Any,
    ) -> None:  # fmt: skip
        """Print the parts' names, classes, parameters and outputs."""
        columns = {name: cells for name, cells in summary_data if name in ("Name", "Type", "Params", "Out sizes")}
        table = Table(*columns)
        for name, *cells in zip(*columns.values(), strict=True):
            if name not in self._metrics:
                known = ["" if cell == "?" else cell.replace("[", r"\[") for cell in cells]  # what forward leaves out
                table.add_row(name, *known)
        console = Console(highlight=False)  # the line is no title, which would be as narrow as the table
        console.print(f"{total_parameters:,} parameters, {trainable_parameters:,} of them trained")
        console.print(table)
