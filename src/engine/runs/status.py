"""How a run stands: ``status.json`` in its folder, and the lock of the process that works there."""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from src.engine.errors import ConfigError

LOCK = ".lock"
INTERRUPTED = 128  # exit statuses above it are signals


def read_status(folder: Path) -> dict[str, Any]:
    """What ``status.json`` holds; empty without one that can be read.

    ``state`` is queued, running, finished, failed or interrupted; ``since`` when; ``process`` and ``host`` whose doing
    it is; ``overrides`` and ``config_dirs`` how the run was started. A run that was killed stays "running": see
    ``is_held``.
    """
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # of bytes that are no text, or no JSON
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        return status if isinstance(status, dict) else {}
    return {}


def write_status(folder: Path, state: str, start: Mapping[str, Any] | None = None) -> None:
    """Write a run's state, and how it was started where that is given."""
    from src.engine.runs.report import write_json  # here: most configs that are rejected need no tables

    since = datetime.now(UTC).isoformat(timespec="seconds")
    own = {"state": state, "since": since, "process": os.getpid(), "host": socket.gethostname()}
    write_json(folder / "status.json", {**read_status(folder), **(start or {}), **own})


def describe_start(hydra: Any) -> dict[str, Any]:
    """How Hydra's node says that a run was started: what ``resume`` repeats."""
    typed: Any = OmegaConf.to_container(hydra.overrides.task)  # with its interpolations: one may lead to a secret
    overrides = [override for override in typed if not override.startswith("resume=")]
    if len(overrides) < len(typed):  # resumed: its own checkpoint is looked up anew
        own = Path(hydra.run.dir).resolve() / "checkpoints"
        overrides = [override for override in overrides if not _is_checkpoint_in(own, override)]
    sources = OmegaConf.to_container(hydra.runtime.config_sources)
    assert isinstance(sources, list)
    dirs = [source["path"] for source in sources if source["provider"] == "command-line"]
    return {"overrides": overrides, "config_dirs": dirs}


def _is_checkpoint_in(folder: Path, override: str) -> bool:
    """Whether an override is a ``ckpt_path=`` of that folder; one of another run is where this one has begun."""
    if not override.startswith("ckpt_path="):
        return False
    path = OverridesParser.create().parse_override(override).value()
    return path is not None and Path(str(path)).resolve().parent == folder


@contextmanager
def tracked(folder: Path, start: Mapping[str, Any]) -> Iterator[None]:
    """Keep ``status.json`` while a run goes on, and other runs out of its folder.

    An attempt to go on that leaves no checkpoint, since it was refused, say, changes nothing in how the run was
    started; had it finished, it still has.

    Raises:
        ConfigError: If another run is in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder):
        before, checkpoints = read_status(folder), _checkpoints(folder)
        write_status(folder, "running", start)
        state = "failed"
        try:
            yield
            state = "finished"
        except KeyboardInterrupt:
            state = "interrupted"
            raise
        except SystemExit as leave:
            state = "interrupted" if isinstance(leave.code, int) and leave.code > INTERRUPTED else "failed"
            raise
        finally:
            had_run = before.get("state", "queued") != "queued"
            if state != "finished" and had_run and _checkpoints(folder) == checkpoints:
                start = {key: before[key] for key in start if key in before}
                state = "finished" if before["state"] == "finished" else state
            with suppress(OSError):  # a full disk: the error that is under way says so
                write_status(folder, state, start)


def _checkpoints(folder: Path) -> dict[Path, int]:
    """When each checkpoint of a run was written, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("checkpoints/*.ckpt")}


def is_held(folder: Path) -> bool:
    """Whether a process works in a run's folder, as far as the file system tells."""
    if not (folder / LOCK).exists():
        return False
    try:
        with _held(folder):
            return False
    except ConfigError:
        return True


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A lock in the folder that ends with the process, killed though it be: a loader's workers do not have it."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        status = read_status(folder)
        raise ConfigError(
            f"hydra.run.dir={folder}: process {status.get('process')} on {status.get('host')} is at work there; "
            "wait for its end, or choose another folder"
        ) from error
    except OSError:  # a file system without locks, or that takes no files
        pass
    try:
        yield
    finally:
        lock.release()
