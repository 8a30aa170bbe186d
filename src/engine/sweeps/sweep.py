"""What every sweep does before its jobs and after them, however the jobs are chosen and launched."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from src.engine.errors import SweepError
from src.engine.runs import report
from src.engine.runs.command import claim
from src.engine.runs.evaluate import test_checkpoint
from src.engine.runs.processes import get_name
from src.engine.runs.resume import quoted
from src.engine.sweeps.folder import Job, SweepFolder
from src.engine.sweeps.leaderboard import Leaderboard, count, show


@contextmanager
def running(config: DictConfig, space: Mapping[str, str]) -> Iterator[SweepFolder]:
    """A sweep's folder to run jobs in; behind them, the winner is tested and the leaderboard shown.

    With ``test=all`` each job is tested.

    Args:
        config: The sweep's config with Hydra's node, of which jobs are to be composed.
        space: What each swept key runs over, as it was written.

    Raises:
        SweepError: If the sweep cannot start, or jobs have failed.
    """
    shared = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    path = Path(config.hydra.sweep.dir).resolve()
    if not any(override.startswith("hydra.sweep.dir=") for override in config.hydra.overrides.hydra):
        path = claim(path)
    config.hydra.sweep.dir = str(path)
    config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(path)}")  # the jobs' configs are composed anew
    folder = SweepFolder(path)
    with folder.opened(shared, space):
        try:
            yield folder
        except SystemExit:  # a signal
            print(f"stopped: {_how_to_go_on(path)}", file=sys.stderr)
            raise
        board = renew(folder)
        if config.test and board.winner:
            _test(folder, board.jobs if config.test == "all" else board.winner.jobs, shared)
            board = renew(folder)
    show(board, f"sweep {report.shown(path)}")
    _raise_failures(folder)


def _test(folder: SweepFolder, jobs: Iterable[Job], config: DictConfig) -> None:
    """Test finished jobs, each once."""
    for job in jobs:
        output_dir = folder.path / job.name / "test"
        if job.status == "finished" and job.checkpoint and not (output_dir / "metrics.json").is_file():
            trainer = {**config.accelerator, "limit_test_batches": config.trainer.get("limit_test_batches")}
            trainer["devices"] = 1  # more would be processes, which would start the sweep again
            if trainer["accelerator"] != "cpu":  # the jobs may have run on another machine
                trainer["accelerator"] = "auto"
            test_checkpoint(Path(job.checkpoint), output_dir, trainer)


def _raise_failures(folder: SweepFolder) -> None:
    jobs = folder.jobs()
    failed = [job for job in jobs if job.status not in ("finished", "pruned")]
    if failed:
        errors = [f"  {job.name}: {(job.error or job.status).splitlines()[0]}" for job in failed]
        raise SweepError(
            "\n".join([f"{len(failed)} of {len(jobs)} jobs failed; {_how_to_go_on(folder.path)}", *errors])
        )


def _how_to_go_on(path: Path) -> str:
    override = f"hydra.sweep.dir={report.shown(path)}"
    if not re.fullmatch(r"[\w./=-]+", override):
        override = f'"hydra.sweep.dir={quoted(report.shown(path))}"'
    return f"the same command with {override} goes on"


class KeepLeaderboard(Callback):
    """Hydra's callback at the end of each job of a sweep: renews the sweep's leaderboard."""

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Renew it."""
        folder = SweepFolder(config.hydra.sweep.dir)
        if config.hydra.mode == RunMode.MULTIRUN and not get_name() and (folder.path / "sweep.json").is_file():
            board = renew(folder)
            ended = [job.status for job in board.jobs if job.status not in ("waiting", "started")]
            best = (
                f"; best: {board.best_job.name}, {board.monitor} {board.best_job.score:.4f}" if board.best_job else ""
            )
            print(f"{len(ended)} of {len(board.jobs)} jobs: {count(ended)}{best}", flush=True)


def renew(folder: SweepFolder) -> Leaderboard:
    """Write a sweep's leaderboard as it stands: sweep.csv, sweep.md, sweep.png, TensorBoard."""
    from src.sweeps import figure

    plan = folder.plan
    board = Leaderboard(folder.jobs(), plan["monitor"], plan["mode"])
    report.write_text(folder.path / "sweep.csv", board.to_csv())
    report.write_text(folder.path / "sweep.md", board.to_markdown(f"Sweep {folder.path.name}"))
    png = figure.draw(board)
    report.write_bytes(folder.path / "sweep.png", png)
    figure.log_image(folder.path, png)
    for job in board.jobs:
        if job.status in ("finished", "pruned", "failed"):
            figure.log_hparams(folder.path / job.name, job, board.monitor)
    return board
