"""hydra/launcher=process with real processes, real signals and real kills."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from omegaconf import OmegaConf

from hydra_plugins.process_launcher import _threads, _visible_gpus
from src.engine.runs.build import load_checkpoint
from src.engine.runs.status import read_status
from src.engine.settings.check import ROOT
from tests.compose import run_command
from tests.engine.tiny import TINY
from tests.marks import by_default

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to look for processes")

PROCESS = ("hydra/launcher=process", "hydra.launcher.n_jobs=2")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BAD, QUICK, HELD = "data.batch_size=-1", "data.batch_size=20", "data.batch_size=40"
ERROR = "data.batch_size=-1: expected 1 or more"

# A callback that tells of its job's process, starts another one, and holds the job that $HOLD names at epoch two, for
# good or until a file says otherwise.
SPY = """
import json, os, subprocess, sys, time
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from pytorch_lightning.callbacks import Callback

class Spy(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        folder = Path(trainer.default_root_dir)
        if trainer.current_epoch == 1:
            told = {"pid": os.getpid(), "argv": sys.orig_argv, "mode": HydraConfig.get().mode.name}
            told["environ"] = dict(os.environ)
            if told["mode"] == "RUN":  # a process of its own
                told["child"] = subprocess.Popen(["sleep", "300"]).pid
            (folder / "aside").write_text(json.dumps(told))
            (folder / "aside").rename(folder / "spy.json")
            end = time.time() + 300
            released = Path(os.environ["PROJECT_ROOT"], "released")
            while folder.name == os.environ.get("HOLD") and time.time() < end and not released.exists():
                time.sleep(0.05)
"""


class Sweep(NamedTuple):
    """A sweep at work, or at its end."""

    root: Path
    process: subprocess.Popen[bytes]

    @property
    def path(self) -> Path:
        return self.root / "sweep"

    @property
    def stderr(self) -> str:
        return (self.root / "stderr").read_text()

    def table(self) -> dict[str, dict[str, str]]:
        """The rows of sweep.csv by job, as far as it has been written."""
        if not (self.path / "sweep.csv").is_file():
            return {}
        with (self.path / "sweep.csv").open() as file:
            return {row["job"]: row for row in csv.DictReader(file)}

    def metrics(self, job: str) -> dict[str, float]:
        metrics: dict[str, float] = json.loads((self.path / job / "metrics.json").read_text())["metrics"]
        return metrics

    def spied(self, job: str) -> dict[str, Any]:
        spied: dict[str, Any] = json.loads((self.path / job / "spy.json").read_text())
        return spied

    def wait_until_held(self, *finished: str) -> None:
        """Wait until the held job holds, and others have finished."""

        def is_held() -> bool:
            assert self.process.poll() is None, self.stderr
            now_finished = {job for job, row in self.table().items() if row["status"] == "finished"}
            return (self.path / HELD / "spy.json").is_file() and now_finished >= set(finished)

        wait_until(is_held)


@contextmanager
def start_sweep(root: Path, *arguments: str, **env: str) -> Iterator[Sweep]:
    """Start a sweep of tiny jobs into ``root/sweep``; a second start resumes it."""
    (root / "spy.py").write_text(SPY)
    command = [
        sys.executable, "-m", "src.train", "-m", *TINY, f"hydra.sweep.dir={root}/sweep", "trainer.max_epochs=2",
        "logger=[]", "callbacks=minimal", "+callbacks.spy._target_=spy.Spy", "test=false", *arguments,
    ]  # fmt: skip
    allowed = {"PYTHONPATH": f"{ROOT}:{root}"}
    environment = {**os.environ, **allowed, "PROJECT_ROOT": str(root), **env}
    if "OMP_NUM_THREADS" not in env:  # `make test` sets it
        environment.pop("OMP_NUM_THREADS", None)
    with (root / "stdout").open("wb") as stdout, (root / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr)
    try:
        yield Sweep(root, process)
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes() -> dict[int, int]:
    """Those that live, and their parents; a zombie lives no more."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, *_ = path.read_text().rpartition(")")[2].split()
            if state not in "ZX":
                parents[int(path.parent.name)] = int(parent)
    return parents


