"""Sweeps and runs on a real Slurm: job arrays, several processes a job, time limits and requeueing."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from src.config import ROOT
from tests.compose import run_command
from tests.slurm import PROGRAMS, ask, find_program, serve_slurm, wait_until

missing = [name for name in PROGRAMS if not find_program(name)]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing), reason=f"Slurm is not installed: no {', '.join(missing)}"),
    pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs pip install -e '.[slurm]'"),
]

SMALL = ("data=mnist5k", "trainer.limit_train_batches=20", "trainer.log_every_n_steps=10", "callbacks=minimal")
SUBMITIT = ("-m", "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5")
TWO_TASKS = ("hydra.launcher.tasks_per_node=2", "trainer=ddp_cpu")
LONG = ("trainer.max_epochs=3", "optimizer.lr=0.01")
HOLD = "+callbacks.hold._target_=hold.Hold"

# A callback that holds a job's first process before its third epoch, and with it the others, until Slurm ends it.
HOLD_SOURCE = """
import os, time
from pathlib import Path
from pytorch_lightning.callbacks import Callback

class Hold(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        while trainer.current_epoch == 2 and trainer.is_global_zero and "SLURM_RESTART_COUNT" not in os.environ:
            (Path(trainer.default_root_dir) / "held").touch()
            time.sleep(0.1)
"""


class Sweep(NamedTuple):
    """A sweep that has ended: its folder, its exit status and what it said."""

    path: Path
    returncode: int
    stderr: str

    def rows(self) -> dict[str, dict[str, str]]:
        with (self.path / "sweep.csv").open() as file:
            return {row["job"]: row for row in csv.DictReader(file)}

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
    (folder / "hold.py").write_text(HOLD_SOURCE)
    with serve_slurm(folder) as env:
        yield {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{folder}"}


@pytest.fixture(scope="module")
def held(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A sweep of one job in two processes, with two minutes to run, that will not end within these."""
    command = [
        sys.executable, "-m", "src.train", *SUBMITIT, *TWO_TASKS, *SMALL, LONG[0], "optimizer.lr=choice(0.01)", HOLD,
        "hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=30", "hydra.launcher.max_num_timeout=1",
        f"hydra.sweep.dir={tmp_path_factory.mktemp('held')}",
    ]  # fmt: skip
    env = {**os.environ, **cluster}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def sweep(cluster: dict[str, str], path: Path, *arguments: str) -> Sweep:
    folder = f"hydra.sweep.dir={path}"
    command = ("train", *SUBMITIT, *SMALL, "trainer.max_epochs=1", folder, *arguments)
    result = run_command(*command, cwd=ROOT, **cluster)
    return Sweep(path, result.returncode, result.stderr)


@pytest.fixture(scope="module")
def array(cluster: dict[str, str], held: object, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Three jobs, one of which fails, while another sweep waits for its end."""
    where = "+slurm='${oc.env:SLURM_ARRAY_JOB_ID}_${oc.env:SLURM_ARRAY_TASK_ID}'"
    return sweep(cluster, tmp_path_factory.mktemp("array"), "optimizer.lr=0.001,0.01,-1", "trainer=cpu", where)


@pytest.fixture(scope="module")
def pairs(cluster: dict[str, str], array: object, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Two jobs of two processes each."""
    return sweep(cluster, tmp_path_factory.mktemp("pairs"), "optimizer.lr=0.001,0.01", *TWO_TASKS)


@pytest.fixture(scope="module")
def whole(cluster: dict[str, str], pairs: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two processes by srun, from beginning to end."""
    folder = tmp_path_factory.mktemp("whole")
    result = subprocess.run(
        ["srun", "--ntasks-per-node=2", "--time=5", *train(folder)],
        cwd=ROOT, env={**os.environ, **cluster}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert epochs(result.stderr) == ["1", "2", "3"]
    assert result.stdout.count("trained") == 1
    return folder


def train(folder: Path, *arguments: str) -> list[str]:
    """A command for srun."""
    folder_override = f"hydra.run.dir={folder}"
    return [
        sys.executable, "-m", "src.train", TWO_TASKS[1], *SMALL, *LONG, "test=false", folder_override, *arguments
    ]  # fmt: skip


def test_a_sweep_is_a_job_array_whose_jobs_fail_alone(array: Sweep) -> None:
    good, bad = ("optimizer.lr=0.001", "optimizer.lr=0.01"), "optimizer.lr=-1"
    assert array.returncode == 1
    assert "1 of 3 jobs failed" in array.stderr
    rows = array.rows()
    assert {job: row["status"] for job, row in rows.items()} == {**dict.fromkeys(good, "finished"), bad: "failed"}
    assert rows[bad]["error"] == f"{bad}: expected a number above 0"
    assert array.tested() == [next(iter(rows))]
    tasks = [yaml.safe_load((array.path / job / "config.yaml").read_text())["slurm"] for job in good]
    assert [task.split("_")[1] for task in tasks] == ["0", "1"]
    assert len({task.split("_")[0] for task in tasks}) == 1
    runs = EventMultiplexer().AddRunsFromDirectory(str(array.path)).Reload().Runs()
    assert set(runs) == {".", *good, bad}


def test_two_tasks_train_one_model_and_the_first_alone_writes(pairs: Sweep, array: Sweep) -> None:
    assert pairs.returncode == 0, pairs.stderr
    rows = pairs.rows()
    assert [row["status"] for row in rows.values()] == ["finished", "finished"]
    assert pairs.tested() == [next(iter(rows))]
    assert [epochs(log) for log in pairs.logs(0)] == [["1"], ["1"]]
    assert [epochs(log) for log in pairs.logs(1)] == [[], []]
    for job in rows:
        assert writers(pairs.path / job) == 1
        assert metrics(pairs.path / job) == pytest.approx(metrics(array.path / job), rel=1e-3)


def test_srun_starts_the_processes_of_a_run(whole: Path) -> None:
    assert writers(whole) == 1
    assert metrics(whole)["val/acc"] > 0.8
    assert not (whole / "train.log").exists() or "error" not in (whole / "train.log").read_text()


def test_processes_by_srun_need_a_folder_that_they_all_know(cluster: dict[str, str], tmp_path: Path) -> None:
    command = ["srun", "--ntasks-per-node=2", "--time=1", sys.executable, "-m", "src.train", "trainer=ddp_cpu"]
    env = {**os.environ, **cluster, "PROJECT_ROOT": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    said = [line for line in result.stderr.splitlines() if not line.startswith("srun: ")]
    assert len(said) == 1
    assert said[0].startswith("error: hydra.run.dir: several processes were started for this run")
    assert list(tmp_path.iterdir()) == []


def test_a_requeued_run_goes_on_in_its_folder(cluster: dict[str, str], whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun {' '.join(map(repr, train(run, HOLD)))}\n")
    submit = ("sbatch", "--parsable", "--ntasks-per-node=2", "--time=5", "--requeue", f"--output={tmp_path}/log")
    job = ask(cluster, *submit, str(script))
    try:
        wait_until((run / "held").exists, 120)
        ask(cluster, "scontrol", "requeue", job)
        wait_until((run / "metrics.json").exists, 120)
        wait_until(lambda: ask(cluster, "squeue", "--noheader", "--jobs", job) == "")
    finally:
        ask(cluster, "scancel", job)
    assert epochs((tmp_path / "log").read_text()) == ["3"]  # Slurm has begun the file anew
    assert metrics(run) == metrics(whole)


def test_a_job_out_of_time_is_requeued_and_goes_on(held: subprocess.Popen[str], whole: Path) -> None:
    _, stderr = held.communicate(timeout=240)
    assert isinstance(held.args, list)
    ended = Sweep(Path(held.args[-1].partition("=")[2]), held.returncode, stderr)
    assert ended.returncode == 0, stderr
    (log,) = ended.logs(0)
    assert "Caught signal SIGUSR2" in log
    assert epochs(log) == ["1", "2", "3"]
    assert {job: row["status"] for job, row in ended.rows().items()} == {"optimizer.lr=0.01": "finished"}
    folder = ended.path / "optimizer.lr=0.01"
    assert metrics(folder) == metrics(whole)
    assert ended.tested() == [folder.name]
    assert not (folder / "error.txt").exists()
    (session,) = folder.glob("events.*.hparams")  # none of a failure, though the second process has lost the first
    plugin = EventAccumulator(str(session)).Reload().SummaryMetadata(SESSION_END_INFO_TAG).plugin_data
    assert HParamsPluginData.FromString(plugin.content).session_end_info.status == 1


def test_a_run_outside_of_slurm_is_not_told_of_srun(tmp_path: Path) -> None:
    result = run_command("train", "debug=fast", "data=mnist5k", "trainer=cpu", PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "srun" not in result.stderr
