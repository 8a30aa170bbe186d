"""The search space, what a study proposes, and what a kill leaves of it."""

import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from src.engine.errors import ConfigError, SweepError
from src.engine.settings.check import CONF, ROOT
from src.engine.sweeps.folder import SweepFolder
from src.engine.sweeps.study import OWNER, STORAGE, Search, Study, make_space, open_storage, open_study

TPE = {"_target_": "optuna.samplers.TPESampler", "seed": 1}
SPACES = {
    "x=interval(1e-4,0.1)": FloatDistribution(1e-4, 0.1),
    "x=tag(log,interval(1e-4,0.1))": FloatDistribution(1e-4, 0.1, log=True),
    "x=int(interval(2,9))": IntDistribution(2, 9),
    "x=tag(log,int(interval(2,9)))": IntDistribution(2, 9, log=True),
    "x=range(2,9)": IntDistribution(2, 8),
    "x=range(0,10,3)": IntDistribution(0, 9, step=3),
    "x=range(0.0,1.0,0.25)": FloatDistribution(0.0, 0.75, step=0.25),
    "x=choice(32,64)": CategoricalDistribution([32, 64]),
    "x=1e-3,0.1,true,null,relu": CategoricalDistribution([1e-3, 0.1, True, None, "relu"]),
    "optimizer=adam,sgd": CategoricalDistribution(["adam", "sgd"]),
}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORAGE, "")  # open_study sets it


def space_of(written: str) -> BaseDistribution:
    override = OverridesParser.create().parse_override(written)
    (distribution,) = make_space({override.get_key_element(): override}).values()
    return distribution


@pytest.mark.parametrize("written", SPACES)
def test_hydras_syntax_means_the_same_to_optuna(written: str) -> None:
    assert space_of(written) == SPACES[written]


@pytest.mark.parametrize(
    "written",
    [
        "x=interval(1,0)",
        "x=tag(log,interval(0,1))",
        "x=range(1,1)",
        "x=range(2,1)",
        "x=range(5,0,-1)",
        "x=range(0,1,0)",
    ],
)
def test_a_range_that_cannot_be_is_named(written: str) -> None:
    with pytest.raises(ConfigError) as error:
        space_of(written)
    assert str(error.value).startswith(f"{written}: ")


def test_a_search_needs_a_space() -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.params: nothing to search"):
        make_space({})


def open_in(folder: Path, **changes: Any) -> Study:
    folder.mkdir(exist_ok=True)
    return open_study(
        folder, **({"name": None, "storage": None, "mode": "max", "sampler": TPE, "pruner": None} | changes)
    )


def proposals(study: optuna.Study, num: int) -> list[float]:
    drawn = []
    for _ in range(num):
        trial = study.ask({"x": FloatDistribution(0.0, 1.0)})
        study.tell(trial, trial.params["x"])
        drawn.append(trial.params["x"])
    return drawn


@pytest.mark.parametrize("name", ["TPESampler", "RandomSampler"])
def test_a_search_proposes_the_same_with_and_without_a_stop_in_between(name: str, tmp_path: Path) -> None:
    sampler = {"_target_": f"optuna.samplers.{name}", "seed": 3}
    whole = proposals(open_in(tmp_path / "a", sampler=sampler), 20)
    assert len(set(whole)) == 20
    parts = [proposals(open_in(tmp_path / "b", sampler=sampler), num) for num in (1, 11, 8)]  # TPE starts with ten
    assert [value for part in parts for value in part] == whole


def test_a_seed_gives_the_same_trials_and_a_continued_study_new_ones(tmp_path: Path) -> None:
    first = proposals(open_in(tmp_path / "a"), 5)
    assert proposals(open_in(tmp_path / "b"), 5) == first
    continued = open_in(tmp_path / "a")
    assert [trial.params["x"] for trial in continued.trials] == first
    assert not set(proposals(continued, 5)) & set(first)


