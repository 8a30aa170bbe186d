"""A search by Optuna: its storage, its space, and the trials that a sweep runs for it."""

import json
import math
import os
import random
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.samplers import GridSampler, QMCSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, fail_stale_trials
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState

from src.engine.errors import ConfigError, SweepError
from src.engine.runs.resume import quoted
from src.engine.settings.arguments import build
from src.engine.sweeps.folder import ENDED, SweepFolder, job_name

STORAGE = "OPTUNA_STORAGE"  # where a trial's job finds the study: in the environment, since it may hold a password
OWNER = "sweep"  # attribute of a trial, once it has its parameters: the folder of the sweep that runs it
HEARTBEAT, PATIENCE = 60, 600  # seconds between two signs of life in a database, and until a trial counts as dead


class Study(optuna.Study):
    """A study as one sweep uses it.

    Args:
        storage: Where it is, under the name.
        name: Its name.
        folder: The sweep's folder, noted with each trial that the sweep asks for; ``.`` for a study in that folder,
            which may be moved.
        sampler: Config of a sampler. Its seed is varied by the number of trials that this sweep has asked for, so that
            a search that was killed proposes what it would have; but not for samplers that follow one sequence.
        pruner: Config of a pruner, or None.
    """

    exhausted = False

    def __init__(self, storage: BaseStorage, name: str, folder: Path, sampler: Any, pruner: Any) -> None:
        super().__init__(name, storage, sampler=build(sampler), pruner=build(pruner))
        self.storage = storage
        self.folder = str(folder)
        self._sampler_config = sampler
        self._is_varied = sampler.get("seed") is not None and not isinstance(self.sampler, GridSampler | QMCSampler)

    def ask(self, fixed_distributions: dict[str, BaseDistribution] | None = None) -> Trial:
        """Ask for a trial, and note whose it is."""
        if self._is_varied:
            num_asked = sum(self.is_mine(trial.user_attrs) for trial in self.get_trials(deepcopy=False))
            worker = list(self.folder.encode()) if isinstance(self.storage, RDBStorage) else []  # one of several
            seeds = np.random.SeedSequence([self._sampler_config["seed"], num_asked, *worker])
            self.sampler = build({**self._sampler_config, "seed": int(seeds.generate_state(1)[0])})
        with warnings.catch_warnings(action="ignore"):  # heartbeats are said to be for Study.optimize
            trial = super().ask(fixed_distributions)
        trial.set_user_attr(OWNER, self.folder)
        return trial

    def is_mine(self, user_attrs: Mapping[str, Any]) -> bool:
        """Whether a trial is this sweep's."""
        return OWNER in user_attrs and self.folder in (".", user_attrs[OWNER])

    def stop(self) -> None:
        """Note that the sampler has tried all there is, which Optuna takes within ``optimize`` only."""
        self.exhausted = True


def trial_id(storage: BaseStorage, study: optuna.Study, number: int) -> int:
    """What a storage calls a study's trial."""
    return storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(study.study_name), number)


def open_storage(location: str) -> BaseStorage:
    """The storage at a database's URL or in a journal file.

    Raises:
        ConfigError: If the database cannot be reached.
    """
    if "://" not in location:
        return JournalStorage(JournalFileBackend(location))
    from sqlalchemy.engine import make_url  # here: most searches need no database
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        shown = make_url(location).set(query={}).render_as_string()  # without the password
    except (ArgumentError, ValueError):
        raise ConfigError("hydra.sweeper.storage: not a URL; @ : and / in a password are written %40 %3A %2F") from None
    for attempt in range(5):
        try:
            with warnings.catch_warnings(action="ignore"):  # heartbeats are experimental
                return RDBStorage(
                    location,
                    engine_kwargs={"pool_pre_ping": True},  # the server may have been restarted
                    heartbeat_interval=HEARTBEAT,
                    grace_period=PATIENCE,
                )
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
    if not journal.exists():
        return
    content = journal.read_bytes()
    os.truncate(journal, content.rfind(b"\n") + 1)
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise SweepError(
                f"{journal}: line {number} is damaged ({error}); delete the file and repeat the command: the study is "
                "made anew, with the jobs that have finished"
            ) from error


