"""The range test: the rate that it finds trains as if it had been given."""

import io
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.engine.errors import ConfigError
from src.engine.runs.build import load_checkpoint
from src.train import train
from tests.compose import run_command
from tests.engine.equality import assert_equal
from tests.engine.tiny import TINY, TinyNet, TinyTask, compose_tiny
from tests.marks import by_default

COMMON = ("trainer.max_epochs=2", "test=false")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as the command ignores it
@pytest.mark.parametrize("scheduler", by_default(["onecycle", "step", "[]"]))
def test_the_rate_that_is_found_trains_as_if_it_had_been_given(scheduler: str, tmp_path: Path) -> None:
    find = ("callbacks=[minimal,lr_find]", "callbacks.lr_find.num_training_steps=20", "callbacks.lr_find.max_lr=0.1")
    train(compose_tiny(tmp_path / "found", *COMMON, *find, f"scheduler={scheduler}", "logger=tensorboard"))
    events = EventAccumulator(str(tmp_path / "found"))
    events.Reload()
    assert events.Tags()["images"] == ["lr_find"]
    (image,) = events.Images("lr_find")
    page = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")).astype(int)  # (H, W, 3)
    blue = (np.abs(page - (31, 119, 180)).max(axis=2) < 40).any(axis=0).nonzero()[0]  # columns with the curve
    assert len(blue) > 0.5 * page.shape[1]
    red = (np.abs(page - (255, 0, 0)).max(axis=2) < 40).any(axis=0).nonzero()[0]  # the rate that was taken
    assert 5 < len(red) < 30
    assert blue.min() <= red.mean() <= blue.max()
    (suggestion,) = (event.value for event in events.Scalars("lr_find/suggestion"))
    assert 1e-6 < suggestion < 0.1
    assert suggestion != pytest.approx(0.004)
    # TensorBoard's number is of 32 bits; the rates that were tested are a geometric row.
    rate = min((1e-6 * (0.1 / 1e-6) ** (step / 20) for step in range(1, 22)), key=lambda lr: abs(lr - suggestion))
    train(compose_tiny(tmp_path / "given", *COMMON, f"optimizer.lr={rate!r}", f"scheduler={scheduler}"))
    one, other = (load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("found", "given"))
    assert_equal(one["state_dict"], other["state_dict"])
    assert list((tmp_path / "found").glob(".lr_find*")) == []


class Owner(TinyTask):
    """Makes its optimizer by a rate among its hyper-parameters, as most modules do."""

    def __init__(self, lr: float, learning_rate: float = 0.004) -> None:
        super().__init__(TinyNet())
        self.learning_rate = learning_rate
        self.save_hyperparameters("lr")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=24)]