def test_two_workers_of_one_database_propose_different_trials(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    one = open_in(tmp_path / "a", name="shared", storage=storage)
    other = open_in(tmp_path / "b", name="shared", storage=storage)
    assert not set(proposals(one, 3)) & set(proposals(other, 3))
    assert len(one.trials) == 6


def test_a_grid_goes_on_where_it_was(tmp_path: Path) -> None:
    points = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    sampler = {"_target_": "optuna.samplers.GridSampler", "seed": 1, "search_space": {"x": points}}
    tried = proposals(open_in(tmp_path, sampler=sampler), 2)
    continued = open_in(tmp_path, sampler=sampler)
    assert sorted(tried + proposals(continued, 4)) == points
    assert continued.exhausted


@pytest.mark.parametrize(
    ("target", "others"),
    [
        ("optuna.samplers.TPESampler", []),
        ("optuna.samplers.RandomSampler", ["hydra.sweeper.sampler._target_=optuna.samplers.RandomSampler"]),
    ],
)
def test_tpe_samples_unless_another_is_named(target: str, others: list[str], tmp_path: Path) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["sweep=optuna", "seed=7", *others], return_hydra_config=True)
    sampler = config.hydra.sweeper.sampler
    assert sampler == {"_target_": target, "seed": 7}
    assert type(open_in(tmp_path, sampler=sampler).sampler) is get_class(target)


@pytest.mark.parametrize(("mode", "direction"), [("max", "MAXIMIZE"), ("min", "MINIMIZE")])
def test_the_mode_is_the_direction(mode: str, direction: str, tmp_path: Path) -> None:
    assert open_in(tmp_path, mode=mode).direction.name == direction


def test_a_study_of_the_other_mode_is_refused(tmp_path: Path) -> None:
    open_in(tmp_path, name="shared", mode="min")
    with pytest.raises(ConfigError, match="mode=max: the study shared has the other"):
        open_in(tmp_path, name="shared", mode="max")


def test_a_pruner_that_cannot_be_is_refused_before_any_trial(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="Either lower or upper must be specified"):
        open_in(tmp_path, pruner={"_target_": "optuna.pruners.ThresholdPruner"})
    assert list(tmp_path.iterdir()) == []


def search_in(folder: Path, study: Study, space: dict[str, BaseDistribution]) -> Search:
    sweep = SweepFolder(folder)
    with sweep.opened(OmegaConf.create({"monitor": "val/acc", "mode": "max"}), {}):
        return Search(study, sweep, space, [], num_trials=3)


def test_only_what_this_sweep_has_left_is_run_again(tmp_path: Path) -> None:
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 1), "y": CategoricalDistribution(["a", True])}
    storage = f"sqlite:///{tmp_path}/study.db"
    for owner in ("a", "b"):
        study = open_in(tmp_path / owner, name="shared", storage=storage)
        assert study.ask(space).user_attrs == {OWNER: str(tmp_path / owner)}
    optuna.load_study(study_name="shared", storage=storage).ask()  # another sweep may just be asking for it
    search = search_in(tmp_path / "a", open_in(tmp_path / "a", name="shared", storage=storage), space)
    assert list(search.orphans) == [0]
    assert search.wants_more()


def test_a_search_whose_folder_was_moved_runs_again_what_it_has_left(tmp_path: Path) -> None:
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 1)}
    open_in(tmp_path / "a").ask(space)
    (tmp_path / "a").rename(tmp_path / "b")
    study = open_in(tmp_path / "b")
    assert len(study.trials) == 1
    assert list(search_in(tmp_path / "b", study, space).orphans) == [0]


# Asks and reports without an end.
WRITER = """
import sys
from pathlib import Path
from optuna.distributions import FloatDistribution
from src.engine.sweeps.study import open_study
folder = Path(sys.argv[1])
study = open_study(folder, None, None, "max", {"_target_": "optuna.samplers.RandomSampler"}, None)
print("opened", flush=True)
while True:
    study.tell(study.ask({key: FloatDistribution(0, 1) for key in "xy"}), 1.0)
"""


