"""A sweep's folder: what was planned, how each job stands, and what the next start has to run."""

import hashlib
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from src.engine.errors import CheckpointError, SweepError
from src.engine.runs.checkpoints import find_checkpoint
from src.engine.runs.report import write_json
from src.engine.runs.resume import leaves, quoted
from src.engine.runs.status import read_status, write_status

log = logging.getLogger(__name__)

NAME_LENGTH = 120  # file systems end at 255 bytes, TensorBoard's list of runs much earlier
DONE = ("finished", "pruned")
ENDED = (*DONE, "failed")


class Job(NamedTuple):
    """A job as its folder shows it.

    Args:
        name: Its folder in the sweep's, and its name in TensorBoard.
        values: The swept keys and their values.
        status: ``waiting``, ``started`` (running, or killed), ``stopped``, ``finished``, ``pruned`` or ``failed``.
        score: The best value of the sweep's monitored metric, or the last; None if there is none.
        metrics: The last metrics by name.
        tests: The test's, if the job was tested.
        checkpoint: The file with the best weights, by its path from the sweep's folder.
        seconds: How long it took.
        error: Why it failed.
        is_best: Whether the score is the best of the job's, not its last.
    """

    name: str
    values: Mapping[str, Any]
    status: str
    score: float | None = None
    metrics: Mapping[str, float] = {}
    tests: Mapping[str, float] = {}
    checkpoint: str | None = None
    seconds: float | None = None
    error: str = ""
    is_best: bool = True


class SweepFolder:
    """``sweep.json`` and a folder for each job; a job's state is read off the files that it has left.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        self._known: dict[str, Job] = {}  # as last read
        self._submitted: Mapping[str, str] = {}  # when it was opened

    @property
    def plan(self) -> dict[str, Any]:
        """What ``sweep.json`` holds: ``monitor``, ``mode``, ``space``, ``config`` and ``jobs`` with their values.

        Raises:
            SweepError: If the file is damaged.
        """
        path = self.path / "sweep.json"
        try:
            plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return plan | {key: plan[key] for key in ("monitor", "mode", "space", "config", "jobs")}
        except (ValueError, KeyError, TypeError) as error:
            raise SweepError(
                f"{path}: damaged ({error}); delete it and repeat the command: jobs that have finished are kept"
            ) from error

    @cached_property
    def monitor(self) -> str:
        """The metric by which jobs are compared."""
        return str(self.plan["monitor"])

    @contextmanager
    def opened(self, config: DictConfig, space: Mapping[str, str]) -> Iterator[None]:
        """Start the sweep or resume it, and keep other processes out meanwhile.

        Args:
            config: What all jobs share, without Hydra's node.
            space: What each swept key runs over, as it was written.

        Raises:
            SweepError: If another process works on it, or it was started with another config.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise SweepError(f"hydra.sweep.dir={self.path}: another process works on it; wait for its end") from error
        try:
            asked = {"space": dict(space), "config": OmegaConf.to_container(config)}
            if (self.path / "sweep.json").exists():
                _refuse_difference(self.path, asked, self.plan)
                self.note_submitted({name: None for name in self.submitted if self.job(name, {}).status in DONE})
                self._submitted = self.submitted
            else:
                start = {"monitor": config.monitor, "mode": config.mode, **asked, "jobs": {}}
                write_json(self.path / "sweep.json", start)
            yield
        finally:
            lock.release()

    def add(self, jobs: Mapping[str, Mapping[str, Any]]) -> None:
        """Plan jobs: their names and swept values."""
        plan = self.plan
        write_json(self.path / "sweep.json", plan | {"jobs": plan["jobs"] | dict(jobs)})

    @property
    def submitted(self) -> dict[str, str]:
        """The jobs that a cluster's queue has been given and of whose ends nothing is known yet: names and numbers."""
        submitted: dict[str, str] = self.plan.get("submitted", {}) if (self.path / "sweep.json").is_file() else {}
        return submitted

    def note_submitted(self, ids: Mapping[str, str | None]) -> None:
        """Note the numbers of submitted jobs by their names; None for one that has ended."""
        if (self.path / "sweep.json").is_file():  # another sweeper than ours has none
            submitted = {name: job_id for name, job_id in (self.submitted | dict(ids)).items() if job_id}
            write_json(self.path / "sweep.json", self.plan | {"submitted": submitted})

    def jobs(self, changed: str | None = None) -> list[Job]:
        """All planned jobs, in their order; those that have ended are read once.

        Args:
            changed: The only job to be read anew; None: all that have not ended.
        """
        for name, values in (planned := self.plan["jobs"]).items():
            known = self._known.get(name)
            if known is None or (known.status not in ENDED and changed in (None, name)):
                self._known[name] = self.job(name, values)
        return [self._known[name] for name in planned]

    def forget(self, name: str) -> None:
        """Read a job anew when it is next asked for."""
        self._known.pop(name, None)

    def job(self, name: str, values: Mapping[str, Any]) -> Job:
        """How a job stands."""
        folder = self.path / name
        if record := _read_record(folder / "metrics.json", "best"):
            best, metrics = record["best"], record["metrics"]
            # By another measure than the sweep's, "best" says nothing here.
            is_best = best.get("monitor", self.monitor) == self.monitor
            score = best.get("score") if is_best else metrics.get(self.monitor)
            checkpoint = best.get("checkpoint") and Path(name, best["checkpoint"]).as_posix()
            tests = _read_record(folder / "test" / "metrics.json").get("metrics", {})
            status, seconds = "pruned" if record.get("pruned") else "finished", record.get("seconds")
            checkpoint = checkpoint if checkpoint and (self.path / checkpoint).exists() else None
            return Job(name, values, status, score, metrics, tests, checkpoint, seconds, is_best=is_best)
        if (folder / "error.txt").is_file():
            error = (folder / "error.txt").read_text(encoding="utf-8", errors="replace")
            return Job(name, values, "failed", error=error.strip().removeprefix("error: "))
        state = read_status(folder).get("state") if folder.is_dir() else "queued"
        return Job(name, values, {"queued": "waiting", "interrupted": "stopped"}.get(state or "", "started"))

    def prepare(self, name: str) -> list[str] | None:
        """Make a job's folder ready for its next run.

        Returns:
            The overrides that the run needs beside its own; None if the job is finished.
        """
        folder = self.path / name
        self.forget(name)
        status = self.job(name, {}).status
        if status in DONE:
            return None
        # The test split is read once, by the winner.
        overrides = [f"hydra.sweep.subdir={quoted(name)}", "test=false"]
        if name in self._submitted:  # it may be at work: the launcher waits for it
            return overrides
        try:
            # A job that noted its failure itself would fail again; one that was killed would not.
            could_go_on = folder.is_dir() and read_status(folder).get("state") not in ("failed", "queued")
            if could_go_on and (checkpoint := find_checkpoint(folder)):
                (folder / "error.txt").unlink(missing_ok=True)
                return [*overrides, f"ckpt_path={quoted(checkpoint)}"]
        except CheckpointError as error:
            log.warning(error)
        if folder.is_dir():  # its curves and checkpoints would mix with those of the next run; its log is kept
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.suffix != ".log":
                    path.unlink()
        folder.mkdir(exist_ok=True)
        write_status(folder, "queued")
        return overrides