def descendants(pid: int) -> set[int]:
    """All that a process has started, and what these have."""
    parents = processes()
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def are_gone(pids: set[int]) -> bool:
    return not pids & processes().keys()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep in one process, the first of whose jobs has failed."""
    with start_sweep(tmp_path_factory.mktemp("one"), "data.batch_size=-1,20,40") as sweep:
        assert sweep.process.wait(300) == 1, sweep.stderr
    return sweep


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep in two slots, of whose jobs one was killed from outside, one failed by itself, and one finished."""
    root = tmp_path_factory.mktemp("killed")
    env = {"HOLD": HELD, "CUDA_VISIBLE_DEVICES": "3,5"}
    with start_sweep(root, "data.batch_size=40,-1,20", *PROCESS, **env) as sweep:
        sweep.wait_until_held(QUICK)
        os.kill(sweep.spied(HELD)["pid"], signal.SIGKILL)
        assert sweep.process.wait(60) == 1
    return sweep


@pytest.mark.slow
def test_each_job_is_a_command_of_its_own_that_ran_beside_another(killed: Sweep) -> None:
    jobs = [killed.spied(QUICK), killed.spied(HELD)]
    assert len({killed.process.pid, *(job["pid"] for job in jobs)}) == 3
    assert [job["mode"] for job in jobs] == ["RUN", "RUN"]
    for job, name in zip(jobs, (QUICK, HELD), strict=True):
        assert job["argv"][1:3] == ["-m", "src.train"]
        assert f"hydra.run.dir='{killed.path / name}'" in job["argv"]
    # The held one was alive when the other ended, else it could not have been killed.
    assert killed.table()[HELD]["status"] == "failed"


@pytest.mark.slow
def test_a_job_prints_into_its_folder(killed: Sweep) -> None:
    lines = (killed.path / QUICK / "console.log").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/2", "2/2"]
    assert "epoch" not in killed.stderr


