"""Two sweeps at work on one study in a real PostgreSQL database."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import psycopg
import pytest
from optuna.trial import FrozenTrial, TrialState

from src.engine.settings.check import ROOT
from src.engine.sweeps.study import open_storage
from tests.engine.postgres import PASSWORD, find_program, serve_postgres
from tests.hydra_plugins.test_optuna_sweeper import SMALL, SPACE

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(find_program("initdb") is None, reason="needs PostgreSQL's server: apt-get install postgresql"),
]
TARGET = 4


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve_postgres() as url:
        yield url


def start_worker(folder: Path, url: str, study_name: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "src.train", "-m", *SMALL, "hydra/sweeper=optuna", *SPACE, f"hydra.sweep.dir={folder}",
        f"hydra.sweeper.n_trials={TARGET}", f"hydra.sweeper.study_name={study_name}",
        "hydra/launcher=process", "hydra.launcher.n_jobs=1", "hydra.sweeper.storage=${oc.env:STUDY_URL}",
    ]  # fmt: skip
    env = {**os.environ, "STUDY_URL": url, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def trials_of(url: str, study_name: str) -> list[FrozenTrial]:
    storage = optuna.storages.RDBStorage(url)
    trials: list[FrozenTrial] = optuna.load_study(study_name=study_name, storage=storage).trials
    storage.engine.dispose()
    return trials


def command_lines() -> str:
    """What every process of this machine was started with."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text(errors="replace"))
        except OSError:
            continue
    return "\n".join(found)


def test_two_workers_share_a_study_and_nobody_sees_the_password(url: str, tmp_path: Path) -> None:
    workers = [
        start_worker(tmp_path / name, url, "shared") for name in ("one", "other")
    ]  # the tables are not there yet
    seen = ""
    while any(worker.poll() is None for worker in workers):
        seen += command_lines()
        try:
            workers[0].wait(1)
            workers[1].wait(1)
        except subprocess.TimeoutExpired:
            continue
    output = "".join(worker.communicate()[0] for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0], output

    trials = trials_of(url, "shared")
    finished = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(finished) == len(trials)
    assert TARGET <= len(finished) <= TARGET + 1  # both may have asked for the last one at once
    assert {Path(trial.user_attrs["sweep"]).name for trial in trials} == {"one", "other"}
    for trial in trials:
        assert len(list(tmp_path.glob(f"*/{trial.number:04d},*/metrics.json"))) == 1

    assert "src.engine.sweeps.pruning.Pruning" in seen
    for secret in (PASSWORD, PASSWORD.replace(" ", "%20")):
        assert secret not in seen
        assert secret not in output
        for path in tmp_path.rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_a_killed_workers_trial_is_left_to_its_own_next_start(url: str, tmp_path: Path) -> None:
    with start_worker(tmp_path / "one", url, "killed") as killed:
        while not list(tmp_path.glob("one/0001,*/config.yaml")):
            assert killed.poll() is None
            time.sleep(0.02)
        killed.kill()
    time.sleep(1)  # for the job to miss it
    for name, states in (
        ("other", ["COMPLETE", "RUNNING", *["COMPLETE"] * (TARGET - 2)]),  # it takes that one for being run
        ("one", ["COMPLETE"] * TARGET),
    ):
        with start_worker(tmp_path / name, url, "killed") as worker:
            output = worker.communicate()[0]
        assert worker.returncode == 0, output
        found = [trial.state.name.replace("PRUNED", "COMPLETE") for trial in trials_of(url, "killed")]
        assert found == states


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used")  # as the search does
def test_a_connection_that_the_server_has_cut_is_made_anew(url: str) -> None:
    storage = open_storage(url)
    assert isinstance(storage, optuna.storages.RDBStorage)
    study = optuna.create_study(storage=storage)
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where backend_type = 'client backend' and pid <> pg_backend_pid()"
        )
    study.ask()
    assert len(study.trials) == 1
    storage.engine.dispose()
