"""Lightning's own tools, by a word on the command line: each does in a run of this project what it promises."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from src.engine.errors import ConfigError
from src.engine.runs.build import build_datamodule, build_module, build_trainer, load_checkpoint
from src.engine.runs.evaluate import test_checkpoint as run_test_checkpoint  # pytest would collect it by its own name
from src.engine.settings.rules import METRICS
from src.train import train
from tests.compose import compose_cfg, run_command
from tests.engine.equality import assert_equal


@pytest.fixture
def common(mnist_root: Path) -> list[str]:
    """250 images in 10 batches of 25, and nothing beside the training."""
    return [
        f"data.root={mnist_root}", "data.source=files", "data.md5=null", "data.val_size=50", "data.batch_size=25",
        "trainer=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "callbacks=minimal", "logger=[]",
        "test=false",
    ]  # fmt: skip


class Recorder(Callback):
    """The weights ahead of the training and behind each of its steps, each in a row; what the first layer puts out."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.dtypes: set[torch.dtype] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights.append(flat(pl_module))
        layer: Any = pl_module.net.c1  # type: ignore[union-attr]
        layer.register_forward_hook(lambda module, inputs, output: self.dtypes.add(output.dtype))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.weights.append(flat(pl_module))


def flat(module: pl.LightningModule) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in module.parameters()])


def record(folder: Path, *overrides: str) -> Recorder:
    """Train with a recorder."""
    cfg = compose_cfg(folder, *overrides)
    pl.seed_everything(cfg.seed, verbose=False)
    trainer, recorder = build_trainer(cfg), Recorder()
    trainer.callbacks.insert(0, recorder)  # type: ignore[attr-defined]
    trainer.fit(build_module(cfg), build_datamodule(cfg))
    return recorder


