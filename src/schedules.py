"""Learning rates over a run that torch has in parts only."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


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
