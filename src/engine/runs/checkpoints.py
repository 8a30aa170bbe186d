"""Which checkpoint a command takes, and whether it is whole: found without importing torch."""

import csv
import logging
import os
import zipfile
from contextlib import suppress
from pathlib import Path

from src.engine.errors import CheckpointError, ConfigError
from src.engine.runs.processes import get_name
from src.engine.runs.report import listed, shown
from src.engine.runs.status import is_held, list_checkpoints, read_status

log = logging.getLogger(__name__)

MAX_NAMED = 3  # runs that were passed over


def check_checkpoint(path: str | Path) -> None:
    """Check that a checkpoint is there and undamaged, as far as its checksums tell.

    Raises:
        CheckpointError: If it is not.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"ckpt_path={path}: no such file; runs keep theirs in logs/train/<run>/checkpoints/")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"ckpt_path={path}: not a checkpoint, or a truncated one; choose another file")
    try:
        archive = zipfile.ZipFile(path)
        sizes = [entry.file_size for entry in archive.infolist()]
        if sum(sizes) > Path(path).stat().st_size or any(entry.compress_type for entry in archive.infolist()):
            raise ValueError(f"of compressed parts, {sum(sizes):,} bytes in all, as torch writes none")
        damaged = archive.testzip()  # torch.load does not look at the checksums
    except Exception as error:  # a flipped bit in its directory can raise anything
        damaged = str(error)
    if damaged:
        raise CheckpointError(f"ckpt_path={path}: damaged ({damaged}); choose another file")


def find_best(folder: Path) -> Path:
    """The checkpoint to use of a run, or of a sweep's winner, by what they have recorded: the best, or else the last.

    Raises:
        CheckpointError: If there is no such record, or no such file.
    """
    if (folder / "sweep.json").is_file():
        if winner := find_winner(folder):
            return find_best(winner)
        raise CheckpointError(f"ckpt_path={folder}: no job of this sweep has finished; choose a checkpoint file")
    name = (read_status(folder).get("best") or {}).get("checkpoint")
    if not name or not (path := folder / str(name)).is_file():
        raise CheckpointError(f"ckpt_path={folder}: its status.json names no checkpoint that is there; choose a file")
    return path


def find_winner(sweep: Path) -> Path | None:
    """The folder of a sweep's best job, by its table, in which that comes first; None if no job has finished."""
    with suppress(OSError):
        rows = csv.DictReader((sweep / "sweep.csv").read_text("utf-8").splitlines())
        return next((sweep / row["job"] for row in rows if row["status"] == "finished"), None)
    return None


def newest_checkpoint(logs: Path) -> Path:
    """The best checkpoint of the newest run below a folder; logs which, and why that one.

    Raises:
        CheckpointError: If that run has none.
        ConfigError: If there is no run to choose.
    """
    path, reason = choose_newest(logs)
    if not get_name():
        log.info(f"{shown(path)}: {reason}")
    return path


def choose_newest(logs: Path) -> tuple[Path, str]:
    """As ``newest_checkpoint``, without a word: the path, and why it was chosen.

    A run counts once it has finished or was stopped, unless it only tried something out (``debug=``) or has not
    trained. A sweep counts as one run, its winner.
    """
    since: dict[Path, str] = {}
    for path in logs.glob("**/status.json"):
        home = path.parent.parent if (path.parent.parent / "sweep.json").is_file() else path.parent
        since[home] = max(since.get(home, ""), str(read_status(path.parent).get("since")))
    passed: list[str] = []
    for home in sorted(since, key=lambda home: since[home], reverse=True):
        is_sweep = (home / "sweep.json").is_file()
        run = find_winner(home) if is_sweep else home
        kind = f"winner of the newest sweep, {home.name}" if is_sweep else "newest run"
        reason = _why_not(run) if run else "a sweep of which no job has finished"
        if reason or not run:
            passed.append(f"{home.name} ({reason})")
            continue
        try:
            path = find_best(run)
        except CheckpointError as error:
            remedy = "set ckpt_path=<a file, or another run's folder>"
            raise CheckpointError(f"{shown(run)}: the {kind}, has left no checkpoint; {remedy}") from error
        monitor = read_status(run)["best"].get("monitor")
        return path, f"{f'best {monitor}' if monitor else 'last weights'} of the {kind}{_list(passed)}"
    remedy = "train first (python -m src.train) or set ckpt_path"
    raise ConfigError(f"no run to choose below {logs}: {remedy}{_list(passed)}")


def _why_not(run: Path) -> str:
    """Why a run is not one to test; empty if it is."""
    status = read_status(run)
    if status.get("state") not in ("finished", "interrupted", "running"):
        return {"queued": "has not begun"}.get(str(status.get("state")), str(status.get("state")))
    if status["state"] == "running" and is_held(run):
        return "still at work"
    if status.get("reproduces"):
        return f"repeats {Path(status['reproduces']).name}"
    if status.get("debug"):
        return "only tried something out: debug="
    return "" if status.get("train", True) else "has not trained: train=false"


def _list(passed: list[str]) -> str:
    return f"; passed over: {listed(passed, MAX_NAMED)}" if passed else ""


def find_checkpoint(folder: Path) -> Path | None:
    """A run's last checkpoint or, if it is damaged, the newest that is whole; a warning says so.

    Returns:
        None if the run has not written one yet.

    Raises:
        CheckpointError: If there are some, and all of them are damaged.
    """
    paths, reasons = list_checkpoints(folder), []
    # A best.ckpt may be younger, but Lightning writes it before all that belongs to its step is done.
    paths.sort(key=lambda path: path.name == "last.ckpt")
    for path in reversed(paths):
        try:
            check_checkpoint(path)
        except CheckpointError as error:
            reasons.append(str(error).removeprefix(f"ckpt_path={path.parent}{os.sep}").partition(";")[0])
            continue
        if reasons:
            log.warning(f"{path.parent}: {'; '.join(reasons)}: resuming from {path.name}")
        return path
    if reasons:
        raise CheckpointError(f"resume={folder}: {'; '.join(reasons)}; start the run anew")
    return None
