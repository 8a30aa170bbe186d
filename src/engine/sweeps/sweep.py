"""What every sweep does before its jobs and after them, however the jobs are chosen and launched."""

import os
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from src.engine.errors import ConfigError, SweepError, UntestedError
from src.engine.runs import report
from src.engine.runs.evaluate import test_checkpoint
from src.engine.runs.preflight import SLURM_LAUNCHER, claim
from src.engine.runs.resume import quoted
from src.engine.sweeps.folder import DONE, ENDED, Job, SweepFolder, count

if TYPE_CHECKING:
    from src.engine.sweeps.leaderboard import Leaderboard

INTERVAL = 5.0  # seconds between two drawings of the leaderboard
KEEP = ("all", "winner", "last")


@contextmanager
def running(config: DictConfig, space: Mapping[str, str]) -> Iterator[SweepFolder]:
    """A sweep's folder to run jobs in; after them, the winner is tested and the leaderboard shown.

    With ``test=all`` each job is tested.

    Args:
        config: The sweep's config with Hydra's node, of which jobs are to be composed.
        space: What each swept key runs over, as it was written.

    Raises:
        ConfigError: If ``hydra.sweeper.keep`` is none of ``KEEP``.
        SweepError: If the sweep cannot start, or jobs have failed.
    """
    keep = config.hydra.sweeper.get("keep", "all")
    if keep not in KEEP:
        raise ConfigError(f"hydra.sweeper.keep={keep}: expected one of {', '.join(KEEP)}")
    shared = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    path = Path(config.hydra.sweep.dir).resolve()
    if not any(override.startswith("hydra.sweep.dir=") for override in config.hydra.overrides.hydra):
        path = claim(path)
    config.hydra.sweep.dir = str(path)
    config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(path)}")  # the jobs' configs are composed anew
    folder = SweepFolder(path)
    with folder.opened(shared, space):
        if folder.submitted and config.hydra.launcher._target_ != SLURM_LAUNCHER:
            raise SweepError(f"{path}: jobs of this sweep are in Slurm's queue; add hydra/launcher=submitit_slurm")
        try:
            yield folder
        except SystemExit:  # a signal
            print(f"stopped: {_how_to_go_on(path)}", file=sys.stderr)
            raise
        board = renew(folder)
        if under_way := folder.submitted:
            print(f"{len(under_way)} of {len(board.jobs)} jobs are in Slurm's queue; {_how_to_go_on(path, 'collects')}")
            return _raise_failures([job for job in board.jobs if job.name not in under_way], path)
        if config.test and board.winner:
            _test(folder, board.jobs if config.test == "all" else board.winner.jobs, shared)
        drop_checkpoints(folder, board, keep)
        board = renew(folder)
    board.show(path)
    _raise_failures(board.jobs, path)


def _test(folder: SweepFolder, jobs: Iterable[Job], config: DictConfig) -> None:
    """Test finished jobs, each once."""
    for job in jobs:
        output_dir = folder.path / job.name / "test"
        if job.status == "finished" and job.checkpoint and not job.tests:
            trainer = {**config.accelerator, "limit_test_batches": config.trainer.get("limit_test_batches")}
            trainer["devices"] = 1  # more would be processes, which would start the sweep again
            if trainer["accelerator"] != "cpu":  # the jobs may have run on another machine
                trainer["accelerator"] = "auto"
            try:
                test_checkpoint(folder.path / job.checkpoint, output_dir, trainer)
            except UntestedError as error:
                print(f"test=false: {error}", file=sys.stderr)
            folder.forget(job.name)


def _raise_failures(jobs: Iterable[Job], path: Path) -> None:
    jobs = list(jobs)
    failed = [job for job in jobs if job.status not in DONE]
    if failed:
        errors = [f"  {job.name}: {(job.error or job.status).splitlines()[0]}" for job in failed]
        what = "failed" if all(job.status == "failed" for job in failed) else "did not finish"
        raise SweepError("\n".join([f"{len(failed)} of {len(jobs)} jobs {what}; {_how_to_go_on(path)}", *errors]))