@pytest.mark.slow
def test_a_journal_is_whole_after_any_kill_and_the_trial_is_run_again(tmp_path: Path) -> None:
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    orphans = []
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout
            assert process.stdout.readline() == b"opened\n"
            time.sleep(random.uniform(0.1, 0.2))
            process.send_signal(signal.SIGKILL)
        start = time.monotonic()
        study = open_in(tmp_path)
        assert time.monotonic() - start < 5  # Optuna itself waits for 30 s where the kill has left a lock
        search = search_in(tmp_path, study, space)
        search.num_trials = 10**9
        assert not study.get_trials(states=(TrialState.RUNNING,))[len(search.orphans) :]
        for trial in study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING)):
            (overrides,) = islice(search.jobs(), 1)
            assert overrides[2].startswith(f"hydra.sweep.subdir='{trial.number:04d},x=")
            again = study.trials[trial.number]
            assert overrides[:2] == [f"x={again.params['x']}", f"y={again.params['y']}"]
            assert trial.params.items() <= again.params.items()
            assert again.user_attrs == {OWNER: "."}
            study.tell(trial.number, 1.0)
            orphans.append(trial.number)
    assert orphans


def test_a_line_that_a_full_disk_has_cut_off_is_dropped(tmp_path: Path) -> None:
    first = proposals(open_in(tmp_path), 2)
    journal = tmp_path / "study.journal"
    journal.write_bytes(journal.read_bytes()[:-20])  # within the record of the last trial's end
    for _ in range(2):
        study = open_in(tmp_path)
        assert [trial.params["x"] for trial in study.trials] == first
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.RUNNING]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    proposals(open_in(tmp_path), 2)
    journal = tmp_path / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], lines[3][:9], *lines[4:]]))
    with pytest.raises(SweepError, match=rf"^{journal}: line 4 is damaged .*; delete the file and repeat the command"):
        open_in(tmp_path)


@pytest.mark.slow
def test_a_trial_without_a_sign_of_life_makes_room_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.engine.sweeps.study.HEARTBEAT", 1)
    monkeypatch.setattr("src.engine.sweeps.study.PATIENCE", 2)
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 1)}
    storage = f"sqlite:///{tmp_path}/study.db"
    dead, living, other = (
        search_in(tmp_path / name, open_in(tmp_path / name, name="shared", storage=storage), space)
        for name in ("dead", "living", "other")
    )
    with living.alive():
        for search in (dead, living):
            next(search.jobs())
            other.num_trials = 2
            assert other.wants_more() is (search is dead)
        time.sleep(4)
        assert other.wants_more()
        assert [trial.state.name for trial in other.study.trials] == ["FAIL", "RUNNING"]
    dead.tell(all_ended=True)  # it was only asleep
    assert [trial.state.name for trial in other.study.trials] == ["FAIL", "RUNNING"]


# Opens a storage when it is told to.
OPENER = """
import sys
import sqlalchemy.orm, alembic.command
from src.engine.sweeps.study import open_storage
print("ready", flush=True)
sys.stdin.read(1)
open_storage(sys.argv[1])
"""


@pytest.mark.slow
def test_workers_may_make_the_tables_of_a_database_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPENER, f"sqlite:///{tmp_path}/study.db"]
    pipe = subprocess.PIPE
    openers = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0) for _ in range(4)]
    for opener in openers:
        assert opener.stdout
        assert opener.stdout.readline() == b"ready\n"
    for opener in openers:
        assert opener.stdin
        opener.stdin.write(b"\n")
    errors = [opener.communicate()[1] for opener in openers]
    assert [opener.returncode for opener in openers] == [0] * 4, errors


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:sec@ret:word@host/studies", "not a URL"),
        ("nosuch://me:secret@host/studies", "nosuch://me:***@host/studies: Can't load plugin"),
        ("mysql://me:secret@host/studies?password=secret", "mysql://me:***@host/studies: Failed to import DB access"),
    ],
)
def test_a_url_that_cannot_be_is_said_without_its_password(url: str, said: str) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError) as error:
        open_storage(url)
    assert time.monotonic() - start < 0.5  # it does not get better by waiting
    assert said in str(error.value)
    assert "ret" not in str(error.value)
