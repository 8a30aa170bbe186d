"""The callbacks in a real run; what TensorBoard holds of them is tested with the train command."""

import logging
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from src.build import build_datamodule, build_module, build_trainer
from src.callbacks.progress import EpochLines
from src.callbacks.speed import Speed
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
    monkeypatch.setattr("src.targets.OWN", ("tests",))
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
