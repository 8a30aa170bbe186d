"""Lightning's own tools, by a word on the command line: each does in a run of this project what it promises."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from src.engine.runs.build import build_datamodule, build_module, load_checkpoint
from src.engine.runs.trainer import build_trainer
from src.train import train
from tests.engine.equality import assert_equal
from tests.engine.tiny import compose_tiny

# 12 batches of 20.
COMMON = ("trainer.max_epochs=2", "test=false")


class Recorder(Callback):
    """The weights before the training and after each step, each in a row; what the first layer puts out."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.dtypes: set[torch.dtype] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights.append(flat(pl_module))
        layer: Any = pl_module.net[0]  # type: ignore[index]
        layer.register_forward_hook(lambda module, inputs, output: self.dtypes.add(output.dtype))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.weights.append(flat(pl_module))


def flat(module: pl.LightningModule) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in module.parameters()])


def record(folder: Path, *overrides: str) -> Recorder:
    """Train with a recorder."""
    cfg = compose_tiny(folder, *overrides)
    pl.seed_everything(cfg.seed, verbose=False)
    trainer, recorder = build_trainer(cfg), Recorder()
    trainer.callbacks.insert(0, recorder)  # type: ignore[attr-defined]
    trainer.fit(build_module(cfg), build_datamodule(cfg))
    return recorder


def last(folder: Path) -> dict[str, Any]:
    """What a run resumes from."""
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    return {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_early_stopping_stops_after_the_first_epoch_that_is_no_better(tmp_path: Path) -> None:
    more = ("trainer.max_epochs=12", "optimizer.lr=0.5", "monitor=val/loss", "mode=min", "logger=csv")
    train(compose_tiny(tmp_path / "whole", *COMMON, *more))
    losses = [float(row["val/loss"]) for row in table(tmp_path / "whole") if row["val/loss"]]
    expected = next(epoch for epoch in range(1, 12) if losses[epoch] >= min(losses[:epoch]))
    train(
        compose_tiny(
            tmp_path / "stopped", *COMMON, *more, "callbacks=[minimal,early_stopping]",
            "callbacks.early_stopping.patience=1",
        )
    )  # fmt: skip
    stopped = [float(row["val/loss"]) for row in table(tmp_path / "stopped") if row["val/loss"]]
    assert stopped == losses[: expected + 1]
    assert expected < 11


@pytest.mark.slow
def test_device_stats_stand_beside_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    stats = "callbacks=[minimal,device_stats]"
    train(
        compose_tiny(
            tmp_path / "csv", *COMMON, stats, "logger=csv", "trainer.max_epochs=1", "trainer.log_every_n_steps=1"
        )
    )
    (name,) = (name for name in table(tmp_path / "csv")[0] if name.endswith("on_train_batch_end/cpu_vm_percent"))
    values = [float(row[name]) for row in table(tmp_path / "csv") if row[name]]
    assert len(values) == 12
    assert all(0 < value <= 100 for value in values)
    train(compose_tiny(tmp_path / "none", *COMMON, stats, "trainer.max_epochs=1"))  # nowhere to log to
    train(compose_tiny(tmp_path / "plain", *COMMON, "trainer.max_epochs=1"))
    assert_equal(last(tmp_path / "csv"), last(tmp_path / "plain"))


PLAIN = (
    "optimizer=sgd",
    "optimizer.momentum=0",
    "optimizer.nesterov=false",
    "optimizer.lr=0.05",
    "model.net.dropout=0",
)


def test_clipped_gradients_are_of_the_length_asked_for(tmp_path: Path) -> None:
    def lengths(name: str, clip: str) -> Tensor:
        """Of each step's gradient: by what the weights have moved, over the rate."""
        weights = torch.stack(record(tmp_path / name, *COMMON, *PLAIN, f"trainer.gradient_clip_val={clip}").weights)
        moved: Tensor = weights.diff(dim=0).norm(dim=1) / 0.05
        return moved

    free, clipped = lengths("free", "null"), lengths("clipped", "0.1")
    assert (free > 0.11).sum() > 10
    torch.testing.assert_close(clipped[free > 0.11][:1], torch.tensor([0.1]), rtol=1e-3, atol=0)
    assert clipped.max() <= 0.1001


def test_accumulated_gradients_equal_those_of_larger_batches(tmp_path: Path) -> None:
    large = record(tmp_path / "large", *COMMON, *PLAIN, "data.batch_size=40").weights
    small = record(tmp_path / "small", *COMMON, *PLAIN, "data.batch_size=8", "trainer.accumulate_grad_batches=5")
    assert len(small.weights) == 61
    torch.testing.assert_close(torch.stack(small.weights[::5]), torch.stack(large), rtol=1e-4, atol=1e-6)
    assert torch.equal(small.weights[1], small.weights[0])


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_precision_is_that_of_the_layers_not_of_the_weights(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    recorder = record(tmp_path, *COMMON, f"trainer.precision={precision}")
    assert recorder.dtypes == {dtype}
    assert recorder.weights[-1].dtype == torch.float32
    assert not torch.equal(recorder.weights[-1], recorder.weights[0])


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
@pytest.mark.slow
def test_a_trace_shows_three_steps_operation_by_operation(tmp_path: Path) -> None:
    train(compose_tiny(tmp_path, *COMMON, "debug=trace", "data.num_rows=400"))
    (path,) = tmp_path.glob("*.pt.trace.json")
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 3
    assert names.count("aten::linear") == 2 * 3
    assert names.count("Optimizer.step#Adam.step") == 3
    assert "aten::linear" in (tmp_path / "fit-trace.txt").read_text()


@pytest.mark.slow
def test_a_profile_names_the_hooks(tmp_path: Path) -> None:
    train(compose_tiny(tmp_path, *COMMON, "debug=profile"))
    rows = [line.split("|") for line in (tmp_path / "fit-profile.txt").read_text().splitlines() if "|" in line]
    calls = {row[1].strip(): row[3].strip() for row in rows if len(row) > 4}
    assert calls["run_training_batch"] == "24"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as the command ignores it
def test_a_run_with_early_stopping_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    stop = ("callbacks=[minimal,early_stopping]", "scheduler=step", "test=false")
    train(compose_tiny(tmp_path / "whole", *stop, "trainer.max_epochs=2"))
    train(compose_tiny(tmp_path / "first", *stop, "trainer.max_epochs=1"))
    path = tmp_path / "first" / "checkpoints" / "last.ckpt"
    train(compose_tiny(tmp_path / "second", *stop, "trainer.max_epochs=2", f"ckpt_path={path}"))
    assert_equal(last(tmp_path / "whole"), last(tmp_path / "second"))