def last(folder: Path) -> dict[str, Any]:
    """What a run would go on with."""
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    return {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_metrics_that_may_be_monitored_are_those_logged(common: list[str], tmp_path: Path) -> None:
    cfg = compose_cfg(tmp_path, *common, "callbacks=default", "trainer.max_epochs=1", "callbacks.summary=null")
    trainer = build_trainer(cfg)
    trainer.fit(build_module(cfg), build_datamodule(cfg))
    assert set(trainer.callback_metrics) == {metric for metrics in METRICS.values() for metric in metrics}


def test_early_stopping_stops_behind_the_first_epoch_that_is_no_better(common: list[str], tmp_path: Path) -> None:
    more = ("trainer.max_epochs=12", "scheduler=[]", "optimizer.lr=0.01", "monitor=val/loss", "mode=min", "logger=csv")
    train(compose_cfg(tmp_path / "whole", *common, *more))
    losses = [float(row["val/loss"]) for row in table(tmp_path / "whole") if row["val/loss"]]
    expected = next(epoch for epoch in range(1, 12) if losses[epoch] >= min(losses[:epoch]))
    train(
        compose_cfg(
            tmp_path / "stopped", *common, *more, "callbacks=[minimal,early_stopping]",
            "callbacks.early_stopping.patience=1",
        )
    )  # fmt: skip
    stopped = [float(row["val/loss"]) for row in table(tmp_path / "stopped") if row["val/loss"]]
    assert stopped == losses[: expected + 1]
    assert expected < 11


@pytest.mark.parametrize("scheduler", ["onecycle", "step", "[]"])
def test_the_rate_that_is_found_trains_as_if_it_had_been_given(
    scheduler: str, common: list[str], tmp_path: Path
) -> None:
    find = ("callbacks=[minimal,lr_find]", "callbacks.lr_find.num_training_steps=20", "callbacks.lr_find.max_lr=0.1")
    train(compose_cfg(tmp_path / "found", *common, *find, f"scheduler={scheduler}", "logger=tensorboard"))
    events = EventAccumulator(str(tmp_path / "found"))
    events.Reload()
    assert events.Tags()["images"] == ["lr_find"]
    (image,) = events.Images("lr_find")
    page = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")).astype(int)  # (H, W, 3)
    blue = (np.abs(page - (31, 119, 180)).max(axis=2) < 40).any(axis=0).nonzero()[0]  # columns with the curve
    assert len(blue) > 0.5 * page.shape[1]
    dotted = (page.max(axis=2) < 60).sum(axis=0)[blue.min() + 1 : blue.max()]  # black pixels a column, by the curve
    assert dotted.max() > 0.2 * page.shape[0]  # the rate that was taken
    assert (dotted > 0.2 * page.shape[0]).sum() <= 3
    (suggestion,) = (event.value for event in events.Scalars("lr_find/suggestion"))
    assert 1e-6 < suggestion < 0.1
    assert suggestion != pytest.approx(0.004)
    # TensorBoard's number is of 32 bits; the rates that were tested are a geometric row.
    rate = min((1e-6 * (0.1 / 1e-6) ** (step / 20) for step in range(1, 22)), key=lambda lr: abs(lr - suggestion))
    train(compose_cfg(tmp_path / "given", *common, f"optimizer.lr={rate!r}", f"scheduler={scheduler}"))
    one, other = (load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("found", "given"))
    assert_equal(one["state_dict"], other["state_dict"])
    assert list((tmp_path / "found").glob(".lr_find*")) == []


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as the command ignores it
@pytest.mark.parametrize(
    "option", [["lr_find", "callbacks.lr_find.num_training_steps=20"], ["weight_averaging"], ["early_stopping"]]
)
def test_a_run_with_a_tool_goes_on_as_if_it_had_not_stopped(
    option: list[str], common: list[str], tmp_path: Path
) -> None:
    tool = [f"callbacks=[minimal,{option[0]}]", *option[1:], "scheduler=step", "data.batch_size=10"]
    train(compose_cfg(tmp_path / "whole", *common, *tool, "trainer.max_epochs=2"))
    train(compose_cfg(tmp_path / "first", *common, *tool, "trainer.max_epochs=1"))
    path = tmp_path / "first" / "checkpoints" / "last.ckpt"
    train(compose_cfg(tmp_path / "second", *common, *tool, "trainer.max_epochs=2", f"ckpt_path={path}"))
    assert_equal(last(tmp_path / "whole"), last(tmp_path / "second"))


@pytest.mark.slow
def test_two_processes_find_one_rate_and_say_so_once(tmp_path: Path) -> None:
    result = run_command(
        "train", "data=mnist5k", "trainer=ddp_cpu", "trainer.max_epochs=2", "callbacks=[minimal,lr_find]",
        "logger=[]", PROJECT_ROOT=str(tmp_path), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = [line.split("  ")[0] for line in result.stderr.splitlines()]
    assert [line.partition("=")[0] for line in said] == ["optimizer.lr", "epoch 1/2", "epoch 2/2"]


def test_a_range_test_longer_than_the_run_is_refused(common: list[str], tmp_path: Path) -> None:
    cfg = compose_cfg(tmp_path, *common, "callbacks=[minimal,lr_find]")
    with pytest.raises(ConfigError, match=r"num_training_steps=100: expected at most the steps of the run, 20"):
        train(cfg)


def test_averaged_weights_are_those_computed_by_hand_and_are_tested(common: list[str], tmp_path: Path) -> None:
    averaging = ("callbacks=[minimal,weight_averaging]", "callbacks.weight_averaging.decay=0.8")
    recorder = record(tmp_path / "recorded", *common, *averaging)
    _, average, *others = recorder.weights
    for weights in others:
        average = 0.8 * average + 0.2 * weights
    state = last(tmp_path / "recorded")["state_dict"]
    found = torch.cat([tensor.flatten() for name, tensor in state.items() if name.startswith("net.")])
    torch.testing.assert_close(found, average, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, recorder.weights[-1], rtol=1e-3)

    metrics = train(compose_cfg(tmp_path / "tested", *common, *averaging, "test=true"))
    best = tmp_path / "tested" / "checkpoints" / "best.ckpt"
    again = run_test_checkpoint(best, tmp_path / "again", {"accelerator": "cpu", "devices": 1})["metrics"]
    assert again["test/loss"] == pytest.approx(metrics["test/loss"])
    assert again["test/acc"] == metrics["test/acc"]


def test_device_stats_stand_beside_the_curves(common: list[str], tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    stats = "callbacks=[minimal,device_stats]"
    train(compose_cfg(tmp_path / "csv", *common, stats, "logger=csv", "trainer.max_epochs=1"))
    (name,) = (name for name in table(tmp_path / "csv")[0] if name.endswith("on_train_batch_end/cpu_vm_percent"))
    values = [float(row[name]) for row in table(tmp_path / "csv") if row[name]]
    assert len(values) == 10
    assert all(0 < value <= 100 for value in values)
    train(compose_cfg(tmp_path / "none", *common, stats, "trainer.max_epochs=1"))  # nowhere to log to
    train(compose_cfg(tmp_path / "plain", *common, "trainer.max_epochs=1"))
    assert_equal(last(tmp_path / "csv"), last(tmp_path / "plain"))


PLAIN = ("optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.lr=0.05", "scheduler=[]")


def test_clipped_gradients_are_of_the_length_asked_for(common: list[str], tmp_path: Path) -> None:
    def lengths(name: str, clip: str) -> Tensor:
        """Of each step's gradient: by what the weights have moved, over the rate."""
        weights = torch.stack(record(tmp_path / name, *common, *PLAIN, f"trainer.gradient_clip_val={clip}").weights)
        moved: Tensor = weights.diff(dim=0).norm(dim=1) / 0.05
        return moved

    free, clipped = lengths("free", "null"), lengths("clipped", "0.2")
    assert (free > 0.21).sum() > 10
    torch.testing.assert_close(clipped[free > 0.21][:1], torch.tensor([0.2]), rtol=1e-3, atol=0)
    assert clipped.max() <= 0.2001


def test_accumulated_gradients_equal_those_of_larger_batches(common: list[str], tmp_path: Path) -> None:
    large = record(tmp_path / "large", *common, *PLAIN, "data.batch_size=50").weights
    small = record(tmp_path / "small", *common, *PLAIN, "data.batch_size=10", "trainer.accumulate_grad_batches=5")
    assert len(small.weights) == 51
    torch.testing.assert_close(torch.stack(small.weights[::5]), torch.stack(large), rtol=1e-4, atol=1e-6)
    assert torch.equal(small.weights[1], small.weights[0])


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_precision_is_that_of_the_layers_not_of_the_weights(
    precision: str, dtype: torch.dtype, common: list[str], tmp_path: Path
) -> None:
    recorder = record(tmp_path, *common, f"trainer.precision={precision}")
    assert recorder.dtypes == {dtype}
    assert recorder.weights[-1].dtype == torch.float32
    assert not torch.equal(recorder.weights[-1], recorder.weights[0])


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_a_trace_shows_three_steps_operation_by_operation(common: list[str], tmp_path: Path) -> None:
    train(compose_cfg(tmp_path, *common, "debug=trace"))
    (path,) = tmp_path.glob("*.pt.trace.json")
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 3
    assert names.count("aten::conv2d") == 2 * 3
    assert names.count("Optimizer.step#Adam.step") == 3
    assert "aten::conv2d" in (tmp_path / "fit-trace.txt").read_text()


def test_a_profile_names_the_hooks(common: list[str], tmp_path: Path) -> None:
    train(compose_cfg(tmp_path, *common, "debug=profile"))
    rows = [line.split("|") for line in (tmp_path / "fit-profile.txt").read_text().splitlines() if "|" in line]
    calls = {row[1].strip(): row[3].strip() for row in rows if len(row) > 4}
    assert calls["run_training_batch"] == "20"
