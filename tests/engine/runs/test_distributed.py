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
from typing import Any

import pytest
import torch
from torch import Tensor

from src.engine.runs.build import load_checkpoint
from src.engine.runs.processes import GRACE
from src.engine.settings.check import ROOT
from src.train import train
from tests import forks
from tests.engine.equality import assert_same_run, scalars, weights
from tests.engine.tiny import TINY, compose_tiny
from tests.engine.together import ENV, Run, assert_equal_runs, run_together, train_together
from tests.marks import by_default
from tests.processes import living, wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to look for processes")

AT_ONCE = 3 * GRACE  # seconds in which a busy machine gets to the end of a run that is to end by itself

# 4 steps an epoch; what differs between the processes, dropout and noise, is off.
COMMON = (
    *TINY, "data.batch_size=60", "model.net.dropout=0", "trainer.max_epochs=2", "trainer.log_every_n_steps=2",
    "callbacks=minimal",
)  # fmt: skip
TOGETHER = (*COMMON, "trainer=ddp_cpu")
LONG = (*TOGETHER, "trainer.max_epochs=100000", "logger=[]")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run in one process."""
    path = tmp_path_factory.mktemp("alone")
    train(compose_tiny(path, *COMMON[len(TINY) :], "logger=tensorboard"))
    return Run(path)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run in two processes."""
    summary = "+callbacks.summary._target_=pytorch_lightning.callbacks.RichModelSummary"
    return train_together(tmp_path_factory.mktemp("together"), *TOGETHER, summary)


def last_weights(run: Run) -> Tensor:
    return weights(run.path / "checkpoints" / "last.ckpt")


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(together: Run, alone: Run) -> None:
    assert_equal_runs(together, alone)


@pytest.mark.slow
def test_three_processes_train_the_model_of_one(tmp_path: Path, alone: Run) -> None:
    assert_equal_runs(train_together(tmp_path, *TOGETHER, "trainer.devices=3"), alone)


@pytest.mark.slow
def test_two_processes_resume_in_the_midst_of_an_epoch_of_one(tmp_path: Path, alone: Run) -> None:
    mid = "{_target_: pytorch_lightning.callbacks.ModelCheckpoint, filename: mid, every_n_train_steps: 6}"
    train(compose_tiny(tmp_path / "mid", *COMMON[len(TINY) :], "logger=tensorboard", f"+callbacks.mid={mid}"))
    (checkpoint,) = (tmp_path / "mid").rglob("mid*.ckpt")
    assert load_checkpoint(checkpoint)["global_step"] == 6  # of 8, four an epoch

    run = train_together(tmp_path, *TOGETHER, f"ckpt_path='{checkpoint}'")
    torch.testing.assert_close(last_weights(run), last_weights(alone), rtol=0, atol=2e-6)


