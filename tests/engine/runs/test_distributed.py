"""trainer=ddp_cpu as a command: several processes on one machine train the model that one would train."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.engine.runs.build import load_checkpoint, restore, restore_datamodule
from src.engine.runs.processes import GRACE
from src.engine.settings.check import ROOT
from src.train import train
from tests.compose import compose_cfg, run_command
from tests.engine.equality import assert_same_run, scalars
from tests.processes import living, wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to look for processes")

AT_ONCE = 3 * GRACE  # seconds in which a busy machine gets to the end of a run that is to end by itself
ENV = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # threads that outnumber the cores spin for each other

# 249 images in batches of 66: the last has 51; 51 images of validation in batches of 10: the last has 11.
SIZES = ("data.val_size=51", "data.batch_size=66", "data.eval_batch_size=10")
DATA = ("data.source=files", "data.md5=null", *SIZES, "trainer.log_every_n_steps=2")


class Run(NamedTuple):
    """A run that has ended: its folder and what it has printed."""

    path: Path
    stdout: str
    stderr: str

    @property
    def metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = json.loads((self.path / "metrics.json").read_text())["metrics"]
        return metrics

    def weights(self, name: str = "last") -> torch.Tensor:
        """All parameters of a checkpoint, (N,)."""
        state = load_checkpoint(self.path / "checkpoints" / f"{name}.ckpt")["state_dict"]
        return torch.cat([tensor.flatten() for tensor in state.values()])


def command(verb: str, root: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and look that it leaves no process."""
    result = run_command(verb, *arguments, cwd=ROOT, PROJECT_ROOT=str(root), **ENV, **env)
    wait_until(lambda: not living(str(root)), seconds=60)
    return result