class Upstream(TinyTask):
    """Has the optimizer's factory among its hyper-parameters only, as lightning-hydra-template's modules have it."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(TinyNet())
        self.save_hyperparameters("optimizer", logger=False)

    def configure_optimizers(self) -> Any:
        return self.hparams["optimizer"](self.parameters())


class Silent(TinyTask):
    """Keeps its rate to itself."""

    def __init__(self) -> None:
        super().__init__(TinyNet())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@dataclass(slots=True)
class Slotted:
    """Settings without a dict of their own."""

    lr: float = 1.0


class Configured(TinyTask):
    """Reads its rate from settings: as a Namespace, as part of a dict, or from what nobody sees."""

    def __init__(self, args: Namespace, cfg: dict[str, Any], reads: str) -> None:
        super().__init__(TinyNet())
        self.args, self.cfg, self.reads, self._own, self.beside = args, cfg, reads, args.lr, Slotted()

    def configure_optimizers(self) -> Any:
        rates = {"args": self.args.lr, "cfg": self.cfg["optim"]["lr"], "own": self._own}
        return torch.optim.SGD(self.parameters(), lr=rates[self.reads])


ME = "tests.callbacks.test_lr_finder"
CONFIGURED = (
    f"model._target_={ME}.Configured", "~model.net", "optimizer=[]", "scheduler=[]", "+model.args={lr: 0.004}",
    "+model.cfg={optim: {lr: 0.004}}",
)  # fmt: skip
OWNER = ("~model.net", "optimizer=[]", "scheduler=[]")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("module", "given"),
    [
        ((f"model._target_={ME}.Owner", *OWNER, "+model.lr=0.004"), ["model.lr", "+model.learning_rate"]),
        ((*CONFIGURED, "+model.reads=args"), ["model.args.lr"]),
        ((*CONFIGURED, "+model.reads=cfg"), ["model.cfg.optim.lr"]),
        ((f"model._target_={ME}.Upstream", "~model.net", "scheduler=[]"), ["optimizer.lr"]),
        ((f"model._target_={ME}.Upstream", "~model.net", "scheduler=[]", "optimizer.lr=1"), ["optimizer.lr"]),
    ],
)
def test_any_modules_rate_is_found_and_set(module: tuple[str, ...], given: list[str], tmp_path: Path) -> None:
    find = ("callbacks=[minimal,lr_find]", "callbacks.lr_find.num_training_steps=20", "callbacks.lr_find.max_lr=0.1")
    train(compose_tiny(tmp_path / "found", *COMMON, *find, *module, "logger=tensorboard"))
    events = EventAccumulator(str(tmp_path / "found"))
    events.Reload()
    (suggestion,) = (event.value for event in events.Scalars("lr_find/suggestion"))
    rate = min((1e-6 * (0.1 / 1e-6) ** (step / 20) for step in range(1, 22)), key=lambda lr: abs(lr - suggestion))
    train(compose_tiny(tmp_path / "given", *COMMON, *module, *(f"{key}={rate!r}" for key in given)))
    one, other = (load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("found", "given"))
    assert_equal(one["state_dict"], other["state_dict"])


def test_a_module_that_shows_no_rate_is_told(tmp_path: Path) -> None:
    cfg = compose_tiny(tmp_path, *COMMON, f"model._target_={ME}.Silent", *OWNER, "callbacks=[minimal,lr_find]")
    with pytest.raises(ConfigError, match=r"callbacks\.lr_find: Silent shows no learning rate; expected lr"):
        train(cfg)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_module_that_reads_its_rate_from_elsewhere_is_told(tmp_path: Path) -> None:
    find = ("callbacks=[minimal,lr_find]", "callbacks.lr_find.num_training_steps=20", "callbacks.lr_find.max_lr=0.1")
    cfg = compose_tiny(tmp_path, *COMMON, *CONFIGURED, "+model.reads=own", *find)
    with pytest.raises(ConfigError, match=r"Configured\.configure_optimizers does not read the rate that was set"):
        train(cfg)


@pytest.mark.slow
def test_two_processes_find_one_rate_and_say_so_once(tmp_path: Path) -> None:
    result = run_command(
        "train", *TINY, "trainer=ddp_cpu", "data.num_rows=2000", "trainer.max_epochs=2",
        "callbacks=[minimal,lr_find]", "logger=[]", PROJECT_ROOT=str(tmp_path), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = [re.split(r" \d", line)[0] for line in result.stderr.splitlines()]
    assert said == ["learning rate", "epoch", "epoch"]


def test_a_range_test_longer_than_the_run_is_refused(tmp_path: Path) -> None:
    cfg = compose_tiny(tmp_path, *COMMON, "callbacks=[minimal,lr_find]")
    with pytest.raises(ConfigError, match=r"num_training_steps=100: expected at most the steps of the run, 24"):
        train(cfg)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as the command ignores it
def test_a_resumed_run_keeps_the_rate_that_was_found(tmp_path: Path) -> None:
    find = (
        *("callbacks=[minimal,lr_find]", "callbacks.lr_find.num_training_steps=20", "scheduler=step", "test=false"),
        "data.batch_size=10",
    )
    train(compose_tiny(tmp_path / "whole", *find, "trainer.max_epochs=2"))
    train(compose_tiny(tmp_path / "first", *find, "trainer.max_epochs=1"))
    path = tmp_path / "first" / "checkpoints" / "last.ckpt"
    train(compose_tiny(tmp_path / "second", *find, "trainer.max_epochs=2", f"ckpt_path={path}"))
    one, other = (load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "second"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(one[key], other[key])
