"""Two processes train LeNet-5 as one does, though the last batches of MNIST's splits are uneven."""

import json
import signal
from pathlib import Path

import pytest
import pytorch_lightning as pl

from src.engine.runs.build import load_checkpoint, restore, restore_datamodule
from src.train import train
from tests.compose import compose_cfg
from tests.engine.equality import assert_same_run
from tests.engine.together import Run, assert_equal_runs, run_together, train_together

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to look for processes"),
]

# 249 images in batches of 66: the last has 51; 51 images of validation in batches of 10: the last has 11.
SIZES = ("data.val_size=51", "data.batch_size=66", "data.eval_batch_size=10")
DATA = ("data.source=files", "data.md5=null", *SIZES, "trainer.log_every_n_steps=2", "trainer.max_epochs=2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Run:
    """The run in one process."""
    path = tmp_path_factory.mktemp("alone")
    train(compose_cfg(path, "trainer=cpu", f"data.root={mnist_root}", *DATA, "callbacks=minimal", "logger=[]"))
    return Run(path)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Run:
    """The same run in two processes."""
    arguments = ("trainer=ddp_cpu", f"data.root={mnist_root}", *DATA, "callbacks=minimal")
    return train_together(tmp_path_factory.mktemp("together"), *arguments)


def test_two_processes_train_the_model_of_one(together: Run, alone: Run) -> None:
    assert_equal_runs(together, alone)


def test_two_processes_that_are_killed_resume_to_the_bit(tmp_path: Path, mnist_root: Path) -> None:
    arguments = ("trainer=ddp_cpu", f"data.root={mnist_root}", *DATA, "data.augment=affine", "data.batch_size=10")
    often = ("callbacks.last.every_n_steps=3", "callbacks.embedding=null")
    whole = train_together(tmp_path / "whole", *arguments, *often)
    kill, folder = "+callbacks.kill={_target_: tests.engine.faults.KillAt, step: 35}", tmp_path / "killed"
    killed = run_together("train", tmp_path, *arguments, *often, kill, f"hydra.run.dir={folder}")
    assert killed.returncode == -signal.SIGKILL
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 33
    resumed = run_together("train", tmp_path, f"resume={folder}", "callbacks.kill=null")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(whole.path, folder)


def test_metrics_of_two_processes_are_those_of_one_with_the_same_weights(together: Run) -> None:
    for name, stage in (("last", "validate"), ("best", "test")):
        path = together.path / "checkpoints" / f"{name}.ckpt"
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        (metrics,) = getattr(trainer, stage)(restore(path), restore_datamodule(path), verbose=False)
        assert len(metrics) == 2
        for key, value in metrics.items():
            assert together.metrics[key] == pytest.approx(value, rel=0 if key.endswith("/acc") else 1e-6)


def test_a_checkpoint_is_tested_by_two_processes_as_by_one(tmp_path: Path, together: Run, mnist_root: Path) -> None:
    checkpoint = together.path / "checkpoints" / "best.ckpt"
    devices = ("accelerator=cpu", "accelerator.devices=2")
    result = run_together(
        "test", tmp_path, f"ckpt_path='{checkpoint}'", f"data.root={mnist_root}", *devices, "data.batch_size=7"
    )
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "logs" / "test").iterdir()
    tested = json.loads((path / "metrics.json").read_text())
    assert sum(map(sum, tested["confusion"])) == 60
    for name in ("test/acc", "test/loss"):
        assert tested["metrics"][name] == pytest.approx(together.metrics[name], rel=0 if "acc" in name else 1e-6)
    assert result.stdout.count("confusion matrix") == result.stdout.count("written to") == 1