def train_together(root: Path, data: Path, *arguments: str) -> Run:
    """Train for two epochs, into one folder."""
    overrides = ("trainer=ddp_cpu", "trainer.max_epochs=2", f"data.root={data}", *DATA)
    result = command("train", root, *overrides, *arguments)
    assert result.returncode == 0, result.stderr
    (folder,) = (root / "logs" / "train").iterdir()
    return Run(folder, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Run:
    """The run in one process."""
    path = tmp_path_factory.mktemp("alone")
    overrides = ("trainer=cpu", "trainer.max_epochs=2", f"data.root={mnist_root}", *DATA, "callbacks=minimal")
    train(compose_cfg(path, *overrides, "logger=[]"))
    return Run(path, "", "")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Run:
    """The same run in two processes."""
    return train_together(tmp_path_factory.mktemp("together"), mnist_root)


def assert_equal_runs(run: Run, alone: Run) -> None:
    assert run.metrics.keys() == alone.metrics.keys() | {"train/images_per_second"}
    for name, value in alone.metrics.items():
        assert run.metrics[name] == pytest.approx(value, rel=0 if name.endswith("/acc") else 1e-5), name
    torch.testing.assert_close(run.weights(), alone.weights(), rtol=0, atol=2e-6)


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(together: Run, alone: Run) -> None:
    assert_equal_runs(together, alone)


@pytest.mark.slow
def test_three_processes_train_the_model_of_one(tmp_path: Path, mnist_root: Path, alone: Run) -> None:
    assert_equal_runs(train_together(tmp_path, mnist_root, "trainer.devices=3"), alone)


@pytest.mark.slow
def test_two_processes_go_on_in_the_midst_of_an_epoch_of_one(tmp_path: Path, mnist_root: Path, alone: Run) -> None:
    mid = "{_target_: pytorch_lightning.callbacks.ModelCheckpoint, filename: mid, every_n_train_steps: 6}"
    overrides = ("trainer=cpu", "trainer.max_epochs=2", f"data.root={mnist_root}", *DATA, "callbacks=minimal")
    train(compose_cfg(tmp_path / "mid", *overrides, "logger=[]", f"+callbacks.mid={mid}"))
    (checkpoint,) = (tmp_path / "mid").rglob("mid*.ckpt")
    assert load_checkpoint(checkpoint)["global_step"] == 6  # of 8, four an epoch

    run = train_together(tmp_path, mnist_root, f"ckpt_path='{checkpoint}'")
    torch.testing.assert_close(run.weights(), alone.weights(), rtol=0, atol=2e-6)


EXACT = ("data.augment=affine", "data.batch_size=10", "callbacks.last.every_n_steps=3", "trainer.max_epochs=3")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Run:
    """A run in two processes that nothing stops, of three epochs with augmentation."""
    return train_together(tmp_path_factory.mktemp("exact"), mnist_root, *EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_that_were_stopped_go_on_exactly(
    signum: signal.Signals, exact: Run, tmp_path: Path, mnist_root: Path
) -> None:
    root = tmp_path / "stopped"
    last = root / "run" / "checkpoints" / "last.ckpt"
    hold = "+callbacks.hold={_target_: hold.HoldAt, step: 35}"  # in the midst of the second epoch of three
    with at_work(root, mnist_root, *EXACT, "logger=tensorboard", "callbacks=default", hold) as (first, _):
        wait_until((root / "held").exists, seconds=120)
        first.send_signal(signum)
        if signum == signal.SIGTERM:
            (root / "released").touch()
        assert first.wait(60) == (-9 if signum == signal.SIGKILL else 143)
        wait_until(lambda: not living(str(root)), seconds=60)
    (root / "released").touch()
    checkpoint = load_checkpoint(last)
    assert len(checkpoint["processes"]) == 2
    assert checkpoint["global_step"] == (33 if signum == signal.SIGKILL else 36)
    result = command("train", tmp_path, f"resume={last.parents[1]}", **held(root))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("going on from") == 1
    assert "not an exact continuation" not in result.stderr
    assert_same_run(exact.path, last.parents[1])


@pytest.mark.slow
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


@pytest.mark.slow
def test_one_process_speaks_for_both(together: Run) -> None:
    assert [line.split()[:2] for line in together.stderr.splitlines()] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert together.stdout.count("trained and tested") == 1
    assert together.stdout.count("Total params") == 1


@pytest.mark.slow
def test_one_process_writes_for_both(together: Run) -> None:
    names = {path.name for path in together.path.iterdir() if not path.name.startswith("events.out")}
    projector = {"projector_config.pbtxt", "00008"}
    own = {"config.yaml", "hparams.yaml", "metrics.json", "status.json", "train.log", "checkpoints"}
    assert names == own | projector
    assert {path.name for path in (together.path / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    events = EventAccumulator(str(together.path))
    events.Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps["lr-Adam"] == [1, 3, 5, 7]
    for tag in ("train/loss", "train/acc", "train/images_per_second", "val/loss", "val/acc"):
        assert steps[tag] == [3, 7], tag


@pytest.mark.slow
def test_a_checkpoint_is_tested_by_two_processes_as_by_one(tmp_path: Path, together: Run) -> None:
    checkpoint = together.path / "checkpoints" / "best.ckpt"
    devices = ("accelerator=cpu", "accelerator.devices=2")
    result = command("test", tmp_path, f"ckpt_path='{checkpoint}'", *devices, "data.batch_size=7")
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "logs" / "test").iterdir()
    tested = json.loads((path / "metrics.json").read_text())
    assert sum(map(sum, tested["confusion"])) == 60
    for name in ("test/acc", "test/loss"):
        assert tested["metrics"][name] == pytest.approx(together.metrics[name], rel=0 if "acc" in name else 1e-6)
    assert result.stdout.count("confusion matrix") == result.stdout.count("written to") == 1


# What holds the second process in the second epoch, as a fault of the network or of a disk would, or lets it fail; what
# holds both ahead of a step, until a file says otherwise; what makes validation last; a net that makes a test last.
HOLD = """
import os, time
from pathlib import Path
import torch
from pytorch_lightning.callbacks import Callback

class Hold(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        while trainer.current_epoch == 1 and trainer.global_rank == 1:
            time.sleep(0.1)

class Fail(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1 and trainer.global_rank == 1:
            raise ValueError("the second process fails")

class HoldAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        while trainer.global_step == self.step and not Path(__file__).with_name("released").exists():
            Path(__file__).with_name("held").touch()
            time.sleep(0.1)

class SlowValidation(Callback):
    def on_validation_start(self, trainer, pl_module):
        Path(__file__).with_name("validates").touch()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(5)

class Net(torch.nn.Module):
    def __init__(self, **_):
        super().__init__()
        self.layer = torch.nn.Linear(32 * 32, 10)

    def forward(self, images):
        while "TESTS" in os.environ:
            Path(__file__).with_name("tests").touch()
            time.sleep(0.1)
        return self.layer(images.flatten(1))
"""


def held(root: Path) -> dict[str, str]:
    """The environment of commands that use the above."""
    root.mkdir(exist_ok=True)
    (root / "hold.py").write_text(HOLD)
    return {"PYTHONPATH": f"{ROOT}:{root}", "ALLOWED_TARGETS": "hold"}


@contextmanager
def at_work(
    root: Path, data: Path, *arguments: str, is_to_last: bool = True
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A run of two processes, in the midst of its training or at its start: the first one, and the second's number."""
    environment = {**os.environ, **ENV, **held(root)}
    command = [
        sys.executable, "-m", "src.train", "trainer=ddp_cpu", "trainer.max_epochs=100000", f"data.root={data}", *DATA,
        "logger=[]", "callbacks=minimal", f"hydra.run.dir={root}/run", *arguments,
    ]  # fmt: skip
    with (root / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stderr, stderr=stderr)
    try:
        if is_to_last:
            wait_until(lambda: process.poll() is not None or "epoch 1/" in (root / "stderr").read_text(), seconds=120)
        wait_until(lambda: process.poll() is not None or len(living(str(root))) == 2, seconds=120)
        (child,) = living(str(root)) - {process.pid}
        yield process, child
    finally:
        process.kill()
        process.wait()


def end(root: Path, data: Path, signum: signal.Signals, rank: int, *arguments: str) -> tuple[int, float, str]:
    """Send a signal to one of two processes; exit status, seconds until both have ended, and what was said."""
    with at_work(root, data, *arguments) as (first, child):
        start = time.monotonic()
        os.kill(child if rank else first.pid, signum)
        status = first.wait(120)
        wait_until(lambda: not living(str(root)), seconds=60)
        seconds = time.monotonic() - start
    lines = (root / "stderr").read_text().splitlines()
    return status, seconds, "\n".join(line for line in lines if not line.startswith("epoch"))


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_to_the_first_process_ends_both(
    signum: signal.Signals, expected: int, tmp_path: Path, mnist_root: Path
) -> None:
    status, seconds, said = end(tmp_path, mnist_root, signum, rank=0)
    assert (status, said) == (expected, "")
    assert seconds < AT_ONCE


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run(tmp_path: Path, mnist_root: Path) -> None:
    status, seconds, said = end(tmp_path, mnist_root, signal.SIGKILL, rank=1)
    assert status in (1, -9)  # by its broken connection, or by Lightning, which looks every five seconds
    assert "another process of this run has ended" in said or status == -9
    assert len(said.splitlines()) <= 1
    assert seconds < AT_ONCE


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run_and_says_why(tmp_path: Path, mnist_root: Path) -> None:
    with at_work(tmp_path, mnist_root, "+callbacks.fail._target_=hold.Fail", is_to_last=False) as (first, _):
        start = time.monotonic()
        assert first.wait(120) in (1, -9)  # as where it is killed
        wait_until(lambda: not living(str(tmp_path)), seconds=60)
    assert time.monotonic() - start < 2 * AT_ONCE
    assert "[rank 1] error: ValueError: the second process fails" in (tmp_path / "stderr").read_text()


@pytest.mark.slow
def test_a_signal_in_a_long_validation_waits_for_its_end_and_saves(tmp_path: Path, mnist_root: Path) -> None:
    # Of 51 images, two processes have three batches of ten each.
    slow = ("+callbacks.slow._target_=hold.SlowValidation", "data.eval_batch_size=20")
    with at_work(tmp_path, mnist_root, *slow, is_to_last=False) as (first, _):
        wait_until((tmp_path / "validates").exists, seconds=120)
        start = time.monotonic()
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) == 143
        assert time.monotonic() - start > GRACE
        wait_until(lambda: not living(str(tmp_path)), seconds=60)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 4  # the first epoch


@pytest.mark.slow
def test_a_test_of_two_processes_ends_on_a_signal(tmp_path: Path, mnist_root: Path) -> None:
    env = held(tmp_path)
    net = ("model.net={_target_: hold.Net}", "logger=[]", "callbacks=minimal", "test=false", "trainer=cpu")
    short = ("trainer.max_epochs=1", f"data.root={mnist_root}", *DATA, f"hydra.run.dir={tmp_path}/run")
    result = command("train", tmp_path, *net, *short, **env)
    assert result.returncode == 0, result.stderr
    words = [f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt", "accelerator=cpu", "accelerator.devices=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "src.test", *words, f"hydra.run.dir={tmp_path}/test"], cwd=ROOT,
        env={**os.environ, **ENV, **env, "TESTS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until((tmp_path / "tests").exists, seconds=120)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)
        assert (process.returncode, said) == (143, ("", ""))
        wait_until(lambda: not living(str(tmp_path)), seconds=60)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_process_that_is_stopped_ends_the_run(tmp_path: Path, mnist_root: Path) -> None:
    status, seconds, said = end(tmp_path, mnist_root, signal.SIGTERM, rank=1)
    assert (status, said) == (143, "")
    assert seconds < AT_ONCE


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_that_waits_for_one_of_its_processes(
    signum: signal.Signals, expected: int, tmp_path: Path, mnist_root: Path
) -> None:
    status, seconds, said = end(tmp_path, mnist_root, signum, 0, "+callbacks.hold._target_=hold.Hold")
    assert (status, said) == (expected, "")
    assert seconds < AT_ONCE


def sweep(root: Path, data: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    result = command(
        "train", root, "-m", "trainer=ddp_cpu", "accelerator.devices=2", "optimizer.lr=0.001,0.01",
        "trainer.max_epochs=2", f"data.root={data}", *DATA, "callbacks=minimal", f"hydra.sweep.dir={root}/sweep",
        *arguments,
    )  # fmt: skip
    with (root / "sweep" / "sweep.csv").open() as file:
        return result, {row["job"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_a_sweeps_jobs_are_two_processes_each(tmp_path: Path, mnist_root: Path) -> None:
    result, rows = sweep(tmp_path, mnist_root)
    assert result.returncode == 0, result.stderr
    assert {job: row["status"] for job, row in rows.items()} == {
        "optimizer.lr=0.001": "finished", "optimizer.lr=0.01": "finished"
    }  # fmt: skip
    scores = {}
    for job in rows:
        folder = tmp_path / "sweep" / job
        record = json.loads((folder / "metrics.json").read_text())
        scores[job] = record["best"]["score"]
        console = (folder / "console.log").read_text().splitlines()
        assert [line.split()[1] for line in console if line.startswith("epoch")] == ["1/2", "2/2"]
        assert {path.name for path in folder.glob("*.log")} == {"console.log", "train.log"}
        assert len(load_checkpoint(folder / "checkpoints" / "last.ckpt")["processes"]) == 2
    winner = next(iter(rows))
    assert winner == max(scores, key=lambda job: scores[job])
    names = {path.name for path in (tmp_path / "sweep").iterdir() if not path.name.startswith("events.out")}
    assert names == {".lock", "sweep.csv", "sweep.json", "sweep.md", "sweep.png", *rows}
    assert [path.parent.parent.name for path in (tmp_path / "sweep").glob("*/test/metrics.json")] == [winner]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    assert {job: float(row["best val/acc"]) for job, row in rows.items()} == pytest.approx(scores)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("trainer.num_nodes=1", "trainer.devices=2: in a sweep this needs hydra/launcher=one_process"),
        ("trainer.num_nodes=2", "trainer.num_nodes=2: in a sweep this needs hydra/launcher=submitit_slurm"),
    ],
)
def test_a_sweep_in_one_process_refuses_jobs_of_several(
    more: str, reason: str, tmp_path: Path, mnist_root: Path
) -> None:
    result, rows = sweep(tmp_path, mnist_root, "hydra/launcher=basic", more)
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("  ")] == [
        f"  optimizer.lr={lr}: {reason}" for lr in ("0.001", "0.01")
    ]
    assert [row["error"] for row in rows.values()] == [reason] * 2


@pytest.mark.slow
def test_tests_of_several_checkpoints_refuse_processes_of_their_own(tmp_path: Path, together: Run) -> None:
    folder = together.path / "checkpoints"
    result = command(
        "test", tmp_path, "-m", f"ckpt_path='{folder}/best.ckpt','{folder}/last.ckpt'", "accelerator=cpu",
        "accelerator.devices=2",
    )  # fmt: skip
    assert result.returncode == 1
    assert "accelerator.devices=2: in a sweep this needs hydra/launcher=one_process" in result.stderr


@pytest.mark.slow
def test_a_job_that_is_queued_again_before_its_first_checkpoint_has_its_curves_once(
    tmp_path: Path, mnist_root: Path
) -> None:
    arguments = ("trainer=ddp_cpu", "trainer.max_epochs=1", f"data.root={mnist_root}", *DATA, "callbacks=minimal")
    fail, folder = "+callbacks.fail={_target_: tests.engine.faults.FailAt, step: ", tmp_path / "run"
    env = {"ALLOWED_TARGETS": "tests"}
    first = command("train", tmp_path, *arguments, f"{fail}3}}", f"hydra.run.dir={folder}", **env)
    assert first.returncode in (1, -9)
    assert not list(folder.rglob("*.ckpt"))
    again = command(
        "train", tmp_path, *arguments, f"{fail}9}}", f"hydra.run.dir={folder}", **env, SLURM_RESTART_COUNT="1"
    )
    assert again.returncode == 0, again.stderr
    assert len(list(folder.glob("events.out.*"))) > 1
    assert [step for step, _ in scalars(folder)["train/loss"]] == [3]