@pytest.mark.slow
def test_slots_share_the_cores_and_have_a_gpu_each(killed: Sweep) -> None:
    environments = [killed.spied(job)["environ"] for job in (QUICK, HELD)]
    assert {env["OMP_NUM_THREADS"] for env in environments} == {str(max(1, CORES // 2))}
    assert {env["CUDA_VISIBLE_DEVICES"] for env in environments} == {"3", "5"}


@pytest.mark.slow
def test_a_killed_job_has_failed_and_the_others_have_not(killed: Sweep) -> None:
    reason = "killed by SIGKILL; out of memory?"
    assert (killed.path / HELD / "error.txt").read_text() == f"error: {reason}\n"
    rows = killed.table()
    assert {job: rows[job]["status"] for job in rows} == {HELD: "failed", BAD: "failed", QUICK: "finished"}
    assert rows[HELD]["error"] == reason
    assert f"  {HELD}: {reason}" in killed.stderr.splitlines()
    assert "2 of 3 jobs failed" in killed.stderr


@pytest.mark.slow
def test_what_a_job_has_started_ends_with_it(killed: Sweep) -> None:
    assert are_gone({killed.spied(job)["child"] for job in (QUICK, HELD)})


@pytest.mark.slow
def test_a_job_fails_and_learns_as_in_one_process(killed: Sweep, reference: Sweep) -> None:
    assert killed.metrics(QUICK) == pytest.approx(reference.metrics(QUICK), rel=1e-4)
    assert killed.table()[BAD]["error"] == reference.table()[BAD]["error"] == ERROR
    assert [(sweep.path / BAD / "error.txt").read_text() for sweep in (killed, reference)] == [f"error: {ERROR}\n"] * 2
    for sweep in (killed, reference):
        assert f"  {BAD}: {ERROR}" in sweep.stderr.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_sweep_with_all_that_it_has_started(signum: signal.Signals, tmp_path: Path) -> None:
    env = {"HOLD": HELD, "CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "7"}
    with start_sweep(tmp_path, "data.batch_size=40,20", *PROCESS, **env) as sweep:
        sweep.wait_until_held()
        family = descendants(sweep.process.pid)
        spied = sweep.spied(HELD)
        assert {spied["pid"], spied["child"]} <= family
        sweep.process.send_signal(signum)
        assert sweep.process.wait(60) == 128 + signum
    wait_until(lambda: are_gone(family), seconds=60)
    assert not (sweep.path / HELD / "error.txt").exists()
    assert "Traceback" not in sweep.stderr + (sweep.path / HELD / "console.log").read_text()
    # The user's own setting stays, and slots without a GPU of their own share one.
    assert spied["environ"]["OMP_NUM_THREADS"] == "7"
    assert spied["environ"]["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_sweep_in_one_process(signum: signal.Signals, tmp_path: Path) -> None:
    with start_sweep(tmp_path, "data.batch_size=40,20", HOLD=HELD) as sweep:
        sweep.wait_until_held()
        sweep.process.send_signal(signum)
        (tmp_path / "released").touch()
        assert sweep.process.wait(60) == 128 + signum
    assert [read_status(sweep.path / job)["state"] for job in (HELD, QUICK)] == ["interrupted", "queued"]
    held_at = load_checkpoint(sweep.path / HELD / "checkpoints" / "last.ckpt")
    assert held_at["global_step"] == 7  # the second epoch's first step
    assert not (sweep.path / HELD / "error.txt").exists()
    assert "Traceback" not in sweep.stderr


@pytest.mark.slow
def test_a_job_that_was_stopped_has_not_failed_and_is_resumed(tmp_path: Path) -> None:
    arguments = ("data.batch_size=40,20", *PROCESS)
    with start_sweep(tmp_path, *arguments, HOLD=HELD) as sweep:
        sweep.wait_until_held(QUICK)
        os.kill(sweep.spied(HELD)["pid"], signal.SIGTERM)
        (tmp_path / "released").touch()
        assert sweep.process.wait(60) == 1
    assert {job: row["status"] for job, row in sweep.table().items()} == {QUICK: "finished", HELD: "stopped"}
    assert f"1 of 2 jobs did not finish; the same command with hydra.sweep.dir={sweep.path} resumes" in sweep.stderr
    assert (sweep.path / HELD / "checkpoints" / "last.ckpt").is_file()
    assert not (sweep.path / HELD / "error.txt").exists()
    with start_sweep(tmp_path, *arguments) as sweep:
        assert sweep.process.wait(300) == 0, sweep.stderr
    lines = (sweep.path / HELD / "console.log").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/2", "2/2"]


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_job_and_goes_on_where_it_was(tmp_path: Path, reference: Sweep) -> None:
    arguments = ("data.batch_size=40,20", *PROCESS)
    with start_sweep(tmp_path, *arguments, HOLD=HELD) as sweep:
        sweep.wait_until_held(QUICK)
        family = descendants(sweep.process.pid)
        assert sweep.spied(HELD)["pid"] in family
        sweep.process.kill()
        sweep.process.wait()
        wait_until(lambda: are_gone(family), seconds=60)
    finished = (sweep.path / QUICK / "metrics.json").stat().st_mtime_ns

    with start_sweep(tmp_path, *arguments, CUDA_VISIBLE_DEVICES="3,5") as sweep:
        assert sweep.process.wait(300) == 0, sweep.stderr
    assert (sweep.path / QUICK / "metrics.json").stat().st_mtime_ns == finished
    lines = (sweep.path / HELD / "console.log").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/2", "2/2"]
    for job in (QUICK, HELD):
        assert sweep.table()[job]["status"] == "finished"
        assert sweep.metrics(job) == pytest.approx(reference.metrics(job), rel=1e-4)
    # The one job that was left had the machine for itself.
    environment = sweep.spied(HELD)["environ"]
    assert "OMP_NUM_THREADS" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_a_jobs_processes_share_the_threads_of_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for devices, num_slots, expected in [(1, 2, "6"), (3, 2, "2"), ([0, 1], 3, "2"), (2, 12, "1"), ("auto", 4, "3")]:
        threads = _threads(OmegaConf.create({"trainer": {"devices": devices}}), num_slots)
        assert threads == {"OMP_NUM_THREADS": expected, "MKL_NUM_THREADS": expected}
    assert _threads(OmegaConf.create({"trainer": {"devices": 2}}), 1) == {}


@pytest.mark.parametrize(
    ("answer", "gpus"), [("echo 0; echo 1; echo 2", ["0", "1", "2"]), ("echo No devices were found; exit 6", [])]
)
def test_gpus_are_those_that_the_driver_names(
    answer: str, gpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _visible_gpus() == gpus


@pytest.mark.parametrize("n_jobs", by_default(["0", "1.5", "true"]))
def test_a_number_of_slots_that_cannot_be_is_said(n_jobs: str, tmp_path: Path) -> None:
    result = run_command(
        "train", "-m", "seed=1,2", PROCESS[0], f"hydra.launcher.n_jobs={n_jobs}", PROJECT_ROOT=str(tmp_path)
    )
    assert result.returncode == 1
    said = n_jobs.title()
    assert result.stderr == f"error: hydra.launcher.n_jobs={said}: expected a whole number of 1 or more\n"
    assert list(tmp_path.iterdir()) == []
