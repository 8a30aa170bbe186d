"""``sweep=optuna``: real searches, read back by plain Optuna."""

import csv
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from PIL import Image

from src.engine.sweeps.study import STORAGE, open_study
from tests import forks
from tests.engine.tiny import TINY
from tests.marks import by_default
from tests.processes import wait_until

SMALL = (*TINY, "trainer.max_epochs=2", "callbacks=minimal", "hydra.sweeper.n_trials=20")
SPACE = (
    "optimizer.lr=tag(log,interval(1e-3,1e-1))",
    "data.batch_size=choice(10,20)",
    "model.net.num_hidden=range(4,9)",
)
THRESHOLD = "hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner"
PRUNE_ALL = (THRESHOLD, "+hydra.sweeper.pruner.lower=1.1")  # each at the end of its first epoch
PRUNE_NONE = (THRESHOLD, "+hydra.sweeper.pruner.lower=0")


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


def search(folder: Path, *arguments: str, space: tuple[str, ...] = SPACE, **env: str) -> Search:
    env |= {"PROJECT_ROOT": str(folder)}
    result = forks.run_command(
        "train", "-m", *SMALL, "hydra/sweeper=optuna", *space, f"hydra.sweep.dir={folder}", *arguments, **env
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
        assert set(trial.params) == {"optimizer.lr", "data.batch_size", "model.net.num_hidden"}
        assert float(finished.rows[folder.name]["optimizer.lr"]) == trial.params["optimizer.lr"]
        assert "Pruning" not in (folder / "config.yaml").read_text()
        assert trial.intermediate_values == {}


def test_a_search_leaves_optunas_pictures(finished: Search) -> None:
    for name in ("history", "importance"):
        pixels = np.asarray(Image.open(finished.folder / f"{name}.png").convert("L"))
        assert pixels.std() > 5, name


def test_the_same_seed_proposes_the_same_trials_to_another_search(
    finished: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE, "")  # open_study sets it
    study = open_study(tmp_path, None, None, "max", {"_target_": "optuna.samplers.TPESampler", "seed": 42}, None)
    for trial in finished.trials:
        assert study.ask(trial.distributions).params == trial.params


def test_the_best_trial_leads_and_it_alone_is_tested(finished: Search) -> None:
    best = max(finished.trials, key=lambda trial: trial.value or 0.0)
    (tested,) = finished.folder.glob("*/test/metrics.json")
    assert tested.parents[1].name.startswith(f"{best.number:04d},")
    assert next(iter(finished.rows)) == tested.parents[1].name
    assert f"best: {best.number:04d}," in finished.output


@pytest.mark.slow
def test_a_finished_search_is_not_repeated_and_a_larger_target_goes_on(finished: Search) -> None:
    records = {path: path.stat().st_mtime_ns for path in finished.folder.glob("*/metrics.json")}
    more = search(finished.folder, "hydra.sweeper.n_trials=4", "hydra.sweeper.pruner=null")
    assert more.returncode == 0, more.errors
    assert len(more.trials) == 4
    assert {path: path.stat().st_mtime_ns for path in records} == records


@pytest.mark.slow
def test_poor_trials_are_cut_short_in_two_slots(tmp_path: Path) -> None:
    pruned = search(tmp_path, "hydra.sweeper.n_trials=2", *PRUNE_ALL, "hydra/launcher=process")
    assert pruned.returncode == 0, pruned.errors
    assert [trial.state for trial in pruned.trials] == [TrialState.PRUNED] * 2
    assert [list(trial.intermediate_values) for trial in pruned.trials] == [[0], [0]]  # of two epochs
    assert {row["status"] for row in pruned.rows.values()} == {"pruned"}


@pytest.mark.slow
def test_a_failed_trial_is_told_as_failed_and_does_not_count(tmp_path: Path) -> None:
    space = ("data.batch_size=choice(20,-1)",)
    result = search(tmp_path, "hydra.sweeper.sampler.seed=2", "hydra.sweeper.n_trials=3", space=space)  # it draws both
    assert result.returncode == 1
    states = [(trial.params["data.batch_size"], trial.state) for trial in result.trials]
    assert states.count((20, TrialState.COMPLETE)) == 3
    assert set(states) == {(20, TrialState.COMPLETE), (-1, TrialState.FAIL)}
    assert "batch_size=-1: expected 1 or more" in result.errors


@pytest.mark.slow
def test_a_grid_is_tried_once_two_jobs_at_a_time_with_a_study_in_sqlite(tmp_path: Path) -> None:
    sampler = "hydra.sweeper.sampler._target_=optuna.samplers.GridSampler"
    grid, space = "+hydra.sweeper.sampler.search_space={data.batch_size:[10,20,-1,-2]}", "data.batch_size=10,20,-1,-2"
    storage = f"sqlite:///{tmp_path}/studies.db"
    result = search(
        tmp_path / "sweep", sampler, grid, "hydra.sweeper.n_trials=9", "hydra.sweeper.n_jobs=2",
        f"hydra.sweeper.storage={storage}", "hydra.sweeper.study_name='a grid'", space=(space,),
    )  # fmt: skip
    assert result.returncode == 1
    assert "error: 2 of 4 jobs failed; " in result.errors
    trials = optuna.load_study(study_name="a grid", storage=storage).trials
    assert {trial.params["data.batch_size"]: trial.state.name for trial in trials} == {
        10: "COMPLETE", 20: "COMPLETE", -1: "FAIL", -2: "FAIL",
    }  # fmt: skip
    assert len(trials) == len(result.rows) == 4
    assert not (result.folder / "study.journal").exists()


@pytest.mark.slow
def test_a_search_of_which_all_trials_fail_ends(tmp_path: Path) -> None:
    result = search(tmp_path, "hydra.sweeper.n_trials=2", space=("data.batch_size=choice(-1,-2)",))
    assert result.returncode == 1
    assert [trial.state for trial in result.trials] == [TrialState.FAIL] * 2
    assert "2 of 2 jobs failed" in result.errors


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "process"])
def test_a_killed_search_comes_to_its_target_with_the_trials_that_it_was_killed_at(
    launcher: str, tmp_path: Path
) -> None:
    arguments = (
        f"hydra.sweep.dir={tmp_path}", "hydra.sweeper.n_trials=4", "trainer.max_epochs=12", *PRUNE_NONE,
        f"hydra/launcher={launcher}", "+callbacks.slow={_target_:tests.engine.faults.SlowAt,step:50,seconds:3}",
    )  # fmt: skip
    command = ["-m", *SMALL, "hydra/sweeper=optuna", *SPACE, *arguments]
    env = {"PROJECT_ROOT": str(tmp_path)}
    process = forks.start("train", command, Path(os.devnull), env)

    def ended() -> dict[Path, int]:
        return {path.parent: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.json")}

    def halfway() -> set[Path]:
        return {path.parents[1] for path in tmp_path.glob("000[23],*/checkpoints/last.ckpt")} - ended().keys()

    def is_in_the_midst() -> bool:
        assert process.is_alive()
        return bool(ended() and halfway())

    try:
        wait_until(is_in_the_midst, seconds=300)
    finally:
        process.kill()
        process.join()
    time.sleep(1)  # for the jobs to miss it
    before, killed = ended(), halfway()
    assert killed

    result = search(tmp_path, *arguments)
    assert result.returncode == 0, result.errors
    assert [trial.state for trial in result.trials] == [TrialState.COMPLETE] * 4
    assert [list(trial.intermediate_values) for trial in result.trials] == [[*range(12)]] * 4
    assert sorted(path.name[:4] for path in ended()) == ["0000", "0001", "0002", "0003"]
    assert before.items() <= ended().items()
    assert all("last.ckpt" in (folder / "config.yaml").read_text() for folder in killed)


@pytest.mark.parametrize(
    "url",
    by_default([
        "postgresql://me:secret@127.0.0.1/studies",
        "postgresql://me:se$c/ret@127.0.0.1/studies",
        "postgresql://127.0.0.1/studies?user=me&password=secret",
        "${oc.env:STUDY_URL,postgresql://me:secret@127.0.0.1/studies}",
    ]),
)  # fmt: skip
def test_a_password_in_the_open_is_refused(url: str, tmp_path: Path) -> None:
    result = search(tmp_path, f"hydra.sweeper.storage='{url}'")
    assert result.returncode == 1
    assert result.errors.startswith("error: hydra.sweeper.storage: a password in the open; ")
    assert result.errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_database_that_cannot_be_reached_is_said_in_a_line_without_its_password(tmp_path: Path) -> None:
    storage = "hydra.sweeper.storage='postgresql+psycopg://me:${oc.env:PASSWORD}@127.0.0.1:1/studies'"
    result = search(tmp_path, storage, PASSWORD="open sesame")
    assert result.returncode == 1
    said = "error: hydra.sweeper.storage=postgresql+psycopg://me:***@127.0.0.1:1/studies: connection failed: "
    assert result.errors.startswith(said)
    assert result.errors.count("\n") == 1
    assert "sesame" not in result.output + result.errors
    assert not any("sesame" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("setting", by_default(["n_trials=1.5", "n_trials=0", "n_trials=True", "n_jobs=0"]))
def test_a_number_that_cannot_be_is_refused(setting: str, tmp_path: Path) -> None:
    result = search(tmp_path, f"hydra.sweeper.{setting}")
    assert result.returncode == 1
    assert result.errors == f"error: hydra.sweeper.{setting}: expected a whole number of 1 or more\n"


@pytest.mark.slurm
def test_a_search_that_does_not_wait_for_its_jobs_is_refused(tmp_path: Path) -> None:
    result = search(tmp_path, "hydra/launcher=submitit_slurm", "hydra.launcher.wait=false")
    assert result.returncode == 1
    assert result.errors.startswith("error: hydra.launcher.wait=false: a search needs its jobs' ends")
    assert result.errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
