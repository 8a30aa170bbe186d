"""A sweep's folder: what was planned, how each job stands, and what the next start has to run."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


class Job(NamedTuple):
    """A job as its folder shows it.

    Args:
        name: Its folder in the sweep's, and its name in TensorBoard.
        values: The swept keys and their values.
        status: ``waiting``, ``started`` (running or interrupted), ``finished``, ``pruned`` or ``failed``.
        score: The best value of the sweep's monitored metric; None if there is none.
        metrics: The last epoch's validation metrics by name, and the test's if the job is (of) the winner.
        checkpoint: The file with the best weights.
        seconds: How long it took.
        error: Why it failed.
    """

    name: str
    values: Mapping[str, Any]
    status: str
    score: float | None = None
    metrics: Mapping[str, float] = {}
    checkpoint: str | None = None
    seconds: float | None = None
    error: str = ""


class SweepFolder:
    """``sweep.json`` and a folder for each job; a job's state is read off the files that it has left.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()

    @property
    def plan(self) -> dict[str, Any]:
        """What ``sweep.json`` holds: ``monitor``, ``mode``, ``space``, ``config`` and ``jobs`` with their values."""
        plan: dict[str, Any] = json.loads((self.path / "sweep.json").read_text())
        return plan

    @contextmanager
    def opened(self, config: DictConfig, space: Mapping[str, str]) -> Iterator[None]:
        """Start the sweep, or go on with it, and keep other processes out meanwhile.

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
            else:
                write_json(
                    self.path / "sweep.json", {"monitor": config.monitor, "mode": config.mode, **asked, "jobs": {}}
                )
            yield
        finally:
            lock.release()

    def add(self, jobs: Mapping[str, Mapping[str, Any]]) -> None:
        """Plan jobs: their names and swept values."""
        plan = self.plan
        write_json(self.path / "sweep.json", plan | {"jobs": plan["jobs"] | dict(jobs)})

    def jobs(self) -> list[Job]:
        """All planned jobs, in their order."""
        return [self.job(name, values) for name, values in self.plan["jobs"].items()]

    def job(self, name: str, values: Mapping[str, Any]) -> Job:
        """How a job stands."""
        folder = self.path / name
        if (folder / "metrics.json").is_file():
            record = json.loads((folder / "metrics.json").read_text())
            metrics = {key: value for key, value in record["metrics"].items() if key.startswith("val/")}
            if (folder / "test" / "metrics.json").is_file():
                metrics |= json.loads((folder / "test" / "metrics.json").read_text())["metrics"]
            return Job(
                name, values, "pruned" if record["pruned"] else "finished",
                record["best"]["score"], metrics, record["best"]["checkpoint"], record["seconds"],
            )  # fmt: skip
        if (folder / "error.txt").is_file():
            return Job(name, values, "failed", error=(folder / "error.txt").read_text().strip().removeprefix("error: "))
        is_waiting = not folder.is_dir() or read_status(folder).get("state") == "queued"
        return Job(name, values, "waiting" if is_waiting else "started")

    def prepare(self, name: str) -> list[str] | None:
        """Make a job's folder ready for its next run.

        Returns:
            The overrides that the run needs beside its own; None if the job is finished.
        """
        folder = self.path / name
        status = self.job(name, {}).status
        if status in ("finished", "pruned"):
            return None
        # The test split is read once, by the winner.
        overrides = [f"hydra.sweep.subdir={quoted(name)}", "test=false"]
        try:
            if status == "started" and (checkpoint := find_checkpoint(folder)):
                return [*overrides, f"ckpt_path={quoted(checkpoint)}"]
        except CheckpointError as error:
            log.warning(error)
        if folder.is_dir():  # its curves and checkpoints would mix with those of the next run; its log goes on
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.suffix != ".log":
                    path.unlink()
        folder.mkdir(exist_ok=True)
        write_status(folder, "queued")
        return overrides


def job_name(overrides: Sequence[str]) -> str:
    """A readable folder name of a job's swept overrides; one that had to be changed or cut ends in a hash.

    >>> job_name(["optimizer.lr=0.001", "seed=3"])
    'optimizer.lr=0.001,seed=3'
    >>> job_name(["data.root=/data/mnist"])
    'data.root=_data_mnist-b4ad2140'
    """
    full = ",".join(override.lstrip("+~") for override in overrides) or "job"
    name = re.sub(r"[^\w.,=+@-]", "_", full, flags=re.ASCII)
    if name == full and len(name) <= NAME_LENGTH:
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
