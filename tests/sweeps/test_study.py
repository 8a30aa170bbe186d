"""src/sweeps/study.py: the search space, and what a study proposes."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from src.config import ConfigError
from src.sweeps.study import STORAGE, make_space, open_storage, open_study

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


@pytest.mark.parametrize("written", ["x=interval(1,0)", "x=tag(log,interval(0,1))"])
def test_a_range_that_cannot_be_is_named(written: str) -> None:
    with pytest.raises(ConfigError) as error:
        space_of(written)
    assert str(error.value).startswith(f"{written}: ")


def open_in(folder: Path, **changes: Any) -> optuna.Study:
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


@pytest.mark.parametrize(("mode", "direction"), [("max", "MAXIMIZE"), ("min", "MINIMIZE")])
def test_the_mode_is_the_direction(mode: str, direction: str, tmp_path: Path) -> None:
    assert open_in(tmp_path, mode=mode).direction.name == direction


def test_a_database_that_cannot_be_reached_is_said_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"hydra\.sweeper\.storage=postgresql\+psycopg://me:\*\*\*@127\.0\.0\.1:1/"
    ) as error:
        open_storage("postgresql+psycopg://me:secret@127.0.0.1:1/studies")
    assert str(error.value).startswith("hydra.sweeper.storage=postgresql+psycopg://me:***@127.0.0.1:1/studies: ")
    assert "secret" not in str(error.value)