EXACT = (
    *TOGETHER, "data.batch_size=10", "data.noise=0.1", "model.net.dropout=0.1", "callbacks.last.every_n_steps=3",
    "trainer.max_epochs=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in two processes that nothing stops, of three epochs with noise and dropout."""
    return train_together(tmp_path_factory.mktemp("exact"), *EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_that_were_stopped_resume_exactly(signum: signal.Signals, exact: Run, tmp_path: Path) -> None:
    root = tmp_path / "stopped"
    last = root / "run" / "checkpoints" / "last.ckpt"
    released = root / "released"
    # In the midst of the second epoch of three.
    wait = f"+callbacks.wait={{_target_: tests.engine.faults.WaitAt, step: 35, path: {released}}}"
    with at_work(root, *EXACT, "logger=tensorboard", wait) as (first, _):
        wait_until(lambda: said(root).count("waiting in") == 2, seconds=120)
        first.send_signal(signum)
        if signum == signal.SIGTERM:
            released.touch()
        assert first.wait(60) == (-9 if signum == signal.SIGKILL else 143)
        wait_until(lambda: not living(str(root)), seconds=60)
    checkpoint = load_checkpoint(last)
    assert len(checkpoint["processes"]) == 2
    assert checkpoint["global_step"] == (33 if signum == signal.SIGKILL else 36)
    released.touch()
    result = run_together("train", tmp_path, f"resume={last.parents[1]}")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(f"{last}, step ") == 1
    assert "not an exact continuation" not in result.stderr
    assert_same_run(exact.path, last.parents[1])


@pytest.mark.slow
def test_processes_that_torchrun_starts_once_more_resume_exactly(exact: Run, tmp_path: Path) -> None:
    folder, released = tmp_path / "run", tmp_path / "released"
    wait = f"+callbacks.wait={{_target_: tests.engine.faults.WaitAt, step: 35, path: {released}}}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*torchrun, "-m", "src.train", *EXACT, "logger=tensorboard", wait, f"hydra.run.dir={folder}"]
    env = {**os.environ, **ENV, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # pytorch#135712
    with (tmp_path / "stderr").open("wb") as stderr:
        agent = subprocess.Popen(command, cwd=ROOT, env=env, stdout=stderr, stderr=stderr)
    try:
        wait_until(lambda: agent.poll() is not None or said(tmp_path).count("waiting in") == 2, seconds=240)
        os.kill(max(living(str(folder)) - {agent.pid}), signal.SIGKILL)
        released.touch()
        wait_until(lambda: agent.poll() is not None, seconds=240)
        assert agent.returncode == 0, said(tmp_path)
    finally:
        agent.kill()
        agent.wait()
        for process in living(str(folder)):
            os.kill(process, signal.SIGKILL)
    assert said(tmp_path).count(f"{folder}/checkpoints/last.ckpt, step ") == 1
    assert not (folder / "error.txt").exists()
    assert_same_run(exact.path, folder)


@pytest.mark.slow
def test_one_process_speaks_for_both(together: Run) -> None:
    assert [line.split()[:2] for line in together.stderr.splitlines()] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert together.stdout.count("trained and tested") == 1
    assert together.stdout.count("Total params") == 1


@pytest.mark.slow
def test_one_process_writes_for_both(together: Run) -> None:
    names = {path.name for path in together.path.iterdir() if not path.name.startswith("events.out")}
    assert names - {"hparams.yaml", ".lock", "changes.patch"} == {
        "config.yaml",
        "metrics.json",
        "status.json",
        "train.log",
        "checkpoints",
    }
    assert {path.name for path in (together.path / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    steps = {tag: [step for step, _ in events] for tag, events in scalars(together.path).items()}
    for tag in ("train/loss", "val/loss", "val/acc"):
        assert steps[tag] == [3, 7], tag


@contextmanager
def at_work(root: Path, *arguments: str, is_to_last: bool = True) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A run of two processes, in the midst of its training or at its start: the first one, and the second's number."""
    command = [sys.executable, "-m", "src.train", *arguments, f"hydra.run.dir={root}/run"]
    root.mkdir(exist_ok=True)
    with (root / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ENV}, stdout=stderr, stderr=stderr)
    try:
        if is_to_last:
            wait_until(lambda: process.poll() is not None or "epoch 1/" in said(root), seconds=120)
        wait_until(lambda: process.poll() is not None or len(living(str(root))) == 2, seconds=120)
        (child,) = living(str(root)) - {process.pid}
        yield process, child
    finally:
        process.kill()
        process.wait()


def said(root: Path) -> str:
    """What a run has printed."""
    return (root / "stderr").read_text()


def end(root: Path, signum: signal.Signals, rank: int, *arguments: str) -> tuple[int, float, str]:
    """Send a signal to one of two processes; exit status, seconds until both have ended, and what was said."""
    with at_work(root, *LONG, *arguments) as (first, child):
        start = time.monotonic()
        os.kill(child if rank else first.pid, signum)
        status = first.wait(120)
        wait_until(lambda: not living(str(root)), seconds=60)
        seconds = time.monotonic() - start
    return (
        status,
        seconds,
        "\n".join(line for line in said(root).splitlines() if not line.startswith(("run ", "epoch"))),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_to_the_first_process_ends_both(signum: signal.Signals, expected: int, tmp_path: Path) -> None:
    status, seconds, words = end(tmp_path, signum, rank=0)
    assert (status, words) == (expected, "")
    assert seconds < AT_ONCE


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    status, seconds, words = end(tmp_path, signal.SIGKILL, rank=1)
    assert status in (1, -9)  # by its broken connection, or by Lightning, which looks every five seconds
    assert "another process of this run has ended" in words or status == -9
    assert len(words.splitlines()) <= 1
    assert seconds < AT_ONCE


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run_and_says_why(tmp_path: Path) -> None:
    with at_work(tmp_path, *LONG, "+callbacks.fail._target_=tests.engine.faults.FailSecond", is_to_last=False) as (
        first,
        _,
    ):
        start = time.monotonic()
        assert first.wait(120) in (1, -9)  # as where it is killed
        wait_until(lambda: not living(str(tmp_path)), seconds=60)
    assert time.monotonic() - start < 2 * AT_ONCE
    assert "[rank 1] error: ValueError: the second process fails" in said(tmp_path)


@pytest.mark.slow
def test_a_signal_in_a_long_validation_waits_for_its_end_and_saves(tmp_path: Path) -> None:
    slow = ("+callbacks.slow._target_=tests.engine.faults.SlowValidation", "data.batch_size=20")  # 3 batches of it
    with at_work(tmp_path, *LONG, *slow, is_to_last=False) as (first, _):
        wait_until(lambda: "validates" in said(tmp_path), seconds=120)
        start = time.monotonic()
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) == 143
        assert time.monotonic() - start > GRACE
        wait_until(lambda: not living(str(tmp_path)), seconds=60)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 12  # the first epoch


@pytest.mark.slow
def test_a_test_of_two_processes_ends_on_a_signal(tmp_path: Path) -> None:
    held = ("model=held", "trainer.max_epochs=1", "callbacks=minimal", "test=false")
    result = run_together("train", tmp_path, *TINY, *held, "logger=[]", f"hydra.run.dir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    words = [f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt", "accelerator=cpu", "accelerator.devices=2"]
    with (tmp_path / "stderr").open("wb") as stderr, subprocess.Popen(
        [sys.executable, "-m", "src.test", TINY[0], *words, f"hydra.run.dir={tmp_path}/test"],
        cwd=ROOT, env={**os.environ, **ENV, "HOLD_TEST": "1"}, stdout=stderr, stderr=stderr,
    ) as process:  # fmt: skip
        try:
            wait_until(lambda: said(tmp_path).count("tests") == 2, seconds=120)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
            assert "".join(said(tmp_path).split()) == "teststests"  # two processes print into one file
            wait_until(lambda: not living(str(tmp_path)), seconds=60)
        finally:
            process.kill()


@pytest.mark.slow
def test_a_process_that_is_stopped_ends_the_run(tmp_path: Path) -> None:
    status, seconds, words = end(tmp_path, signal.SIGTERM, rank=1)
    assert (status, words) == (143, "")
    assert seconds < AT_ONCE


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_that_waits_for_one_of_its_processes(
    signum: signal.Signals, expected: int, tmp_path: Path
) -> None:
    status, seconds, words = end(tmp_path, signum, 0, "+callbacks.hold._target_=tests.engine.faults.HoldSecond")
    assert (status, words) == (expected, "")
    assert seconds < AT_ONCE


SWEEP = ("-m", *TOGETHER, "accelerator.devices=2", "optimizer.lr=0.001,0.01")


def read_table(root: Path) -> dict[str, Any]:
    with (root / "sweep" / "sweep.csv").open() as file:
        return {row["job"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_a_sweeps_jobs_are_two_processes_each(tmp_path: Path) -> None:
    result = run_together("train", tmp_path, *SWEEP, f"hydra.sweep.dir={tmp_path}/sweep")
    assert result.returncode == 0, result.stderr
    rows = read_table(tmp_path)
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
    by_default(
        [
            ("trainer.num_nodes=1", "trainer.devices=2: in a sweep this needs hydra/launcher=one_process"),
            ("trainer.num_nodes=2", "trainer.num_nodes=2: in a sweep this needs hydra/launcher=submitit_slurm"),
        ]
    ),
)
def test_a_sweep_in_one_process_refuses_jobs_of_several(more: str, reason: str, tmp_path: Path) -> None:
    arguments = (*SWEEP, "hydra/launcher=basic", more, f"hydra.sweep.dir={tmp_path}/sweep")
    result = forks.run_command("train", *arguments, PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("  ")] == [
        f"  optimizer.lr={lr}: {reason}" for lr in ("0.001", "0.01")
    ]
    assert [row["error"] for row in read_table(tmp_path).values()] == [reason] * 2


@pytest.mark.slow
def test_tests_of_several_checkpoints_refuse_processes_of_their_own(tmp_path: Path, together: Run) -> None:
    folder = together.path / "checkpoints"
    result = run_together(
        "test", tmp_path, "-m", f"ckpt_path='{folder}/best.ckpt','{folder}/last.ckpt'", "accelerator=cpu",
        "accelerator.devices=2",
    )  # fmt: skip
    assert result.returncode == 1
    assert "accelerator.devices=2: in a sweep this needs hydra/launcher=one_process" in result.stderr


@pytest.mark.slow
def test_a_job_that_is_queued_again_before_its_first_checkpoint_has_its_curves_once(tmp_path: Path) -> None:
    fail, folder = "+callbacks.fail={_target_: tests.engine.faults.FailAt, step: ", tmp_path / "run"
    first = run_together("train", tmp_path, *TOGETHER, "trainer.max_epochs=1", f"{fail}3}}", f"hydra.run.dir={folder}")
    assert first.returncode in (1, -9)
    assert not list(folder.rglob("*.ckpt"))
    again = run_together(
        "train",
        tmp_path,
        *TOGETHER,
        "trainer.max_epochs=1",
        f"{fail}9}}",
        f"hydra.run.dir={folder}",
        SLURM_RESTART_COUNT="1",
    )
    assert again.returncode == 0, again.stderr
    assert len(list(folder.glob("events.out.*"))) > 1
    assert [step for step, _ in scalars(folder)["train/loss"]] == [3]