def open_study(folder: Path, name: str | None, storage: str | None, mode: str, sampler: Any, pruner: Any) -> Study:
    """Make a study, or continue it.

    Args:
        folder: The sweep's folder.
        name: The study's name; None: the folder's.
        storage: A database's URL; None: a journal file in the folder.
        mode: ``max`` or ``min``.
        sampler: Config of a sampler.
        pruner: Config of a pruner, or None; it is stored with the study, for the jobs.

    Raises:
        ConfigError: If the database cannot be reached, or the study there has the other mode.
        SweepError: If the journal is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    build(pruner)  # one that cannot be leaves no study
    if storage is None:
        _mend(folder / "study.journal")
    os.environ[STORAGE] = storage or str(folder / "study.journal")
    backend = open_storage(os.environ[STORAGE])
    own = [] if storage else optuna.get_all_study_names(backend)  # the folder may have been renamed
    name = name or next(iter(own), folder.name)
    direction = StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE
    optuna.create_study(study_name=name, storage=backend, direction=direction, load_if_exists=True)
    study = Study(backend, name, folder if storage else Path(), sampler, pruner)
    if study.direction != direction:
        raise ConfigError(f"mode={mode}: the study {name} has the other; choose another hydra.sweeper.study_name")
    study.set_user_attr("pruner", OmegaConf.to_container(pruner, resolve=True) if pruner else None)
    return study


def open_trial(study_name: str, number: int) -> Trial:
    """A trial, in its job, by the storage in the environment; with the pruner that the study was given."""
    storage = open_storage(os.environ[STORAGE])
    study = optuna.load_study(study_name=study_name, storage=storage)
    study.pruner = build(study.user_attrs["pruner"])
    return Trial(study, trial_id(storage, study, number))


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
        self.space = dict(space)
        self.fixed = fixed
        self.num_trials = num_trials
        self.num_failed = 0
        self.running: dict[str, int] = {}  # numbers of trials, by their jobs
        # What an earlier start was killed at is run again.
        running = study.get_trials(states=(TrialState.RUNNING,))
        self.orphans = deque(trial.number for trial in running if study.is_mine(trial.user_attrs))
        if not isinstance(study.storage, RDBStorage):  # there, it may be another sweep's
            for trial in running:
                if OWNER not in trial.user_attrs:  # it was being asked for just then, and is asked for again
                    study.storage.set_trial_state_values(
                        trial_id(study.storage, study, trial.number), TrialState.WAITING
                    )
        self._beat()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give signs of life in a database, by which the other sweeps on this study know that its trials are run."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(HEARTBEAT):
                with suppress(StorageInternalError):  # the server may be gone for a while
                    self._beat()

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _beat(self) -> None:
        if isinstance(self.study.storage, RDBStorage):
            for number in [*self.orphans, *self.running.values()]:
                self.study.storage.record_heartbeat(trial_id(self.study.storage, self.study, number))

    def wants_more(self) -> bool:
        """Whether trials are missing: not finished, nor being run by this sweep or another that is alive."""
        if self.orphans or self.study.exhausted:
            return bool(self.orphans)
        with warnings.catch_warnings(action="ignore"):  # experimental
            fail_stale_trials(self.study)
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        trials = self.study.get_trials(deepcopy=False, states=states)
        counted = [trial for trial in trials if trial.state != TrialState.RUNNING or OWNER in trial.user_attrs]
        return len(counted) < self.num_trials and self.num_failed < self.num_trials

    def jobs(self) -> Iterator[list[str]]:
        """The overrides of one trial's job after another, as long as trials are missing.

        Whenever one is asked for, the study is told of the jobs that have ended.
        """
        while True:
            self.tell()
            if not self.wants_more():
                return
            number = self.orphans.popleft() if self.orphans else self.study.ask(self.space).number
            found = self.study.get_trials(deepcopy=False)[number].params
            params = {key: found[key] for key in self.space}
            name = f"{number:04d},{job_name([f'{key}={_short(value)}' for key, value in params.items()])}"
            self.folder.add({name: params})
            self.running[name] = number
            self._beat()
            added = self.folder.prepare(name)
            if added is None:  # it had finished before the study could be told
                continue
            if self.study.user_attrs["pruner"]:
                study, monitor = quoted(self.study.study_name), quoted(self.folder.monitor)
                arguments = f"study:{study},trial:{number},monitor:{monitor}"
                added.append(f"++callbacks.pruning={{_target_:src.engine.sweeps.pruning.Pruning,{arguments}}}")
            yield [*self.fixed, *(f"{key}={_text(value)}" for key, value in params.items()), *added]

    def tell(self, all_ended: bool = False) -> None:
        """Tell the study of the jobs that have ended.

        Args:
            all_ended: Whether all have: what has left no result is then taken for failed.
        """
        for name, number in list(self.running.items()):
            job = self.folder.job(name, {})
            if job.status not in ENDED and not all_ended:
                continue
            del self.running[name]
            if job.status == "stopped":  # the next start resumes it
                continue
            is_finished = job.status == "finished" and job.score is not None and math.isfinite(job.score)
            state = TrialState.FAIL
            if is_finished or job.status == "pruned":
                state = TrialState.COMPLETE if is_finished else TrialState.PRUNED
            else:
                self.num_failed += 1
            self.study.tell(number, job.score if is_finished else None, state, skip_if_finished=True)


def draw_study(study: optuna.Study, folder: Path) -> None:
    """Optuna's own pictures of a search, as PNG: its history, and how much each key matters, once two trials tell."""
    from matplotlib import pyplot  # here: it takes a second
    from optuna.visualization import matplotlib as plots

    pyplot.switch_backend("agg")
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    with pyplot.rc_context(), warnings.catch_warnings(action="ignore"):  # experimental
        for name, plot, least in (
            ("history", plots.plot_optimization_history, 1),
            ("importance", partial(plots.plot_param_importances, evaluator=PedAnovaImportanceEvaluator()), 2),
        ):
            if len(complete) >= least:
                figure: Any = plot(study).figure
                figure.savefig(folder / f"{name}.png", bbox_inches="tight")
                pyplot.close(figure)


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
