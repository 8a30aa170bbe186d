"""The record says which checkpoint is best by what: compared with the logged curve, for each way to keep them."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from src.engine.runs.build import load_checkpoint
from src.engine.runs.checkpoints import find_best
from src.engine.runs.status import read_status
from src.train import train
from tests.engine.tiny import compose_tiny

# The commands ignore these, too; the last is true, and harmless.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "The dirpath has changed",
        "Checkpoint directory",
        r"`ModelCheckpoint\(monitor='val/acc'\)` could not",
    )
]

NODE = "callbacks.checkpoint"
TIMED = f"+{NODE}.train_time_interval={{_target_: datetime.timedelta, seconds: 0}}"
SLOW = pytest.mark.slow
EPOCHS, STEPS = 5, 4  # an epoch's
SHORT = (
    f"trainer.max_epochs={EPOCHS}",
    "data.num_rows=60",
    "data.batch_size=15",
    "scheduler=[]",
    "test=false",
    "optimizer.lr=0.3",
)  # a curve that goes up and down


class Curve(Callback):
    """Keeps each value of ``val/acc`` with the step of its validation."""

    values: ClassVar[dict[int, float]] = {}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.values[trainer.global_step] = float(trainer.callback_metrics["val/acc"])


def run(folder: Path, *overrides: str) -> tuple[dict[str, Any], dict[int, float]]:
    """The record of a run, and its curve."""
    Curve.values = {}
    train(compose_tiny(folder, *SHORT, f"+callbacks.curve._target_={__name__}.Curve", *overrides))
    status = read_status(folder)
    assert status["state"] == "finished"
    best = json.loads((folder / "metrics.json").read_text())["best"]
    assert [status["best"][key] for key in ("checkpoint", "monitor")] == [
        best[key] for key in ("checkpoint", "monitor")
    ]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.ckpt")}
    assert set(status.get("checkpoints", [])) == there
    return status, Curve.values


CASES = [
    (),
    (f"+{NODE}.save_top_k=-1",),
    (f"+{NODE}.save_top_k=2", f"{NODE}.enable_version_counter=true"),
    (f"{NODE}.filename=null",),
    (f"{NODE}.filename='acc={{val/acc:.3f}}'", f"+{NODE}.auto_insert_metric_name=false", f"+{NODE}.save_top_k=2"),
    (f"{NODE}.dirpath=${{output_dir}}/own", f"+{NODE}.verbose=true"),
    (f"{NODE}.mode=min",),
    (f"+{NODE}.save_last=true",),
    (f"+{NODE}.save_last=link", f"+{NODE}.save_top_k=2"),
    (f"+{NODE}.save_weights_only=true", f"+{NODE}.save_on_exception=true"),
    (f"+{NODE}.every_n_epochs=2",),
    (f"+{NODE}.save_on_train_epoch_end=true", f"+{NODE}.save_top_k=2"),
    (f"+{NODE}.save_top_k=3", "+trainer.val_check_interval=2"),
]


# Each argument of ModelCheckpoint, by itself and with others.
@pytest.mark.parametrize(
    "overrides",
    [
        (f"+{NODE}.save_top_k=3",),
        *(pytest.param(case, marks=SLOW) for case in CASES),
    ],
    ids=" ".join,
)
def test_the_recorded_checkpoint_is_the_best_of_the_curve(overrides: tuple[str, ...], tmp_path: Path) -> None:
    status, curve = run(tmp_path, *overrides)
    mode = min if f"{NODE}.mode=min" in overrides else max
    every = 2 * STEPS if f"+{NODE}.every_n_epochs=2" in overrides else 1
    expected = mode(value for step, value in curve.items() if step % every == 0)
    best = load_checkpoint(find_best(tmp_path))
    assert status["best"]["monitor"] == "val/acc"
    assert status["best"]["score"] == expected == curve[best["global_step"]]
    (count,) = [int(each.partition("=")[2]) for each in overrides if "save_top_k" in each] or [1]
    files = {path for path in tmp_path.rglob("*.ckpt") if path.name != "last.ckpt"}
    assert len(files) == (count if count > 0 else len(curve))
    scores = sorted(curve[load_checkpoint(path)["global_step"]] for path in files)
    ranked = sorted((value for step, value in curve.items() if step % every == 0), reverse=mode is max)
    assert scores == sorted(ranked[: len(files)])


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((f"{NODE}.monitor=null",), "best.ckpt"),
        pytest.param((f"{NODE}.monitor=null", f"+{NODE}.save_top_k=-1"), "best-epoch=4-step=20.ckpt", marks=SLOW),
        pytest.param((f"{NODE}.monitor=null", TIMED), "best.ckpt", marks=SLOW),
        pytest.param((f"+{NODE}.save_top_k=0",), "last.ckpt", marks=SLOW),
        pytest.param((f"{NODE}=null",), "last.ckpt", marks=SLOW),
        (("trainer.limit_val_batches=0",), "last.ckpt"),
        (("trainer.check_val_every_n_epoch=9",), "last.ckpt"),
        (("+trainer.max_steps=3",), "last.ckpt"),
    ],
)
def test_what_nothing_was_compared_for_is_called_the_last(
    overrides: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    status, _ = run(tmp_path, *overrides)
    assert (status["best"]["score"], status["best"]["monitor"]) == (None, None)
    assert find_best(tmp_path) == tmp_path / "checkpoints" / name
    assert load_checkpoint(find_best(tmp_path))["global_step"] == (
        3 if "+trainer.max_steps=3" in overrides else EPOCHS * STEPS
    )


def test_without_any_checkpoint_callback_there_is_none(tmp_path: Path) -> None:
    status, _ = run(tmp_path, f"{NODE}=null", "callbacks.last=null")
    assert status["best"]["checkpoint"] is None
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_of_two_the_one_that_goes_by_the_runs_monitor_decides(tmp_path: Path) -> None:
    other = "{_target_: pytorch_lightning.callbacks.ModelCheckpoint, dirpath: '${output_dir}/low', monitor: val/loss}"
    high = ("+callbacks.b.mode=max", "callbacks.b.monitor=val/acc", "callbacks.b.dirpath=${output_dir}/high")
    status, curve = run(tmp_path, f"{NODE}=null", f"+callbacks.a={other}", f"+callbacks.b={other}", *high)
    assert status["best"]["score"] == max(curve.values())
    assert status["best"]["checkpoint"].startswith("high/")


def test_a_moved_or_copied_run_goes_on_with_its_own_best(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    _, curve = run(first, f"+{NODE}.save_top_k=2")
    first.rename(second)
    last = second / "checkpoints" / "last.ckpt"
    kept = {path: path.read_bytes() for path in second.rglob("best*.ckpt")}
    resumed = (f"resume={second}", f"ckpt_path={last}", "trainer.max_epochs=6", "optimizer.lr=0.3")
    status, more = run(second, f"+{NODE}.save_top_k=2", *resumed)
    assert list(more) == [6 * STEPS]
    assert status["best"]["score"] == max([*curve.values(), *more.values()])
    assert find_best(second).is_relative_to(second)
    there = sorted({**curve, **more}[load_checkpoint(path)["global_step"]] for path in second.rglob("best*.ckpt"))
    assert there == sorted([*curve.values(), *more.values()])[-2:]
    assert not first.exists()
    assert all(not path.exists() or path.read_bytes() == content for path, content in kept.items())


def test_a_run_that_begins_from_anothers_checkpoint_does_not_call_that_ones_best_its_own(tmp_path: Path) -> None:
    run(tmp_path / "first")
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    second = tmp_path / "second"
    status, _ = run(second, f"ckpt_path={last}", "trainer.max_epochs=6", "trainer.check_val_every_n_epoch=9")
    assert status["best"]["checkpoint"] == "checkpoints/last.ckpt"
    assert load_checkpoint(find_best(second))["global_step"] == 6 * STEPS


def test_a_run_without_validation_calls_nothing_best_by_anothers_metrics(tmp_path: Path) -> None:
    run(tmp_path / "first")
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    second = tmp_path / "second"
    status, _ = run(second, f"ckpt_path={last}", "trainer.max_epochs=6", "trainer.limit_val_batches=0")
    assert (status["best"]["checkpoint"], status["best"]["score"]) == ("checkpoints/last.ckpt", None)
    assert "val/acc" not in json.loads((second / "metrics.json").read_text())["metrics"]


def test_a_run_says_what_it_comes_from_when_it_starts(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="step 5 fails"):
        run(tmp_path, "+callbacks.fail={_target_: tests.engine.faults.FailAt, step: 5}")
    status = read_status(tmp_path)
    assert status["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert status["threads"] == torch.get_num_threads()
    assert status["device"].startswith("cpu ")
    assert (status["train"], status["debug"], status["resumed_with"]) == (True, False, [])
