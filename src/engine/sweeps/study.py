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
from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.samplers import GridSampler, QMCSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState

from src.engine.errors import ConfigError
from src.engine.runs.resume import quoted
from src.engine.settings.trust import instantiate
from src.engine.sweeps.folder import SweepFolder, job_name

STORAGE = "OPTUNA_STORAGE"  # where a trial's job finds the study: in the environment, since it may hold a password
OWNER = "sweep"  # attribute of a trial: the folder of the sweep that runs it


class Study(optuna.Study):
    """A study whose sampler may say that it has tried all there is, which Optuna takes within ``optimize`` alone."""

    exhausted = False

    def stop(self) -> None:
        """Note it."""
        self.exhausted = True


def open_storage(location: str) -> BaseStorage:
    """The storage at a database's URL or in a journal file.

    Raises:
        ConfigError: If the database cannot be reached.
    """
    if "://" not in location:
        return JournalStorage(JournalFileBackend(location))
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        shown = make_url(location).set(query={}).render_as_string()  # without the password
    except (ArgumentError, ValueError):
        raise ConfigError("hydra.sweeper.storage: not a URL; @ : and / in a password are written %40 %3A %2F") from None
    for attempt in range(5):
        try:
            return RDBStorage(location, engine_kwargs={"pool_pre_ping": True})  # the server may have been restarted
        except (SQLAlchemyError, StorageInternalError, ImportError) as error:
            if attempt == 4 or isinstance(error, ArgumentError | ImportError):
                cause = error.__cause__ if isinstance(error, StorageInternalError) else error
                reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
                raise ConfigError(f"hydra.sweeper.storage={shown}: {reason}") from None
            time.sleep(random.uniform(0.1, 0.3) * 2**attempt)  # workers that make the tables at once collide
    raise AssertionError


def _mend(journal: Path) -> None:
    """Remove what a process killed while writing has left: its lock, and a line that has no end."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.exists():
        os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)


def open_study(folder: Path, name: str | None, storage: str | None, mode: str, sampler: Any, pruner: Any) -> Study:
    """Make a study, or go on with it.

    Args:
        folder: The sweep's folder.
        name: The study's name; None: the folder's.
        storage: A database's URL; None: a journal file in the folder.
        mode: ``max`` or ``min``.
        sampler: Config of a sampler. Its seed is varied by what the study holds already, lest a second start
            propose the first trials again, and two workers the same; but for samplers that follow one sequence.
        pruner: Config of a pruner, or None; it is stored with the study, for the jobs.

    Raises:
        ConfigError: If the database cannot be reached, or the study there has the other mode.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner_of_trials = instantiate(pruner)
    if storage is None:
        _mend(folder / "study.journal")
    os.environ[STORAGE] = storage or str(folder / "study.journal")
    name = name or folder.name
    backend = open_storage(os.environ[STORAGE])
    direction = StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE
    optuna.create_study(study_name=name, storage=backend, direction=direction, load_if_exists=True)
    study = Study(name, backend, pruner=pruner_of_trials)
    if study.direction != direction:
        raise ConfigError(f"mode={mode}: the study {name} has the other; choose another hydra.sweeper.study_name")
    study.sampler = instantiate(sampler)
    seed = sampler.get("seed")
    if seed is not None and not isinstance(study.sampler, GridSampler | QMCSampler):
        worker = list(str(folder).encode()) if storage else []
        seeds = np.random.SeedSequence([seed, len(study.trials), *worker])
        study.sampler = instantiate({**sampler, "seed": int(seeds.generate_state(1)[0])})
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
        study: Study,
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
        # What an earlier start was killed at is run again. A trial without an owner was being asked for just then; in
        # a database it may be another sweep's.
        mine = [str(folder.path), *([None] if isinstance(study._storage, JournalStorage) else [])]
        running = study.get_trials(states=(TrialState.RUNNING,))
        self.orphans = deque(Trial(study, trial._trial_id) for trial in running if trial.user_attrs.get(OWNER) in mine)

    def wants_more(self) -> bool:
        """Whether trials are missing: not finished, nor being run by this sweep or another."""
        if self.orphans or self.study.exhausted:
            return bool(self.orphans)
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
            trial = self.orphans.popleft() if self.orphans else self.study.ask()
            params = {key: trial._suggest(key, distribution) for key, distribution in self.space.items()}
            trial.set_user_attr(OWNER, str(self.folder.path))
            name = f"{trial.number:04d},{job_name([f'{key}={_short(value)}' for key, value in params.items()])}"
            self.folder.add({name: params})
            self.running[name] = trial
            added = self.folder.prepare(name)
            if added is None:  # it had finished before the study could be told
                continue
            if self.study.user_attrs["pruner"]:
                study, monitor = quoted(self.study.study_name), quoted(self.monitor)
                arguments = f"study:{study},trial:{trial.number},monitor:{monitor}"
                added.append(f"++callbacks.pruning={{_target_:src.engine.sweeps.pruning.Pruning,{arguments}}}")
            yield [*self.fixed, *(f"{key}={_text(value)}" for key, value in params.items()), *added]

    def tell(self, all_ended: bool = False) -> None:
        """Tell the study of the jobs that have ended.

        Args:
            all_ended: Whether all have: what has left no result is then taken for failed.
        """
        for name, trial in list(self.running.items()):
            job = self.folder.job(name, {})
            if job.status in ("waiting", "started") and not all_ended:
                continue
            del self.running[name]
            if job.status == "finished" and job.score is not None and math.isfinite(job.score):
                self.study.tell(trial, job.score)
            elif job.status == "pruned":
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.num_failed += 1
                self.study.tell(trial, state=TrialState.FAIL)


def make_space(overrides: Mapping[str, Override]) -> dict[str, BaseDistribution]:
    """Optuna's distributions of a search space in Hydra's syntax.

    Raises:
        ConfigError: If there is none, or a range cannot be.
    """
    if not overrides:
        raise ConfigError("hydra.sweeper.params: nothing to search; give optimizer.lr='interval(0.001, 0.1)', say")
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
        if not values:
            raise ValueError("no value lies in it")
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
