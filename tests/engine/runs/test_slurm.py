"""Sweeps and runs on a real Slurm: job arrays, several processes a job, time limits and requeueing."""

import csv
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from hydra_plugins.slurm_launcher import _queued
from src.engine.runs.status import read_status
from src.engine.settings.check import ROOT
from tests.compose import run_command
from tests.engine.equality import assert_equal, assert_same_run, content, scalars
from tests.engine.slurm import PROGRAMS, ask, find_program, serve_slurm, wait_until
from tests.engine.tiny import TINY
from tests.readme.table import words_of

missing = [name for name in PROGRAMS if not find_program(name)]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing), reason=f"Slurm is not installed: no {', '.join(missing)}"),
    pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs pip install -e '.[slurm]'"),
]

# 20 steps an epoch; dropout, which differs between processes, is off.
SMALL = ("data.num_rows=400", "model.net.dropout=0", "trainer.log_every_n_steps=10", "callbacks=minimal")
TWO_TASKS = ("hydra.launcher.tasks_per_node=2", "trainer=ddp_cpu")
LONG = ("trainer.max_epochs=3", "optimizer.lr=0.01")

# A callback that notes each step, and makes those of an epoch last, the first time that the job runs.
SLOW_SOURCE = """
import os, time
from pathlib import Path
from pytorch_lightning.callbacks import Callback

class Slow(Callback):
    def __init__(self, epoch, seconds):
        self.epoch, self.seconds = epoch, seconds

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        if trainer.is_global_zero:
            with (Path(trainer.default_root_dir) / f"steps{restarts}").open("a") as file:
                file.write(f"{trainer.current_epoch * 20 + batch_idx}\\n")
            if restarts == "0" and trainer.current_epoch == self.epoch:
                time.sleep(self.seconds)

class Hold(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        while trainer.global_rank == 1 and batch_idx == 15 and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            Path(trainer.default_root_dir, "held").touch()
            time.sleep(0.1)
"""


def with_tiny(words: Sequence[str]) -> list[str]:
    """A command of the README, for the tiny net."""
    place = words.index("src.train") + 1
    place += words[place] == "-m"
    return [*words[:place], *TINY, *words[place:]]


def slow(epoch: int, seconds: float) -> str:
    return f"+callbacks.slow={{_target_: slow.Slow, epoch: {epoch}, seconds: {seconds}}}"


def steps(folder: Path, restarts: int) -> list[int]:
    """The steps of a run, counted from 0, since it was started for the first or a later time."""
    path = folder / f"steps{restarts}"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


class Sweep(NamedTuple):
    """A sweep that has ended: its folder, its exit status and what it said."""

    path: Path
    returncode: int
    stderr: str

    def rows(self) -> dict[str, dict[str, str]]:
        with (self.path / "sweep.csv").open() as file:
            return {row["job"]: row for row in csv.DictReader(file)}

    def statuses(self) -> dict[str, str]:
        return {job: row["status"] for job, row in self.rows().items()}

    def tested(self) -> list[str]:
        return [path.parents[1].name for path in self.path.glob("*/test/metrics.json")]

    def logs(self, rank: int) -> list[str]:
        """What a rank of each job has said."""
        return [path.read_text() for path in sorted(self.path.glob(f".submitit/*/*_{rank}_log.err"))]


def metrics(folder: Path) -> dict[str, float]:
    """The last validation's metrics of a run."""
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())["metrics"]
    return {name: value for name, value in found.items() if name.startswith("val/")}


def epochs(log: str) -> list[str]:
    return re.findall(r"^epoch (\d+)/", log, re.MULTILINE)


