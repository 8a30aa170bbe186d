"""A learning rate from a range test, before the training."""

import io
import logging
import sys
from argparse import Namespace
from collections.abc import MutableMapping
from contextlib import nullcontext, redirect_stderr
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig
from pytorch_lightning import callbacks

from src.callbacks.pictures import find_loggers, show
from src.engine.errors import ConfigError

log = logging.getLogger(__name__)

RATES = ("lr", "learning_rate")


class LearningRateFinder(callbacks.LearningRateFinder):
    """Lightning's range test (Smith, 2015), whose rate replaces that of the module.

    It is looked for in the module and its ``hparams``: as ``lr`` or ``learning_rate``, and in the factory ``optimizer``
    there. If the ``max_lr`` of the factory ``scheduler`` is the same, it is replaced, too: the run then equals,
    to the bit, one that was given the rate. Lightning's own sets the rate and leaves the schedule as it is, which
    overwrites it in the first step. A resumed run keeps its rate. A picture shows the loss by rate.

    Args:
        min_lr: The lowest rate, above 0.
        max_lr: The highest rate; the test ends before it if the loss is four times the lowest one.
        num_training_steps: Steps between them, 13 or more, at most those of the run.
    """

    def __init__(self, min_lr: float = 1e-6, max_lr: float = 1.0, num_training_steps: int = 100) -> None:
        super().__init__(min_lr, max_lr, num_training_steps, update_attr=False)
        self.num_training_steps = num_training_steps

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Test, and set the rate.

        Raises:
            ConfigError: If the module has no rate to set, the run is too short, or the loss never fell.
        """
        if trainer.ckpt_path:
            return
        found = [node.get(key) for node in _find_settings(pl_module) for key in RATES]
        rates = [rate for rate in found if isinstance(rate, int | float)]
        if not rates:
            where = "lr, learning_rate or optimizer=<a partial with lr>, an attribute or a hyper-parameter"
            raise ConfigError(f"callbacks.lr_find: {type(pl_module).__name__} shows no learning rate; expected {where}")
        before = _find_rates(trainer)
        if 0 <= trainer.estimated_stepping_batches < self.num_training_steps:  # below 0: of a stream nobody knows
            raise ConfigError(
                f"callbacks.lr_find.num_training_steps={self.num_training_steps}: expected at most the steps of the "
                f"run, {trainer.estimated_stepping_batches}"
            )
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):  # a progress bar of its own
            self.lr_find(trainer, pl_module)
        if trainer.progress_bar_callback and not trainer.is_global_zero:
            trainer.progress_bar_callback.disable()  # Lightning has just enabled that of each process
        rate = self.optimal_lr.suggestion() if self.optimal_lr else None
        if not self.optimal_lr or rate is None:
            raise ConfigError("callbacks.lr_find: found no rate; try a lower callbacks.lr_find.min_lr, or do without")
        if trainer.is_global_zero:
            log.info(f"learning rate {rate:.4g}, found by callbacks.lr_find, in place of {rates[0]:.4g}")
        for node in _find_settings(pl_module):
            node.update({key: rate for key in (*RATES, "max_lr") if node.get(key) == rates[0]})
        trainer.strategy.setup_optimizers(trainer)
        if rate != rates[0] and before == _find_rates(trainer):
            where = f"{type(pl_module).__name__}.configure_optimizers"
            raise ConfigError(
                f"callbacks.lr_find: {where} does not read the rate that was set, as from self.hparams.lr"
            )
        for logger in trainer.loggers:
            logger.log_metrics({"lr_find/suggestion": rate}, step=0)
        figure = Figure(layout="constrained")
        canvas = FigureCanvasAgg(figure)
        self.optimal_lr.plot(suggest=True, ax=figure.add_subplot(title=f"suggestion: {rate:.3g}"))
        canvas.draw()
        show(find_loggers(trainer), "lr_find", np.asarray(canvas.buffer_rgba())[..., :3], 0)


def _find_rates(trainer: pl.Trainer) -> list[list[Any]]:
    """The rates of the optimizers' groups, and those that schedules have noted there."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [[group.get(key) for key in ("lr", "initial_lr", "max_lr")] for group in groups]


def _is_settings(part: Any) -> bool:
    return is_dataclass(part) and hasattr(part, "__dict__")  # one with slots has none


def _find_settings(module: pl.LightningModule) -> list[MutableMapping[str, Any]]:
    """Where a module may keep its rate: its attributes, its ``hparams``, settings and factories among them."""
    nodes: list[MutableMapping[str, Any]] = [vars(module), module.hparams]
    for node in nodes:  # which grows
        own = [part for key, part in node.items() if not str(key).startswith("_")]
        parts = [vars(part) if isinstance(part, Namespace) or _is_settings(part) else part for part in own]
        kept = [part for part in parts if isinstance(part, dict | DictConfig)]
        nodes += [part for part in kept if all(part is not each for each in nodes)]
    schedulers = [node.get("scheduler") for node in nodes]
    factories = [each["scheduler"] if isinstance(each, dict) and "scheduler" in each else each for each in schedulers]
    factories = [*(node.get("optimizer") for node in nodes), *factories]
    return [*nodes, *(each.keywords for each in factories if isinstance(each, partial))]