def _read_record(path: Path, *parts: str) -> dict[str, Any]:
    """A ``metrics.json`` with metrics and other parts; empty without one, or with a damaged one: it is made again."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(record[part], dict) for part in ("metrics", *parts)):
            return record
        log.warning(f"{path}: damaged: made again")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (ValueError, KeyError, TypeError) as error:
        log.warning(f"{path}: damaged ({error}): made again")
    return {}


def count(statuses: Iterable[str]) -> str:
    """How often each status occurs, as in ``3 finished, 1 failed``."""
    return ", ".join(f"{number} {status}" for status, number in Counter(statuses).items())


def job_name(overrides: Sequence[str], taken: Mapping[str, str] | None = None) -> str:
    """A readable folder name of a job's swept overrides; one that had to be changed or cut ends in a hash.

    Args:
        overrides: The overrides.
        taken: The names that other jobs have, by these names in lower case: some file systems tell no case.

    >>> job_name(["optimizer.lr=0.001", "seed=3"])
    'optimizer.lr=0.001,seed=3'
    >>> job_name(["data.root=/data/mnist"])
    'data.root=_data_mnist-b4ad2140'
    """
    full = ",".join(override.lstrip("+~") for override in overrides) or "job"
    name = re.sub(r"[^\w.,=+@-]", "_", full, flags=re.ASCII)
    if name == full and len(name) <= NAME_LENGTH and (taken or {}).get(name.lower(), name) == name:
        return name
    digest = hashlib.sha256(full.encode()).hexdigest()[:8]
    return f"{name[: NAME_LENGTH - 9]}-{digest}"


def _refuse_difference(path: Path, asked: Mapping[str, Any], planned: Mapping[str, Any]) -> None:
    for part in ("space", "config"):
        new, old = dict(leaves(asked[part])), dict(leaves(planned[part]))
        for key in new | old:
            if new.get(key, "absent") != old.get(key, "absent"):
                raise SweepError(
                    f"{key}={new.get(key, 'absent')}: the sweep in {path} was started with {old.get(key, 'absent')}; "
                    "repeat its command, or start another sweep without hydra.sweep.dir"
                )