def writers(folder: Path) -> int:
    """Number of processes that have written TensorBoard's scalars of a run."""
    return len({path.name.split(".")[-2] for path in folder.glob("events.*") if path.suffix != ".hparams"})


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of commands on a cluster of one node."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "slow.py").write_text(SLOW_SOURCE)
    path = os.environ.get("PYTHONPATH", "")
    with serve_slurm(folder) as env:
        yield {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{folder}:{path}"}


@contextmanager
def started_sweep(cluster: dict[str, str], path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A sweep at work, as the head of a group of processes, which a terminal's Ctrl-C would reach."""
    row = with_tiny(words_of("Slurm, a sweep as a job array"))
    command = [*row, *SMALL, "trainer.max_epochs=1", f"hydra.sweep.dir={path}", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **cluster}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(path: Path, process: subprocess.Popen[str]) -> Sweep:
    _, stderr = process.communicate(timeout=500)
    return Sweep(path, process.returncode, stderr)


def sweep(cluster: dict[str, str], path: Path, *arguments: str) -> Sweep:
    with started_sweep(cluster, path, *arguments) as process:
        return ended(path, process)


@pytest.fixture(scope="module")
def held(
    cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A sweep of one job in two processes, with two minutes to run, that will not end within these."""
    path = tmp_path_factory.mktemp("held")
    timeout = ("hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=30", "hydra.launcher.max_num_timeout=1")
    job = (*TWO_TASKS, LONG[0], "optimizer.lr=choice(0.01)", slow(2, 6))
    with started_sweep(cluster, path, *timeout, *job) as process:
        yield path, process


@pytest.fixture(scope="module")
def array(cluster: dict[str, str], held: object, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Three jobs, one of which fails, while another sweep waits for its end."""
    where = "+slurm='${oc.env:SLURM_ARRAY_JOB_ID}_${oc.env:SLURM_ARRAY_TASK_ID}'"
    return sweep(cluster, tmp_path_factory.mktemp("array"), "optimizer.lr=0.001,0.01,-1", "trainer=cpu", where)


@pytest.fixture(scope="module")
def pair(cluster: dict[str, str], array: object, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A job of two processes, which is one of the array's."""
    # At 0.001, not at 0.01, where Adam makes a difference of 1e-3 of two sums' rounding within twenty steps.
    return sweep(cluster, tmp_path_factory.mktemp("pair"), "optimizer.lr=choice(0.001)", *TWO_TASKS)


@pytest.fixture(scope="module")
def whole(cluster: dict[str, str], pair: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two processes by srun, from beginning to end."""
    folder = tmp_path_factory.mktemp("whole")
    command = [
        *with_tiny(words_of("Slurm, a run", name=folder.name)),
        f"hydra.run.dir={folder}",
        *SMALL,
        *LONG,
        "test=false",
    ]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **cluster}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert epochs(result.stderr) == ["1", "2", "3"]
    assert result.stdout.count("trained") == 1
    return folder


def queue(cluster: dict[str, str], name: str) -> dict[str, str]:
    """The state of each job of a name that has not ended."""
    lines = ask(cluster, "squeue", f"--name={name}", "--array", "--noheader", "--format=%i %T").splitlines()
    return dict(line.split() for line in lines)


def train(folder: Path, *arguments: str) -> list[str]:
    """A command for srun."""
    folder_override = f"hydra.run.dir={folder}"
    return [
        sys.executable, "-m", "src.train", *TINY, TWO_TASKS[1], *SMALL, *LONG, "test=false", folder_override, *arguments
    ]  # fmt: skip


def test_a_sweep_is_a_job_array_whose_jobs_fail_alone(array: Sweep) -> None:
    good, bad = ("optimizer.lr=0.001", "optimizer.lr=0.01"), "optimizer.lr=-1"
    assert array.returncode == 1
    assert "1 of 3 jobs failed" in array.stderr
    rows = array.rows()
    assert array.statuses() == {**dict.fromkeys(good, "finished"), bad: "failed"}
    assert re.search(r"optimizer.*-1", rows[bad]["error"])
    assert array.tested() == [next(iter(rows))]
    tasks = [yaml.safe_load((array.path / job / "config.yaml").read_text())["slurm"] for job in good]
    assert [task.split("_")[1] for task in tasks] == ["0", "1"]
    assert len({task.split("_")[0] for task in tasks}) == 1
    runs = EventMultiplexer().AddRunsFromDirectory(str(array.path)).Reload().Runs()
    assert set(runs) == {".", *good, bad}


def test_a_job_that_is_killed_is_a_failed_one_and_the_others_finish(cluster: dict[str, str], tmp_path: Path) -> None:
    two_at_a_time = ("hydra.launcher.name=three", "hydra.launcher.array_parallelism=2", "trainer=cpu", "test=false")
    short, long, later = (f"trainer.max_epochs={number}" for number in (1, 100000, 2))
    with started_sweep(
        cluster, tmp_path, "optimizer.lr=0.01", "trainer.max_epochs=1,100000,2", *two_at_a_time
    ) as process:
        wait_until((tmp_path / long / "config.yaml").exists, 300)
        (array,) = {job.split("_")[0] for job in queue(cluster, "three")}
        os.kill(read_status(tmp_path / long)["process"], signal.SIGKILL)  # as the kernel does when memory is out
        result = ended(tmp_path, process)
    assert result.returncode == 1
    assert "1 of 3 jobs failed" in result.stderr
    rows = result.rows()
    assert result.statuses() == {short: "finished", long: "failed", later: "finished"}
    error = f"Slurm job {array}_1 ended without a result (FAILED); see {tmp_path}/.submitit/"
    assert rows[long]["error"].startswith(error)
    assert f"  {long}: {error}" in result.stderr


def test_the_same_command_waits_for_what_slurm_has_and_resumes_what_was_cancelled(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("optimizer.lr=0.001,0.01,-1", "trainer=cpu", LONG[0], "test=false", slow(1, 2))
    cancelled, running, bad = (f"optimizer.lr={rate}" for rate in ("0.001", "0.01", "-1"))
    with started_sweep(cluster, tmp_path, *arguments) as process:
        wait_until(lambda: len(steps(tmp_path / cancelled, 0)) > 22, 300)
        process.kill()
    submitted = json.loads((tmp_path / "sweep.json").read_text())["submitted"]
    assert set(queue(cluster, tmp_path.name)) >= {submitted[cancelled], submitted[running]}
    ask(cluster, "scancel", submitted[cancelled])
    adopted = sweep(cluster, tmp_path, *arguments)
    assert adopted.statuses() == {cancelled: "stopped", running: "finished", bad: "failed"}
    assert "2 of 3 jobs did not finish" in adopted.stderr
    assert {path.name for path in (tmp_path / ".submitit").glob("[0-9]*_[0-9]*")} == set(submitted.values())
    logs = tmp_path / ".submitit" / submitted[cancelled]
    assert "Exited with exit code 143" in "".join(path.read_text() for path in logs.glob("*.err"))
    assert steps(tmp_path / running, 0) == list(range(60))
    again = sweep(cluster, tmp_path, *arguments)
    assert again.statuses() == {cancelled: "finished", running: "finished", bad: "failed"}
    assert steps(tmp_path / cancelled, 0) == list(range(60))


def test_a_sweep_that_does_not_wait_is_collected_later(cluster: dict[str, str], tmp_path: Path) -> None:
    rates = [f"0.00{number}" for number in range(1, 5)]  # of which the cluster takes three as an array
    arguments = ("trainer=cpu", f"optimizer.lr={','.join(rates)}")
    one_of_each = "hydra.launcher.array_parallelism=2"
    held = ("+hydra.launcher.additional_parameters.hold=true", "hydra.launcher.account=mine", one_of_each)
    left = sweep(cluster, tmp_path, *arguments, *held, "hydra.launcher.wait=false")
    assert left.returncode == 0, left.stderr
    assert left.statuses() == {f"optimizer.lr={rate}": "waiting" for rate in rates}
    submitted = json.loads((tmp_path / "sweep.json").read_text())["submitted"]
    assert queue(cluster, tmp_path.name) == dict.fromkeys(submitted.values(), "PENDING")
    first, *_, last = (submitted[f"optimizer.lr={rate}"].split("_") for rate in rates)
    assert first[1:] == ["0"]
    assert last[0] != first[0]
    assert {"Account=mine", "ArrayTaskThrottle=1"} <= set(ask(cluster, "scontrol", "show", "job", first[0]).split())
    ask(cluster, "scontrol", "release", f"{first[0]},{last[0]}")
    collected = sweep(cluster, tmp_path, *arguments)
    assert collected.returncode == 0, collected.stderr
    assert set(collected.statuses().values()) == {"finished"}
    assert len(collected.tested()) == 1
    assert {path.name for path in (tmp_path / ".submitit").glob("[0-9]*")} == {*submitted.values(), first[0]}
    assert json.loads((tmp_path / "sweep.json").read_text())["submitted"] == {}


def test_a_sweeps_job_that_is_preempted_saves_and_resumes(cluster: dict[str, str], tmp_path: Path) -> None:
    job = tmp_path / "optimizer.lr=0.01"
    arguments = ("optimizer.lr=choice(0.01)", "trainer=cpu", LONG[0], "test=false", slow(1, 1))
    with started_sweep(cluster, tmp_path, *arguments) as process:
        wait_until(lambda: len(steps(job, 0)) > 22, 300)
        ask(cluster, *PREEMPT.split())
        result = ended(tmp_path, process)
    assert result.returncode == 0, result.stderr
    assert result.statuses() == {job.name: "finished"}
    assert steps(job, 0)[-1] < 39, "it has not stopped within an epoch"
    assert steps(job, 0) + steps(job, 1) == list(range(60))


def test_a_search_submits_its_next_trial_when_one_has_ended(cluster: dict[str, str], tmp_path: Path) -> None:
    searched = (
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.pruner=null",
    )
    sampler = "hydra.sweeper.sampler._target_=optuna.samplers.RandomSampler"
    slowly = ("+callbacks.slow={_target_: slow.Slow, epoch: 0, seconds: 0}", "callbacks.slow.seconds=choice(0,3)")
    plain = ("optimizer.lr=0.01", "trainer=cpu", "test=false", "seed=3")
    result = sweep(cluster, tmp_path, *plain, *searched, sampler, *slowly)
    assert result.returncode == 0, result.stderr
    assert set(result.statuses().values()) == {"finished"}
    started = {job: (tmp_path / job / "config.yaml").stat().st_mtime for job in sorted(result.statuses())}
    ended = {job: (tmp_path / job / "metrics.json").stat().st_mtime for job in started}
    first, second, third, _ = started
    assert {job.rpartition("=")[2] for job in (first, second)} == {"0", "3"}  # of one a step takes three seconds
    assert min(ended[first], ended[second]) < started[third] < max(ended[first], ended[second])


def test_jobs_wait_for_a_drained_node_and_resume_after_one_that_was_down(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    def update(*settings: str) -> None:
        ask(cluster, "scontrol", "update", f"NodeName={socket.gethostname()}", *settings)

    first, second = (tmp_path / f"optimizer.lr={rate}" for rate in ("0.001", "0.01"))
    arguments = ("optimizer.lr=0.001,0.01", "trainer=cpu", LONG[0], "test=false", slow(1, 1))
    with started_sweep(cluster, tmp_path, *arguments, "hydra.launcher.array_parallelism=1") as process:
        try:
            wait_until(lambda: len(steps(first, 0)) > 22, 300)
            update("State=DRAIN", "Reason=test")
            wait_until((first / "metrics.json").exists, 300)
            wait_until(lambda: ask(cluster, "sinfo", "--noheader", "--format=%T") == "drained")
            assert set(queue(cluster, tmp_path.name).values()) == {"PENDING"}
            update("State=RESUME")
            wait_until(lambda: len(steps(second, 0)) > 22, 300)
            update("State=DOWN", "Reason=test")
        finally:
            update("State=RESUME")
        result = ended(tmp_path, process)
    assert result.returncode == 0, result.stderr
    assert result.statuses() == {first.name: "finished", second.name: "finished"}
    assert steps(first, 0) == list(range(60))
    again = steps(second, 1)
    assert again == list(range(again[0], 60))
    assert again[0] >= 20  # the second epoch's first


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130)])
def test_a_sweep_that_is_stopped_cancels_its_jobs(
    signum: signal.Signals, status: int, cluster: dict[str, str], tmp_path: Path
) -> None:
    one_at_a_time = ("hydra.launcher.name=stopped", "hydra.launcher.array_parallelism=1", "trainer=cpu")
    long = ("trainer.max_epochs=100000", "logger=[]")
    with started_sweep(cluster, tmp_path, "optimizer.lr=0.001,0.01", *one_at_a_time, *long) as process:
        wait_until((tmp_path / "optimizer.lr=0.001" / "config.yaml").exists, 300)
        assert sorted(queue(cluster, "stopped").values()) == ["PENDING", "RUNNING"]
        os.killpg(process.pid, signum)
        result = ended(tmp_path, process)
        assert queue(cluster, "stopped") == {}
    assert result.returncode == status
    assert "stopped: the same command with" in result.stderr
    assert not (tmp_path / "optimizer.lr=0.01" / "config.yaml").exists()
    assert json.loads((tmp_path / "sweep.json").read_text())["submitted"] == {}


def test_a_controller_that_does_not_answer_ends_no_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").touch()
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    assert _queued(["1_0", "1_1"]) == {"1_0", "1_1"}


def test_submitits_own_processes_refuse_jobs_that_would_start_more(tmp_path: Path) -> None:
    launcher = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "trainer=ddp_cpu")
    result = run_command("train", "-m", *TINY, *launcher, *SMALL, "seed=1,2", PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    assert "trainer.devices=2: in a sweep this needs hydra/launcher=one_process" in result.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_machine_without_slurm_is_said(tmp_path: Path) -> None:
    sweep = ("-m", "hydra/launcher=submitit_slurm", "seed=1,2")
    result = run_command("train", *sweep, PATH=str(tmp_path), PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: hydra/launcher=submitit_slurm: no sbatch on the PATH; ")
    assert list(tmp_path.iterdir()) == []


def test_two_tasks_train_one_model_and_the_first_alone_writes(pair: Sweep, array: Sweep) -> None:
    assert pair.returncode == 0, pair.stderr
    rows = pair.rows()
    assert [row["status"] for row in rows.values()] == ["finished"]
    assert pair.tested() == [next(iter(rows))]
    assert [epochs(log) for log in pair.logs(0)] == [["1"]]
    assert [epochs(log) for log in pair.logs(1)] == [[]]
    for job in rows:
        assert writers(pair.path / job) == 1
        assert metrics(pair.path / job) == pytest.approx(metrics(array.path / job), rel=1e-5)


def test_srun_starts_the_processes_of_a_run(whole: Path) -> None:
    assert writers(whole) == 1
    assert metrics(whole)["val/acc"] > 0.8
    assert not (whole / "train.log").exists() or "error" not in (whole / "train.log").read_text()


def test_processes_by_srun_need_a_folder_that_they_all_know(cluster: dict[str, str], tmp_path: Path) -> None:
    command = ["srun", "--ntasks-per-node=2", "--time=5", sys.executable, "-m", "src.train", "trainer=ddp_cpu"]
    env = {**os.environ, **cluster, "PROJECT_ROOT": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 1
    said = [line for line in result.stderr.splitlines() if not line.startswith("srun: ")]
    assert len(said) == 1
    assert said[0].startswith("error: hydra.run.dir: several processes cannot agree on a folder")
    assert list(tmp_path.iterdir()) == []


# A job that takes all CPUs from those in the partition of lower rank.
PREEMPT = "sbatch --partition=urgent --ntasks=8 --output=/dev/null --wrap=true"


@pytest.mark.parametrize("how", ["scontrol requeue {job}", "scancel --signal=USR1 {job}", PREEMPT])
def test_a_preempted_run_goes_on_as_if_it_had_not_stopped(
    how: str, cluster: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun {shlex.join(train(run, slow(1, 1)))}\n")
    submit = ["sbatch", "--parsable", "--ntasks-per-node=2", "--time=15", "--requeue", "--signal=USR1@60"]
    job = ask(cluster, *submit, "--open-mode=append", f"--output={tmp_path}/log", str(script))
    try:
        wait_until(lambda: len(steps(run, 0)) > 22, 300)
        ask(cluster, *how.format(job=job).split())
        wait_until(lambda: ask(cluster, "squeue", "--noheader", "--jobs", job) == "", 500)
    finally:
        ask(cluster, "scancel", job)
    assert steps(run, 0)[-1] < 39, "it has not stopped within an epoch"
    assert steps(run, 0) + steps(run, 1) == list(range(60))
    assert epochs((tmp_path / "log").read_text()) == ["1", "2", "3"]
    assert_same_run(whole, run)


@pytest.mark.parametrize("how", ["scontrol requeue {job}", "scancel --signal=USR1 {job}"])
def test_a_run_that_waits_for_a_process_is_requeued_and_goes_on_from_its_start(
    how: str, cluster: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    script = tmp_path / "job.sh"
    hold = "+callbacks.hold._target_=slow.Hold"
    script.write_text(f"#!/bin/bash\nsrun {shlex.join(train(run, slow(9, 0), hold))}\n")
    submit = ["sbatch", "--parsable", "--ntasks-per-node=2", "--time=15", "--requeue", "--signal=USR1@60"]
    job = ask(cluster, *submit, "--open-mode=append", f"--output={tmp_path}/log", str(script))
    try:
        wait_until((run / "held").exists, 300)
        assert not list(run.rglob("*.ckpt"))
        ask(cluster, *how.format(job=job).split())
        wait_until(lambda: ask(cluster, "squeue", "--noheader", "--jobs", job) == "", 500)
    finally:
        ask(cluster, "scancel", job)
    assert steps(run, 1) == list(range(60))
    assert_same_run(whole, run)


def test_a_job_out_of_time_is_requeued_and_goes_on(held: tuple[Path, subprocess.Popen[str]], whole: Path) -> None:
    result = ended(*held)
    assert result.returncode == 0, result.stderr
    (log,) = result.logs(0)
    assert "Caught signal SIGUSR2" in log
    assert epochs(log) == ["1", "2", "3"]
    assert result.statuses() == {"optimizer.lr=0.01": "finished"}
    folder = result.path / "optimizer.lr=0.01"
    assert steps(folder, 0) + steps(folder, 1) == list(range(60))
    assert_equal(content(whole / "checkpoints" / "last.ckpt"), content(folder / "checkpoints" / "last.ckpt"))
    curves = scalars(folder)
    assert curves.pop("best/val/acc")  # the sweep's, for the HPARAMS tab
    assert curves == scalars(whole)
    assert result.tested() == [folder.name]
    assert not (folder / "error.txt").exists()
    (session,) = folder.glob("events.*.hparams")  # none of a failure, though the second process has lost the first
    plugin = EventAccumulator(str(session)).Reload().SummaryMetadata(SESSION_END_INFO_TAG).plugin_data
    assert HParamsPluginData.FromString(plugin.content).session_end_info.status == 1


def test_a_run_outside_of_slurm_is_not_told_of_srun(tmp_path: Path) -> None:
    result = run_command("train", *TINY, "debug=fast", PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "srun" not in result.stderr
