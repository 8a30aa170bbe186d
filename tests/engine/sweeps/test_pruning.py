"""The pruning callback in real runs, each a trial of a real study."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from omegaconf import OmegaConf

from src.engine.runs.build import restore
from src.engine.runs.resume import quoted
from src.engine.sweeps.study import STORAGE, open_study
from src.train import train
from tests.engine.tiny import compose_tiny

EPOCHS = 3
SAMPLER = {"_target_": "optuna.samplers.RandomSampler"}
NEVER = {"_target_": "optuna.pruners.ThresholdPruner", "lower": 0.0}
AT_TWO = {"_target_": "optuna.pruners.ThresholdPruner", "lower": 1.1, "n_warmup_steps": 1}
MEDIAN = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 1}  # it answers with NumPy's bool
AT_LAST = {"_target_": "optuna.pruners.ThresholdPruner", "lower": 1.1, "n_warmup_steps": EPOCHS - 1}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORAGE, "")  # open_study sets it


def make_study(folder: Path, pruner: dict[str, Any]) -> optuna.Study:
    folder.mkdir(exist_ok=True)
    return open_study(folder, "it's a study", None, "max", SAMPLER, OmegaConf.create(pruner))


def run_trial(folder: Path, trial: optuna.Trial, *more: str) -> dict[str, Any]:
    """Train as a search's job does.

    Returns:
        What its metrics.json holds.
    """
    study = quoted(trial.study.study_name)
    arguments = f"study:{study},trial:{trial.number},monitor:'val/acc'"
    prune = f"++callbacks.pruning={{_target_:src.engine.sweeps.pruning.Pruning,{arguments}}}"
    train(
        compose_tiny(folder, f"trainer.max_epochs={EPOCHS}", "trainer.log_every_n_steps=1", "test=false", prune, *more)
    )
    record: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return record


@pytest.mark.parametrize(
    ("pruner", "num_epochs", "pruned"), [(NEVER, EPOCHS, False), (AT_TWO, 2, True), (AT_LAST, EPOCHS, False)]
)
def test_a_trial_ends_when_the_studys_pruner_says_so_but_for_its_last_epoch(
    pruner: dict[str, Any], num_epochs: int, pruned: bool, tmp_path: Path
) -> None:
    study = make_study(tmp_path, pruner)
    other, trial = study.ask(), study.ask()
    record = run_trial(tmp_path / "job", trial)
    assert record["pruned"] is pruned
    reported = study.trials[trial.number].intermediate_values
    assert list(reported) == list(range(num_epochs))
    assert reported[num_epochs - 1] == pytest.approx(record["metrics"]["val/acc"])
    assert max(reported.values()) == pytest.approx(record["best"]["score"])
    assert study.trials[other.number].intermediate_values == {}


STEPS = ("trainer=steps", "trainer.max_steps=12", "trainer.val_check_interval=2", "trainer.num_sanity_val_steps=0")


@pytest.mark.parametrize(("pruner", "num_validations"), [(NEVER, 6), (AT_TWO, 2), ({**AT_TWO, "n_warmup_steps": 5}, 6)])
def test_a_trial_that_is_counted_in_steps_is_judged_at_each_validation(
    pruner: dict[str, Any], num_validations: int, tmp_path: Path
) -> None:
    study = make_study(tmp_path, pruner)
    record = run_trial(tmp_path / "job", study.ask(), *STEPS)
    assert list(study.trials[0].intermediate_values) == list(range(num_validations))
    assert record["pruned"] is (num_validations < 6)


def test_checkpoints_of_a_trial_that_a_pruner_has_compared_can_be_read(tmp_path: Path) -> None:
    study = make_study(tmp_path, MEDIAN)
    study.add_trial(optuna.create_trial(value=0.0, intermediate_values=dict.fromkeys(range(EPOCHS), 0.0)))
    assert not run_trial(tmp_path / "job", study.ask())["pruned"]
    for name in ("best", "last"):
        assert restore(tmp_path / "job" / "checkpoints" / f"{name}.ckpt").net


def test_a_trial_that_is_run_again_repeats_epochs_in_silence(tmp_path: Path) -> None:
    study = make_study(tmp_path, NEVER)
    trial = study.ask()
    run_trial(tmp_path / "job", trial, "trainer.max_epochs=2")
    reported = study.trials[0].intermediate_values
    run_trial(tmp_path / "again", trial)  # a warning would be an error here
    again = study.trials[0].intermediate_values
    assert len(again) == EPOCHS
    assert reported.items() <= again.items()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_validation_outside_of_training_is_not_reported(tmp_path: Path) -> None:
    study = make_study(tmp_path, NEVER)
    trial = study.ask()
    run_trial(tmp_path / "job", trial, "trainer.num_sanity_val_steps=1", "trainer.max_epochs=1")
    last = tmp_path / "job" / "checkpoints" / "last.ckpt"
    again = study.ask()
    # It has nothing left to train, and validates once.
    run_trial(tmp_path / "job", again, f"ckpt_path={quoted(last)}", "trainer.max_epochs=1")
    assert [list(trial.intermediate_values) for trial in study.trials] == [[0], []]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_trial_that_is_killed_in_the_validation_that_prunes_it_comes_back_as_pruned(tmp_path: Path) -> None:
    study = make_study(tmp_path, AT_TWO)
    trial = study.ask()
    assert run_trial(tmp_path / "job", trial)["pruned"]
    (tmp_path / "job" / "metrics.json").unlink()  # what a kill just before it was written leaves
    last = tmp_path / "job" / "checkpoints" / "last.ckpt"
    record = run_trial(tmp_path / "job", trial, f"ckpt_path={quoted(last)}")
    assert record["pruned"]
    assert list(study.trials[0].intermediate_values) == [0, 1]  # of three epochs
