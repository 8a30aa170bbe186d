"""The callbacks in a real run; what TensorBoard holds of them is tested with the train command."""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor, nn

from src.callbacks.progress import EpochLines
from src.callbacks.speed import Speed
from src.classifier import ImageClassifier
from src.data.mnist import MNISTDataModule
from src.engine.runs.build import build_datamodule, build_module, build_trainer
from src.models.lenet5 import LeNet5
from tests.compose import compose_cfg


def test_speed_counts_each_epochs_images_by_the_time_of_its_batches(tmp_path: Path) -> None:
    cfg = compose_cfg(tmp_path, "data=mnist5k", "trainer=cpu", "trainer.max_epochs=2", "callbacks.summary=null")
    trainer = build_trainer(cfg)
    (speed,) = (callback for callback in trainer.callbacks if isinstance(callback, Speed))  # type: ignore[attr-defined]
    start = time.perf_counter()
    trainer.fit(build_module(cfg), build_datamodule(cfg))
    seconds = time.perf_counter() - start
    assert len(speed.rates) == 2
    assert sum(4000 / rate for rate in speed.rates) < seconds
    assert trainer.callback_metrics["train/images_per_second"].item() == pytest.approx(speed.rates[-1])


class SlowValidation(pl.Callback):
    """Makes each validation a fifth of a second longer, stops the training with the last of some, and times it."""

    def __init__(self, num: int) -> None:
        self.missing = num
        self.seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds -= time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds += time.perf_counter()

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        time.sleep(0.2)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.missing -= 1
        trainer.should_stop = self.missing == 0


@pytest.mark.parametrize(("num_validations", "images"), [(5, 3200), (2, 1280)], ids=["whole epoch", "early stop"])
def test_validation_in_an_epoch_is_not_in_its_speed(num_validations: int, images: int, tmp_path: Path) -> None:
    cfg = compose_cfg(
        tmp_path, "data=mnist5k", "trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=50",
        "+trainer.val_check_interval=10", "trainer.limit_val_batches=1", "trainer.num_sanity_val_steps=0",
        "callbacks.summary=null",
    )  # fmt: skip
    trainer = build_trainer(cfg)
    slow = SlowValidation(num_validations)
    trainer.callbacks.insert(0, slow)  # type: ignore[attr-defined]
    (speed,) = (callback for callback in trainer.callbacks if isinstance(callback, Speed))  # type: ignore[attr-defined]
    trainer.fit(build_module(cfg), build_datamodule(cfg))
    assert trainer.global_step == images / 64
    (rate,) = speed.rates
    assert 0 < images / rate < slow.seconds - 0.2 * num_validations
    assert trainer.callback_metrics["train/images_per_second"].item() == pytest.approx(rate)


def test_an_epoch_cut_short_by_max_steps_has_a_speed(tmp_path: Path) -> None:
    overrides = ("data=mnist5k", "trainer=cpu", "+trainer.max_steps=3", "callbacks.summary=null")
    cfg = compose_cfg(tmp_path, *overrides, "callbacks.checkpoint=null")  # it would wait for a validation
    trainer = build_trainer(cfg)
    (speed,) = (callback for callback in trainer.callbacks if isinstance(callback, Speed))  # type: ignore[attr-defined]
    trainer.fit(build_module(cfg), build_datamodule(cfg))
    assert trainer.global_step == 3
    (rate,) = speed.rates
    assert trainer.callback_metrics["train/images_per_second"].item() == pytest.approx(rate)


class Skipping(ImageClassifier):
    """A module that will have none of an epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int:
        return -1


def test_an_epoch_without_a_batch_has_no_speed(tmp_path: Path) -> None:
    cfg = compose_cfg(tmp_path, "data=mnist5k", "trainer=cpu", "trainer.max_epochs=1", "callbacks.summary=null")
    trainer = build_trainer(cfg)
    (speed,) = (callback for callback in trainer.callbacks if isinstance(callback, Speed))  # type: ignore[attr-defined]
    trainer.fit(Skipping(LeNet5(), optimizer=partial(torch.optim.SGD, lr=0.1)), build_datamodule(cfg))
    assert trainer.global_step == 0
    assert speed.rates == []
    assert "train/images_per_second" not in trainer.callback_metrics


class TensorInState(MNISTDataModule):
    """A user's data module, which keeps more than plain values."""

    def state_dict(self) -> dict[str, Any]:
        weights: dict[str, Any] = {
            "weights": torch.ones(3),
            "mean": np.float64(0.5),
            "nested": [{"a": torch.ones(1)}, 2],
        }
        return super().state_dict() | weights


def test_what_json_cannot_say_is_named_by_its_type_in_the_description(tmp_path: Path) -> None:
    cfg = compose_cfg(
        tmp_path, "data=mnist5k", "trainer=cpu", "debug=fast", "logger=tensorboard", "callbacks.summary=null"
    )
    trainer = build_trainer(cfg)
    trainer.fit(build_module(cfg), TensorInState(str(tmp_path), source="package"))
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("data/text_summary")
    text = make_ndarray(event.tensor_proto).item().decode()
    said = yaml.safe_load(text)
    assert said["source"] == "package"
    assert (said["mean"], said["nested"]) == (0.5, [{"a": "(Tensor)"}, 2])
    assert said["weights"] == "(Tensor)"


class Untraceable(nn.Module):
    """A net that torch.jit.trace cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1024, 10)

    def forward(self, images: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise RuntimeError("not to be traced")
        logits: Tensor = self.layer(images.flatten(start_dim=1))
        return logits


def test_a_net_without_a_graph_is_trained_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.engine.settings.trust.OWN", ("tests",))
    cfg = compose_cfg(tmp_path, "data=mnist5k", "trainer=cpu", "debug=fast", "callbacks.summary=null")
    cfg.model.net = {"_target_": f"{__name__}.Untraceable"}
    trainer = build_trainer(cfg)
    trainer.fit(build_module(cfg), build_datamodule(cfg))
    assert trainer.global_step == 1
    assert "no graph in TensorBoard" in caplog.text
    assert "not to be traced" in caplog.text


def test_epoch_lines_tell_this_epochs_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = compose_cfg(tmp_path, "data=mnist5k", "trainer=cpu", "debug=fast", "callbacks=minimal", "logger=[]")
    trainer = build_trainer(cfg)
    assert isinstance(trainer.progress_bar_callback, EpochLines)  # pytest's output is no terminal
    with caplog.at_level(logging.INFO, logger="src"):
        trainer.fit(build_module(cfg), build_datamodule(cfg))
    (line,) = (record.getMessage() for record in caplog.records if record.name == "src.callbacks.progress")
    assert line.startswith("epoch 1/1  ")
    for name in ("train/acc", "train/loss", "val/acc", "val/loss"):
        assert f"{name} {trainer.callback_metrics[name].item():.4f}" in line
