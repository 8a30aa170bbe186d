"""trainer=steps: runs without epochs, of data without a length."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from src.engine.errors import ConfigError
from src.engine.runs.build import load_checkpoint
from tests.engine.equality import assert_equal, assert_same_run, content, scalars, weights
from tests.engine.runs.test_last_checkpoint import interrupt, last, run
from tests.engine.tiny import TinyData
from tests.marks import by_default

Batch = tuple[Tensor, Tensor]


class Stream(IterableDataset):
    """Batches without end; each is drawn by its number."""

    def __init__(self) -> None:
        self.number = self._first = 0

    def __iter__(self) -> Iterator[Batch]:
        number, self._first = self._first, 0
        while True:
            rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(number))
            number += 1
            self.number = number
            yield rows, (rows.sum(dim=1) > 0).long()

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._first = self.number = state["number"]


class Streamed(TinyData):
    """Trains on a stream."""

    def train_dataloader(self) -> Any:
        return Stream()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


STEPS = (
    f"data._target_={__name__}.Streamed", "trainer=steps", "accelerator=cpu", "trainer.max_steps=30",
    "trainer.val_check_interval=10", "callbacks.last.every_n_steps=4",
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:(Experiment logs|Checkpoint) directory .* exists and is not empty")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole"), *STEPS)


def test_a_run_has_so_many_steps_and_validates_every_so_many(whole: Path) -> None:
    assert load_checkpoint(last(whole))["global_step"] == 30
    assert [step for step, _ in scalars(whole)["val/acc"]] == [9, 19, 29]


@pytest.mark.parametrize("steps", by_default([17, 7, 10]))
def test_a_killed_stream_ends_as_the_uninterrupted_one_to_the_bit(steps: int, whole: Path, tmp_path: Path) -> None:
    assert_same_run(whole, interrupt(tmp_path, steps, *STEPS))


@pytest.mark.parametrize("first", by_default([23, 20]))  # not just validated, and so
def test_a_finished_run_is_extended_as_if_it_had_been_longer(first: int, whole: Path, tmp_path: Path) -> None:
    run(tmp_path, *STEPS, f"trainer.max_steps={first}")
    assert load_checkpoint(last(tmp_path))["global_step"] == first
    run(tmp_path, *STEPS, f"ckpt_path={last(tmp_path)}")
    one, other = (content(last(folder)) for folder in (whole, tmp_path))
    assert_equal(one, other)
    curves, extended = (
        {name: sorted(curve) for name, curve in scalars(folder).items()} for folder in (whole, tmp_path)
    )
    assert curves["val/acc"] == extended["val/acc"]
    assert curves["train/loss"][-1] == extended["train/loss"][-1]  # of all 30 steps


@pytest.mark.parametrize("schedule", by_default(["cosine", "step"]))
def test_a_schedule_counts_steps(schedule: str, tmp_path: Path) -> None:
    lr = "+callbacks.lr._target_=pytorch_lightning.callbacks.LearningRateMonitor"
    sgd = ("optimizer=sgd", "optimizer.lr=0.1")
    run(tmp_path, *STEPS, f"scheduler={schedule}", "trainer.max_steps=20", lr, *sgd)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    plain: Any = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        if schedule == "cosine"
        else torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.3)
    )
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plain.step()
    assert [value for _, value in scalars(tmp_path)["lr-SGD"]] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("data", "frequency"), by_default([(STEPS[0], 1), (f"data._target_={TinyData.__module__}.TinyData", 2)])
)
def test_plateau_counts_validations(data: str, frequency: int, tmp_path: Path) -> None:
    """Of a stream, and of data whose epochs of 12 steps the validations do not fit."""
    lr = "+callbacks.lr={_target_: pytorch_lightning.callbacks.LearningRateMonitor, logging_interval: step}"
    plateau = ("scheduler=plateau", "scheduler.scheduler.patience=0", "+scheduler.scheduler.threshold=0.1", lr)
    slow = ("trainer.val_check_interval=5", "optimizer=sgd", "optimizer.lr=0.001")
    settings = (*STEPS, data, *slow, *plateau, f"+scheduler.frequency={frequency}")
    folder = run(tmp_path / data[-8:], *settings)
    losses, rates = dict(scalars(folder)["val/loss"]), dict(scalars(folder)["lr-SGD"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.001)
    plain = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, threshold=0.1)
    assert sorted(losses) == [4, 9, 14, 19, 24, 29]
    for step in range(30):
        assert rates[step] == pytest.approx(optimizer.param_groups[0]["lr"])
        if (step + 1) % (5 * frequency) == 0:
            plain.step(losses[step])
    assert optimizer.param_groups[0]["lr"] < 1e-4
    for steps in (7, 10):  # between two, and just validated
        assert_same_run(folder, interrupt(tmp_path / f"{data[-8:]}-{steps}", steps, *settings))


def test_a_schedule_made_for_the_steps_is_not_made_longer(tmp_path: Path) -> None:
    settings = (*STEPS, "scheduler=warmup_cosine", "trainer.max_steps=10")
    run(tmp_path, *settings)
    with pytest.raises(ConfigError, match=r"trainer\.max_steps=20: .* 10, and its schedule, warmup_cosine, is made"):
        run(tmp_path, *settings, "trainer.max_steps=20", f"ckpt_path={last(tmp_path)}")


@pytest.mark.slow
def test_data_with_a_length_are_gone_through_more_than_once(tmp_path: Path) -> None:
    settings = [word for word in STEPS if "Streamed" not in word]
    whole = run(tmp_path / "whole", *settings)
    assert load_checkpoint(last(whole))["global_step"] == 30  # of 12 an epoch
    assert_same_run(whole, interrupt(tmp_path / "killed", 17, *settings))
    assert weights(last(whole)).isfinite().all()
