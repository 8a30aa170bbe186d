"""Schedules against their formulas; those of conf/ in a run, against a loop in plain torch."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from src.engine.runs.build import load_checkpoint
from src.engine.runs.schedules import warmup_cosine
from src.train import train
from tests.engine.tiny import compose_tiny


def rates(num_steps: int, peaks: tuple[float, ...], **arguments: float) -> list[list[float]]:
    """The rates that the steps of a run have, a list a step, and those after the last one."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = warmup_cosine(optimizer, num_steps, **arguments)
    found = []
    for _ in range(num_steps + 1):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def formula(step: int, num_warmup: int, num_steps: int, start: float, last: float, peak: float) -> float:
    if step < num_warmup:
        return peak * (start + (1 - start) * step / num_warmup)
    share = (step - num_warmup) / (num_steps - num_warmup)
    return last + (peak - last) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(("warmup", "num_warmup"), [(0.25, 10), (8, 8), (0, 0)])
def test_warmup_cosine_is_its_formula_for_each_group(warmup: float, num_warmup: int) -> None:
    found = rates(40, (0.5, 0.02), warmup=warmup, start_factor=0.1, eta_min=1e-3)
    for step, (first, second) in enumerate(found):
        assert first == pytest.approx(formula(step, num_warmup, 40, 0.1, 1e-3, 0.5))
        assert second == pytest.approx(formula(step, num_warmup, 40, 0.1, 1e-3, 0.02))


@pytest.mark.parametrize("warmup", [-0.1, 40, 41])
def test_a_warmup_as_long_as_the_run_is_refused(warmup: float) -> None:
    with pytest.raises(ValueError, match=f"warmup={warmup}: expected a share .* than the run's 40"):
        rates(40, (0.1,), warmup=warmup)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("scheduler=warmup_cosine", 0.0),
        ("scheduler=constant", 0.1),
    ],
)
def test_a_run_ends_at_the_last_rate(option: str, expected: float, tmp_path: Path) -> None:
    train(compose_tiny(tmp_path, option, "optimizer.lr=0.1", "trainer.max_epochs=2", "test=false"))
    state = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(expected, abs=1e-9)
    assert state["global_step"] == 24
