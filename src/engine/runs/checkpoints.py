"""Which checkpoint a command takes, and whether it is whole: found without importing torch."""

import csv
import json
import logging
import os
import zipfile
from pathlib import Path

from src.engine.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)


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
    """The best checkpoint of a run, or of a sweep's winner, by what they have recorded.

    Raises:
        CheckpointError: If there is no such record, or no such file.
    """
    said = f"ckpt_path={folder}:"
    try:
        if (folder / "sweep.csv").is_file():
            rows = csv.DictReader((folder / "sweep.csv").read_text(encoding="utf-8").splitlines())
            row = next(row for row in rows if row["status"] == "finished")  # the best one comes first
            run, name = folder / row["job"], row["checkpoint"]
        else:
            record = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            run, name = folder, record["best"]["checkpoint"]
    except (OSError, StopIteration) as error:
        raise CheckpointError(f"{said} no finished run's folder, nor a sweep's; choose a checkpoint file") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{said} its record is damaged; choose a file in its checkpoints folder") from error
    # The path was right when it was written; the folder may have been moved since.
    for path in (run / name, run / "checkpoints" / Path(name).name) if name else ():
        if path.is_file():
            return path
    raise CheckpointError(f"{said} its record names no checkpoint that is there; choose a file")


def newest_checkpoint(logs: Path) -> Path:
    """The best checkpoint of the newest run below a folder.

    Raises:
        ConfigError: If there is none.
    """
    found = list(logs.glob("**/checkpoints/best.ckpt"))
    if not found:
        raise ConfigError(f"no checkpoints/best.ckpt below {logs}: train first (python -m src.train) or set ckpt_path")
    return max(found, key=lambda path: path.stat().st_mtime)


def find_checkpoint(folder: Path) -> Path | None:
    """A run's last checkpoint or, if it is damaged, the newest that is whole; a warning says so.

    Returns:
        None if the run has not written one yet.

    Raises:
        CheckpointError: If there are some, and all of them are damaged.
    """
    paths = list(folder.glob("checkpoints/*.ckpt"))
    # A best.ckpt may be younger, but Lightning writes it before all that belongs to its step is done.
    paths.sort(key=lambda path: (path.name == "last.ckpt", path.stat().st_mtime), reverse=True)
    reasons = []
    for path in paths:
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
