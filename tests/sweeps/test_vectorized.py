"""Runs in lockstep, compared with the same runs alone."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

import src.targets
from src.build import load_checkpoint
from src.classifier import DivergenceError
from src.config import CONF
from src.sweeps.vectorized import Ensemble
from src.train import train
from tests.compose import compose_cfg

SMALL = ("data=mnist5k", "trainer=cpu", "trainer.max_epochs=1", "test=false", "callbacks=minimal", "logger=[]")
CURVE = "+callbacks.curve._target_=tests.sweeps.test_vectorized.Curve"


class Curve(pl.Callback):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(torch.stack(self.losses), Path(trainer.default_root_dir) / "losses.pt")


@pytest.fixture(autouse=True)
def curves_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(src.targets, "OWN", (*src.targets.OWN, "tests"))


def make_runs(folder: Path, jobs: Sequence[Sequence[str]], *shared: str) -> list[Callable[[], Any]]:
    return [
        partial(train, compose_cfg(folder / str(number), *SMALL, *shared, CURVE, *job))
        for number, job in enumerate(jobs)
    ]


def train_together(folder: Path, jobs: Sequence[Sequence[str]], *shared: str) -> list[BaseException | None]:
    ensemble = Ensemble(make_runs(folder, jobs, *shared))
    ensemble.run()
    return [member.error for member in ensemble.members]


def train_alone(folder: Path, jobs: Sequence[Sequence[str]], *shared: str) -> None:
    for run in make_runs(folder, jobs, *shared):
        run()


def read(folder: Path) -> tuple[Tensor, dict[str, float], dict[str, Any]]:
    """A run's losses step by step, its metrics, and its checkpoint."""
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    return torch.load(folder / "losses.pt"), metrics, load_checkpoint(folder / "checkpoints" / "last.ckpt")


def assert_same_runs(together: Path, alone: Path, tolerance: float = 2e-3, window: int = 1) -> None:
    """Up to rounding, which grows from step to step, the faster the higher the learning rate."""
    (losses, metrics, checkpoint), (losses_alone, metrics_alone, checkpoint_alone) = read(together), read(alone)
    assert losses_alone[-5:].mean() < losses_alone[:5].mean()
    means, means_alone = (curve.unfold(0, window, window).mean(dim=1) for curve in (losses, losses_alone))
    torch.testing.assert_close(means, means_alone, rtol=tolerance, atol=tolerance)
    assert metrics == pytest.approx(metrics_alone, abs=5e-3)
    for part in ("epoch", "global_step", "loops", "lr_schedulers", "hyper_parameters"):
        expected = json.dumps(checkpoint_alone[part], default=str).replace(str(alone), str(together))
        assert json.dumps(checkpoint[part], default=str) == expected
    groups = [state["optimizer_states"][0]["param_groups"] for state in (checkpoint, checkpoint_alone)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("optimizer", sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml")))
def test_the_loss_curves_of_an_epoch_are_those_of_the_runs_alone(optimizer: str, tmp_path: Path) -> None:
    rate = compose_cfg(tmp_path, f"optimizer={optimizer}").optimizer.lr / 4  # calm enough to compare step by step
    jobs = [[f"optimizer.lr={rate}"], [f"optimizer.lr={rate / 2}", "optimizer.weight_decay=0.01"]]
    assert train_together(tmp_path / "together", jobs, f"optimizer={optimizer}") == [None, None]
    train_alone(tmp_path / "alone", jobs, f"optimizer={optimizer}")
    for number in range(len(jobs)):
        assert_same_runs(tmp_path / "together" / str(number), tmp_path / "alone" / str(number))


@pytest.mark.full_mnist
def test_so_are_those_of_an_epoch_of_all_of_mnist(tmp_path: Path, full_mnist_root: Path) -> None:
    data = ("data=mnist", f"data.root={full_mnist_root}", "data.source=files")
    jobs = [["optimizer.lr=0.001"], ["optimizer.lr=0.004"]]
    assert train_together(tmp_path / "together", jobs, *data) == [None, None]
    train_alone(tmp_path / "alone", jobs, *data)
    for number in range(len(jobs)):
        assert_same_runs(
            tmp_path / "together" / str(number), tmp_path / "alone" / str(number), tolerance=0.02, window=50
        )


def test_runs_may_differ_in_seed_schedule_loss_augmentation_and_callbacks(tmp_path: Path) -> None:
    jobs = [
        ["seed=1", "optimizer.lr=0.001"],
        ["seed=2", "scheduler=cosine", "optimizer.lr=0.0005", "data.augment=affine"],
        [
            "seed=2",
            "+model.loss={_target_:torch.nn.CrossEntropyLoss,label_smoothing:0.1}",
            "optimizer=sgd",
            "optimizer.lr=0.01",
        ],
        ["trainer.gradient_clip_val=0.5", "trainer.accumulate_grad_batches=2", "optimizer.lr=0.002"],
    ]
    short = "trainer.limit_train_batches=45"  # rounding grows from step to step
    assert train_together(tmp_path / "together", jobs, short) == [None] * len(jobs)
    train_alone(tmp_path / "alone", jobs, short)
    for number in range(len(jobs)):
        assert_same_runs(tmp_path / "together" / str(number), tmp_path / "alone" / str(number))


def test_a_run_that_diverges_or_stops_early_does_not_touch_the_others(tmp_path: Path) -> None:
    stop = "+callbacks.stop={_target_:pytorch_lightning.callbacks.EarlyStopping,monitor:val/acc,patience:1,mode:min}"
    jobs = [["optimizer=sgd", "optimizer.lr=1e30"], [stop, "optimizer.lr=0.001"], ["seed=3", "optimizer.lr=0.001"]]
    shared = ("trainer.max_epochs=3", "trainer.limit_train_batches=20")
    errors = train_together(tmp_path / "together", jobs, *shared)
    assert isinstance(errors[0], DivergenceError)
    assert errors[1:] == [None, None]
    train_alone(tmp_path / "alone" / "stops", jobs[1:2], *shared)
    train_alone(tmp_path / "alone" / "goes on", jobs[2:], *shared)
    assert_same_runs(tmp_path / "together" / "1", tmp_path / "alone" / "stops" / "0")
    assert_same_runs(tmp_path / "together" / "2", tmp_path / "alone" / "goes on" / "0")
    assert len(read(tmp_path / "together" / "1")[0]) < len(read(tmp_path / "together" / "2")[0])


def test_what_a_process_has_once_is_as_it_was_behind_the_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    train_together(tmp_path, [["seed=1"], ["seed=2"]], "trainer.limit_train_batches=1")
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.rand(1) == expected
