"""``sweep=optuna``: real searches, read back by plain Optuna."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from src.config import ROOT
from tests.compose import run_command

SMALL = (
    "data=mnist5k", "trainer=cpu", "trainer.limit_train_batches=4", "trainer.log_every_n_steps=1",
    "callbacks.description=null", "callbacks.summary=null", "trainer.max_epochs=2",
)  # fmt: skip
# Prunes every trial at the end of its first epoch.
PRUNE_ALL = (
    "hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner",
    "+hydra.sweeper.pruner.lower=1.1",
    "hydra.sweeper.sampler._target_=optuna.samplers.RandomSampler",
)


class Search(NamedTuple):
    folder: Path
    output: str
    errors: str
    returncode: int

    @property
    def trials(self) -> list[FrozenTrial]:
        storage = JournalStorage(JournalFileBackend(str(self.folder / "study.journal")))
        return optuna.load_study(study_name=self.folder.name, storage=storage).trials

    @property
    def rows(self) -> dict[str, dict[str, str]]:
        with (self.folder / "sweep.csv").open() as file:
            return {row["job"]: row for row in csv.DictReader(file)}


def search(folder: Path, *arguments: str, sweep: str = "sweep=optuna") -> Search:
    result = run_command(
        "train",
        "-m",
        sweep,
        *SMALL,
        f"hydra.sweep.dir={folder}",
        *arguments,
        PROJECT_ROOT=str(folder),
        OMP_NUM_THREADS="1",
    )
    return Search(folder, result.stdout, result.stderr, result.returncode)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Search:
    return search(tmp_path_factory.mktemp("search"), "hydra.sweeper.n_trials=3", "hydra.sweeper.pruner=null")


def test_the_study_holds_what_the_jobs_found(finished: Search) -> None:
    assert finished.returncode == 0, finished.errors
    assert [trial.state for trial in finished.trials] == [TrialState.COMPLETE] * 3
    for trial in finished.trials:
        (folder,) = finished.folder.glob(f"{trial.number:04d},*")
        record = json.loads((folder / "metrics.json").read_text())
        assert trial.value == record["best"]["score"]
        assert set(trial.params) == {"optimizer.lr", "data.batch_size", "model.net.activation"}
        assert float(finished.rows[folder.name]["optimizer.lr"]) == trial.params["optimizer.lr"]


def test_the_best_trial_alone_is_tested(finished: Search) -> None:
    best = max(finished.trials, key=lambda trial: trial.value or 0.0)
    (tested,) = finished.folder.glob("*/test/metrics.json")
    assert tested.parents[1].name.startswith(f"{best.number:04d},")
    assert f"best: {best.number:04d}," in finished.output


def test_a_finished_search_is_not_repeated_and_a_larger_target_goes_on(finished: Search) -> None:
    records = {path: path.stat().st_mtime_ns for path in finished.folder.glob("*/metrics.json")}
    more = search(finished.folder, "hydra.sweeper.n_trials=4", "hydra.sweeper.pruner=null")
    assert more.returncode == 0, more.errors
    assert len(more.trials) == 4
    assert {path: path.stat().st_mtime_ns for path in records} == records


def test_poor_trials_are_cut_short_in_two_slots(tmp_path: Path) -> None:
    pruned = search(tmp_path, "hydra.sweeper.n_trials=2", *PRUNE_ALL, "hydra/launcher=process")
    assert pruned.returncode == 0, pruned.errors
    assert [trial.state for trial in pruned.trials] == [TrialState.PRUNED] * 2
    assert [list(trial.intermediate_values) for trial in pruned.trials] == [[0], [0]]  # of two epochs
    assert {row["status"] for row in pruned.rows.values()} == {"pruned"}


def test_a_failed_trial_is_told_as_failed_and_does_not_count(tmp_path: Path) -> None:
    space, seed = "optimizer.lr=choice(0.001,-1)", "hydra.sweeper.sampler.seed=2"  # which draws both
    result = search(tmp_path, space, seed, "hydra.sweeper.n_trials=3", sweep="hydra/sweeper=optuna")
    assert result.returncode == 1
    states = [(trial.params["optimizer.lr"], trial.state) for trial in result.trials]
    assert states.count((0.001, TrialState.COMPLETE)) == 3
    assert set(states) == {(0.001, TrialState.COMPLETE), (-1, TrialState.FAIL)}
    assert "optimizer.lr=-1: expected a number above 0" in result.errors


@pytest.mark.slow
def test_a_killed_search_comes_to_its_target_with_the_trial_that_it_was_killed_at(tmp_path: Path) -> None:
    arguments = [f"hydra.sweep.dir={tmp_path}", "hydra.sweeper.n_trials=4", "trainer.max_epochs=4"]
    command = [sys.executable, "-m", "src.train", "-m", "sweep=optuna", *SMALL, *arguments, "hydra.sweeper.pruner=null"]
    env = {**os.environ, "PROJECT_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("0001,*/checkpoints/last.ckpt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (killed,) = tmp_path.glob("0001,*")
    assert not (killed / "metrics.json").exists()

    result = search(tmp_path, *arguments, "hydra.sweeper.pruner=null")
    assert result.returncode == 0, result.errors
    assert [trial.state for trial in result.trials] == [TrialState.COMPLETE] * 4
    assert "last.ckpt" in (killed / "config.yaml").read_text()


def test_a_password_in_the_open_is_refused(tmp_path: Path) -> None:
    result = search(tmp_path, "hydra.sweeper.storage=postgresql://me:secret@127.0.0.1/studies")
    assert result.returncode == 1
    assert "a password in the open" in result.errors
    assert list(tmp_path.iterdir()) == []


def test_a_number_of_trials_that_cannot_be_is_refused(tmp_path: Path) -> None:
    result = search(tmp_path, "hydra.sweeper.n_trials=0")
    assert result.returncode == 1
    assert result.errors.strip() == "error: hydra.sweeper.n_trials=0: expected a whole number of 1 or more"
