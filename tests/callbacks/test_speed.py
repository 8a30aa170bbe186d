"""The rate of an epoch: samples of any batch, by the seconds of its training batches."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from src.callbacks.speed import RATE, LearningRate, Speed, measure
from tests.callbacks.tasks import Classifier, make_images, make_trainer, read

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")

ROWS, PICTURES, BYTES = torch.zeros(7, 3), torch.zeros(7, 1, 4, 4), torch.zeros(7, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("batch", "measured"),
    [
        (PICTURES, 7),
        ([BYTES, torch.zeros(7)], 7),
        ((ROWS, PICTURES), 7),
        ({"id": ["a"] * 7, "nested": {"x": (ROWS,)}}, 7),
        ({"weight": torch.tensor(1.0), "image": PICTURES}, 7),
        (SimpleNamespace(num_graphs=5, x=ROWS), 5),
        (SimpleNamespace(x=ROWS), 0),
        (["text", 1, None], 0),
        ("text", 0),
        (None, 0),
    ],
)
def test_any_batch_is_measured(batch: Any, measured: int) -> None:
    assert measure(batch) == measured


class SlowValidation(pl.Callback):
    """Makes each validation a fifth of a second longer, stops the training with the last of some, and times it."""

    def __init__(self, num: int) -> None:
        self.missing = num
        self.seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds -= time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds += time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.missing:
            raise AssertionError("one validation too many")

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        time.sleep(0.2)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.missing -= 1
        trainer.should_stop = self.missing == 0


def fit(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **arguments: Any) -> tuple[Speed, Any]:
    """Train on 20 batches of eight images an epoch, and validate with one; the callback and the logged rate."""
    speed = Speed()
    trainer = make_trainer(folder, [*callbacks, speed], **arguments)
    trainer.fit(module, DataLoader(make_images(160, drawn_by=0), 8), DataLoader(make_images(8, drawn_by=1), 8))
    return speed, trainer.callback_metrics.get(RATE)


@pytest.mark.parametrize(("num_validations", "images"), [(5, 160), (2, 64)], ids=["whole epoch", "early stop"])
def test_validation_in_an_epoch_is_not_in_its_speed(num_validations: int, images: int, tmp_path: Path) -> None:
    slow = SlowValidation(num_validations)
    speed, logged = fit(tmp_path, Classifier(), slow, val_check_interval=4)
    (rate,) = speed.rates
    assert 0 < images / rate < slow.seconds - 0.2 * num_validations
    assert logged.item() == pytest.approx(rate)


def test_each_epoch_has_a_speed(tmp_path: Path) -> None:
    start = time.perf_counter()
    speed, logged = fit(tmp_path, Classifier(), max_epochs=3)
    assert len(speed.rates) == 3
    assert sum(160 / rate for rate in speed.rates) < time.perf_counter() - start
    assert logged.item() == pytest.approx(speed.rates[-1])


def test_an_epoch_cut_short_by_max_steps_has_a_speed(tmp_path: Path) -> None:
    speed, logged = fit(tmp_path, Classifier(), max_steps=3)
    assert [logged.item()] == pytest.approx(speed.rates)


class Skipping(Classifier):
    """A module that will have none of an epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int:
        return -1


def test_an_epoch_without_a_batch_has_no_speed(tmp_path: Path) -> None:
    speed, logged = fit(tmp_path, Skipping())
    assert (speed.rates, logged) == ([], None)


class Scheduled(Classifier):
    """Two optimizers' worth of groups, one with a name, and a schedule that halves all rates by the step."""

    def configure_optimizers(self) -> Any:
        weight, *rest = self.parameters()
        groups: list[Any] = [{"params": [weight], "lr": 0.1}, {"params": rest[:1], "lr": 0.2}]
        optimizer = torch.optim.SGD([*groups, {"params": rest[1:], "lr": 0.4, "name": "rest"}])
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_the_rates_of_all_groups_are_logged_as_they_step(tmp_path: Path) -> None:
    loader = DataLoader(make_images(48, drawn_by=0), 8)
    arguments: dict[str, Any] = {"log_every_n_steps": 2, "limit_val_batches": 0, "accumulate_grad_batches": 1}
    make_trainer(tmp_path, [LearningRate()], **arguments).fit(Scheduled(), loader, loader)
    events = read(tmp_path)
    for name, first in {"train/lr": 0.1, "train/lr_2": 0.2, "train/lr/rest": 0.4}.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(first / 2**step)) for step in (1, 3, 5)]
