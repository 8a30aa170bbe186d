"""Schedules of the learning rate that know how many steps the run has, and the rate of each group."""

from functools import partial
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


def equip(value: Any, made: list["Schedule"]) -> Any:
    """Replace the schedulers' factories in ``value`` that need to know the run or the optimizer's groups.

    Args:
        value: What is built of a config; dictionaries are looked into.
        made: The new factories are added here: each must be told its ``module``.
    """
    if isinstance(value, dict):
        return {name: equip(child, made) for name, child in value.items()}
    if isinstance(value, partial) and (value.keywords.get("total_steps", 0) is None or "max_lr" in value.keywords):
        value = Schedule(value.func, *value.args, **value.keywords)
        made.append(value)
    return value


class Schedule(partial):
    """A scheduler's factory that fills in the run's number of steps, and each group's own peak."""

    module: pl.LightningModule

    def __reduce__(self) -> Any:
        """Without the module: Lightning drops hyper-parameters that cannot be pickled, and a module may not be."""
        reduced: Any = super().__reduce__()
        kind, function, state = reduced
        return kind, function, (*state[:-1], None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the scheduler of an optimizer."""
        own = {**self.keywords, **kwargs}
        if own.get("total_steps", 0) is None:
            kwargs["total_steps"] = int(self.module.trainer.estimated_stepping_batches)
        optimizer = args[0] if args else own["optimizer"]
        rate, rates = optimizer.defaults["lr"], [group["lr"] for group in optimizer.param_groups]
        for name in ("base_lr", "max_lr"):  # a number: that of the optimizer's own rate
            if isinstance(own.get(name), int | float) and any(other != rate for other in rates):
                kwargs[name] = [own[name] * other / rate if rate else other for other in rates]
        return super().__call__(*args, **kwargs)


def warmup_cosine(
    optimizer: Optimizer, total_steps: int | None, warmup: float = 0.05, start_factor: float = 0.01, eta_min: float = 0
) -> LRScheduler:
    """Linear warm-up to each group's own rate, then half a cosine down to ``eta_min``.

    Args:
        optimizer: Its groups' rates are the peaks.
        total_steps: Steps of the run, 1 or more; after the last one, the rate is ``eta_min``. A config's null is filled
            in before.
        warmup: Length of the warm-up: below 1 a share of the run, else a number of steps below ``total_steps``.
        start_factor: Rate of the first step as a share of the peak, above 0, at most 1.
        eta_min: The last rate.

    Raises:
        ValueError: If the run's steps are not known, or the warm-up is negative or as long as the run.
    """
    if total_steps is None:
        raise ValueError("total_steps=None: expected the number of the run's steps")
    num_warmup = round(warmup * total_steps if warmup < 1 else warmup)
    if not 0 <= num_warmup < total_steps:
        raise ValueError(f"warmup={warmup}: expected a share from 0 to 1, or fewer steps than the run's {total_steps}")
    if num_warmup == 0:
        return CosineAnnealingLR(optimizer, total_steps, eta_min)
    rise = LinearLR(optimizer, start_factor, total_iters=num_warmup)
    fall = CosineAnnealingLR(optimizer, total_steps - num_warmup, eta_min)
    return SequentialLR(optimizer, [rise, fall], milestones=[num_warmup])