def _how_to_go_on(path: Path, verb: str = "resumes") -> str:
    return f"the same command with {shlex.quote(f'hydra.sweep.dir={report.shown(path)}')} {verb}"


class KeepLeaderboard(Callback):
    """Hydra's callback at the end of each job of a sweep: prints where the sweep stands, and renews its leaderboard.

    Only in the process that has started the sweep: jobs elsewhere would write the same files at once.
    """

    def __init__(self) -> None:
        self._process: tuple[str, int] | None = None
        self._folder: SweepFolder | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note who starts the sweep, and when."""
        self._process = _this_process()
        self._start = self._drawn = time.monotonic()
        self._num_ended = 0
        self._keep = config.hydra.sweeper.get("keep", "all")
        self._target = config.hydra.sweeper.get("n_trials", 0)

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Print a line and write the table; draw the figure anew, but not more often than every few seconds."""
        if self._process != _this_process() or not Path(config.hydra.sweep.dir, "sweep.json").is_file():
            return
        self._folder = folder = self._folder or SweepFolder(config.hydra.sweep.dir)
        self._num_ended += 1
        job_return.cfg = job_return.hydra_cfg = None  # else all jobs' configs stay in memory
        is_due = time.monotonic() - self._drawn > INTERVAL or self._num_ended == 1
        board = renew(folder, None if is_due else config.hydra.sweep.subdir)
        statuses = [job.status for job in board.jobs if job.status != "waiting"]
        num_ended, num_jobs = sum(status in ENDED for status in statuses), max(len(board.jobs), self._target)
        if is_due:
            if folder.plan["config"].get("test") != "all":  # which needs them at the end
                drop_checkpoints(folder, board, self._keep)
            self._drawn = time.monotonic()
        line = f"{num_ended} of {num_jobs} jobs: {count(statuses)}".replace("started", "running")
        if board.best_job:
            line += f"; best: {board.best_job.name}, {board.monitor} {board.best_job.score:.4f}"
        if num_ended < num_jobs:
            seconds = (time.monotonic() - self._start) / self._num_ended  # a job
            line += f"; about {_duration((num_jobs - num_ended) * seconds)} left"
        print(line, flush=True)


def _this_process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _duration(seconds: float) -> str:
    """A duration, as in 40 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def renew(folder: SweepFolder, changed: str | None = None) -> "Leaderboard":
    """Write a sweep's leaderboard as it stands: sweep.csv, sweep.md, sweep.png, TensorBoard.

    Args:
        folder: The sweep's.
        changed: The only job to be read anew and shown in TensorBoard, without the figure; None: all that is new.
    """
    from src.engine.sweeps import figure  # here, as below: Hydra imports this file at each command's start
    from src.engine.sweeps.leaderboard import Leaderboard

    plan = folder.plan
    board = Leaderboard(folder.jobs(changed), plan["monitor"], plan["mode"])
    report.write_text(folder.path / "sweep.csv", board.to_csv())
    report.write_text(folder.path / "sweep.md", board.to_markdown(f"Sweep {folder.path.name}"))
    if changed is None:
        png = figure.draw(board)
        report.write_bytes(folder.path / "sweep.png", png)
        figure.log_image(folder.path, png)
    for job in board.jobs:
        if job.status in ENDED and changed in (None, job.name):
            figure.log_hparams(folder.path / job.name, job, board.monitor)
    return board


def drop_checkpoints(folder: SweepFolder, board: "Leaderboard", keep: str) -> None:
    """Delete the checkpoints of the jobs that can no longer win; with ``last``, all but their last.ckpt."""
    done = [setting for setting in board.settings if all(job.status in DONE for job in setting.jobs)]
    for job in [job for setting in done[1:] for job in setting.jobs if job.checkpoint] if keep != "all" else []:
        for path in (folder.path / job.name).rglob("*.ckpt"):
            if keep == "winner" or path.name != "last.ckpt":
                path.unlink()
        folder.forget(job.name)
