"""A search by Optuna: its storage, its space, and the trials that a sweep runs for it."""

import math
import os
import random
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.utils import instantiate
from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from src.config import ConfigError
from src.sweeps.folder import SweepFolder, job_name

STORAGE = "OPTUNA_STORAGE"  # where a trial's job finds the study: in the environment, since it may hold a password
OWNER = "sweep"  # attribute of a trial: the folder of the sweep that runs it


def open_storage(location: str) -> BaseStorage:
    """The storage at a database's URL or in a journal file.

    Raises:
        ConfigError: If the database cannot be reached.
    """
    if "://" not in location:
        return JournalStorage(JournalFileBackend(location))
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    for attempt in range(5):
        try:
            return RDBStorage(location)
        except (SQLAlchemyError, ImportError) as error:  # two workers that make the tables at once collide
            if attempt == 4 or isinstance(error, ImportError):
                reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
                raise ConfigError(f"hydra.sweeper.storage={make_url(location)!r}: {reason}") from None
            time.sleep(random.uniform(0.1, 0.5) * 2**attempt)
    raise AssertionError


def open_study(
    folder: Path, name: str | None, storage: str | None, mode: str, sampler: Any, pruner: Any
) -> optuna.Study:
    """Make a study, or go on with it.

    Args:
        folder: The sweep's folder.
        name: The study's name; None: the folder's.
        storage: A database's URL; None: a journal file in the folder.
        mode: ``max`` or ``min``.
        sampler: Config of a sampler. Its seed is varied by what the study holds already, lest a second start
            propose the first trials again, and two workers the same.
        pruner: Config of a pruner, or None; it is stored with the study, for the jobs.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    os.environ[STORAGE] = storage or str(folder / "study.journal")
    study = optuna.create_study(
        study_name=name or folder.name,
        storage=open_storage(os.environ[STORAGE]),
        direction="maximize" if mode == "max" else "minimize",
        load_if_exists=True,
    )
    seed = sampler.get("seed")
    if seed is not None:
        worker = list(str(folder).encode()) if storage else []
        seeds = np.random.SeedSequence([seed, len(study.trials), *worker])
        sampler = {**sampler, "seed": int(seeds.generate_state(1)[0])}
    study.sampler = instantiate(sampler)
    study.set_user_attr("pruner", OmegaConf.to_container(pruner, resolve=True) if pruner else None)
    return study


def open_trial(study_name: str, number: int) -> Trial:
    """A trial, in its job, by the storage in the environment; with the pruner that the study was given."""
    storage = open_storage(os.environ[STORAGE])
    study = optuna.load_study(study_name=study_name, storage=storage)
    study.pruner = instantiate(study.user_attrs["pruner"])
    return Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)


class Search:
    """The trials that a sweep runs, as jobs.

    Args:
        study: The study.
        folder: The sweep's folder, in which each trial has its own.
        space: The swept keys' distributions.
        fixed: Overrides that all jobs share.
        num_trials: Number of finished trials to come to.
    """

    def __init__(
        self,
        study: optuna.Study,
        folder: SweepFolder,
        space: Mapping[str, BaseDistribution],
        fixed: Sequence[str],
        num_trials: int,
    ) -> None:
        self.study = study
        self.folder = folder
        self.space = space
        self.fixed = fixed
        self.num_trials = num_trials
        self.monitor = folder.plan["monitor"]
        self.num_failed = 0
        self.running: dict[str, Trial] = {}
        # What an earlier start was killed at is run again; so is what it had asked for when it was killed.
        self.orphans = deque(
            Trial(study, trial._trial_id)
            for trial in study.get_trials(states=(TrialState.RUNNING,))
            if trial.user_attrs.get(OWNER) == str(folder.path)
        )

    def wants_more(self) -> bool:
        """Whether trials are missing: not finished, nor being run by this sweep or another."""
        if self.orphans:
            return True
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        trials = [
            trial
            for trial in self.study.get_trials(deepcopy=False, states=states)
            if trial.state != TrialState.RUNNING or OWNER in trial.user_attrs
        ]
        return len(trials) < self.num_trials and self.num_failed < self.num_trials

    def jobs(self) -> Iterator[list[str]]:
        """The overrides of one trial's job after another, as long as trials are missing.

        Whenever one is asked for, the study is told of the jobs that have ended.
        """
        while True:
            self.tell()
            if not self.wants_more():
                return
            trial = self.orphans.popleft() if self.orphans else self._ask()
            params = {key: trial.params[key] for key in self.space}
            name = f"{trial.number:04d},{job_name([f'{key}={_short(value)}' for key, value in params.items()])}"
            self.folder.add({name: params})
            self.running[name] = trial
            added = self.folder.prepare(name)
            if added is None:  # it had finished before the study could be told
                continue
            if self.study.user_attrs["pruner"]:
                arguments = f"study:'{self.study.study_name}',trial:{trial.number},monitor:'{self.monitor}'"
                added.append(f"++callbacks.pruning={{_target_:src.callbacks.pruning.Pruning,{arguments}}}")
            yield [*self.fixed, *(f"{key}={_text(value)}" for key, value in params.items()), *added]

    def tell(self) -> None:
        """Tell the study of the jobs that have ended."""
        for name, trial in list(self.running.items()):
            job = self.folder.job(name, {})
            if job.status == "started":
                continue
            del self.running[name]
            if job.status == "finished" and job.score is not None and math.isfinite(job.score):
                self.study.tell(trial, job.score)
            elif job.status == "pruned":
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.num_failed += 1
                self.study.tell(trial, state=TrialState.FAIL)

    def _ask(self) -> Trial:
        trial = self.study.ask(dict(self.space))
        trial.set_user_attr(OWNER, str(self.folder.path))
        return trial


def make_space(overrides: Mapping[str, Override]) -> dict[str, BaseDistribution]:
    """Optuna's distributions of a search space in Hydra's syntax.

    Raises:
        ConfigError: If a range cannot be.
    """
    space = {}
    for key, override in overrides.items():
        try:
            space[key] = _distribution(override)
        except ValueError as error:
            raise ConfigError(f"{override.input_line}: {error}") from error
    return space


def _distribution(override: Override) -> BaseDistribution:
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None
        assert sweep.end is not None
        is_log = "log" in sweep.tags
        if isinstance(sweep.start, int):
            return IntDistribution(sweep.start, int(sweep.end), log=is_log)
        return FloatDistribution(sweep.start, sweep.end, log=is_log)
    if isinstance(sweep, RangeSweep):
        values = list(sweep.range())
        if all(isinstance(value, int) for value in values):
            return IntDistribution(int(values[0]), int(values[-1]), step=int(sweep.step))
        return FloatDistribution(float(values[0]), float(values[-1]), step=float(sweep.step))
    return CategoricalDistribution([_plain(text) for text in override.sweep_string_iterator()])


def _plain(text: str) -> Any:
    """A choice as a number, a truth value or None where it is one; else as it was written."""
    value = OverridesParser.create().parse_override(f"choice={text}").value()
    return value if value is None or isinstance(value, bool | int | float) else text


def _text(value: Any) -> str:
    """A value as it stands in an override."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _text(value)
