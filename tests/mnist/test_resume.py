"""LeNet-5 on MNIST resumes to the bit, with augmentation and all that a run shows."""

import signal
from pathlib import Path

import pytest

from src.engine.runs.build import load_checkpoint
from tests.engine.equality import assert_equal, assert_same_run, scalars
from tests.forks import run_command

KILL = "+callbacks.kill={_target_: tests.engine.faults.KillAt, step: "
FAIL = "+callbacks.fail={_target_: tests.engine.faults.FailAt, step: "


def train(status: int, root: Path, *arguments: str) -> str:
    """Train, with an exit status that is expected; what was said as an error."""
    result = run_command("train", *arguments, PROJECT_ROOT=str(root), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == status, result.stderr
    return result.stderr


@pytest.fixture
def arguments(mnist_root: Path) -> list[str]:
    """Two epochs of ten batches."""
    return [
        "trainer=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=3", f"data.root={mnist_root}",
        "data.source=files", "data.md5=null", "data.val_size=50", "data.batch_size=25", "data.eval_batch_size=20",
        "callbacks.last.every_n_steps=4",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_with_augmentation_ends_as_the_uninterrupted_one_to_the_bit(
    arguments: list[str], tmp_path: Path
) -> None:
    arguments += ["data.augment=elastic", "callbacks=[default,weight_averaging]", "logger=[tensorboard,csv]"]
    train(0, tmp_path, *arguments, f"hydra.run.dir={tmp_path}/whole")
    train(-signal.SIGKILL, tmp_path, *arguments, f"hydra.run.dir={tmp_path}/killed", f"{KILL}17}}")
    assert load_checkpoint(tmp_path / "killed" / "checkpoints" / "last.ckpt")["global_step"] == 16
    train(0, tmp_path, f"resume={tmp_path}/killed", "callbacks.kill=null")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_the_images_of_a_step_that_fails_are_not_lost(arguments: list[str], tmp_path: Path) -> None:
    arguments += ["callbacks=minimal"]
    train(0, tmp_path, *arguments, f"hydra.run.dir={tmp_path}/whole")
    train(1, tmp_path, *arguments, f"hydra.run.dir={tmp_path}/failed", f"{FAIL}13}}")
    train(0, tmp_path, f"resume={tmp_path}/failed", "callbacks.fail=null")
    weights = [
        load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("whole", "failed")
    ]
    assert_equal(*weights)
    assert scalars(tmp_path / "whole")["val/acc"] == scalars(tmp_path / "failed")["val/acc"]


def test_other_images_are_no_exact_continuation(arguments: list[str], tmp_path: Path) -> None:
    arguments += ["callbacks=minimal", "scheduler=[]"]
    train(0, tmp_path, *arguments, f"hydra.run.dir={tmp_path}/run")
    said = train(0, tmp_path, f"resume={tmp_path}/run", "trainer.max_epochs=3", "data.split_seed=1")
    differs, data = (line for line in said.splitlines() if "not an exact continuation" in line)
    assert "data.split_seed: 0 -> 1" in differs
    assert "fingerprint" in data
