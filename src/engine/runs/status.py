"""How a run stands: ``status.json`` in its folder, and the lock of the process that works there."""

import json
import logging
import os
import re
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from src.engine.errors import ConfigError
from src.engine.runs.report import write_json
from src.engine.settings.check import CONF

log = logging.getLogger(__name__)

CLOCK = ".clock"  # in logs/, the latest time that a run has written
LOCK = ".lock"
INTERRUPTED = 128  # exit statuses above it are signals
REPRODUCES = "REPRODUCES_RUN"  # in the environment of a run that src.reproduce starts: the other run
# Hydra's settings that say where a run and its files are, or belong to the sweep that it was a part of.
OF_STARTS = re.compile(r"[+~]*hydra[./](run\.|mode=|searchpath=|sweep|launcher)")


def read_status(folder: Path) -> dict[str, Any]:
    """What ``status.json`` holds; empty without one that can be read.

    - ``state``: queued, running, finished, failed or interrupted; ``since`` when; ``process`` and ``host`` whose doing
      it is. A run that was killed stays "running": see ``is_held``.
    - How it was started, as ``describe_start`` returns it.
    - What it comes from, as ``describe_origin`` returns it; ``data``, what its data module says of its data;
      ``resumed_with``: what of these has changed at a resume.
    - ``train``: whether it trains; ``debug``: whether it only tries something out.
    - ``checkpoints``: the files that it has saved; ``best``: the one to use, ``checkpoint``, with its ``score`` by
      ``monitor`` and ``mode``. Without a ``monitor`` it is the last, not the best. Paths are relative to the folder.
    """
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # of bytes that are no text, or no JSON
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        return status if isinstance(status, dict) else {}
    return {}


def write_status(folder: Path, state: str, facts: Mapping[str, Any] | None = None) -> None:
    """Write a run's state and, where they are given, further facts; what else is in the file stays."""
    own = {"state": state, "since": _now(), "process": os.getpid(), "host": socket.gethostname()}
    add_to_status(folder, {**(facts or {}), **own})


def _now() -> str:
    """The time, later than all that the project's runs have written, also if the clock was set back: it orders them."""
    now, clock = datetime.now(UTC), Path(os.environ.get("PROJECT_ROOT", "."), "logs", CLOCK)
    with suppress(OSError, ValueError):  # of a first run, or while another one writes it
        now = max(now, datetime.fromisoformat(clock.read_text()) + timedelta(milliseconds=1))
    with suppress(OSError):
        clock.write_text(now.isoformat())
    return now.isoformat(timespec="milliseconds")


def add_to_status(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write facts of a run beside those that are there."""
    write_json(folder / "status.json", {**read_status(folder), **facts})


def describe_start(hydra: Any) -> dict[str, Any]:
    """How Hydra's node says that a run was started: what ``resume`` and ``src.reproduce`` repeat.

    Returns:
        ``overrides``; ``hydra``, those of Hydra's own settings that matter to one run, such as hydra.searchpath;
        ``config_dirs``, ``config_name`` and ``config_path`` (null: the command's own); ``cwd``, where it was typed;
        ``debug``, whether a file of conf/debug/ was chosen; ``reproduces``, the run that it repeats.
    """
    typed: Any = OmegaConf.to_container(hydra.overrides.task)  # with its interpolations: one may lead to a secret
    overrides = [override for override in typed if not override.startswith("resume=")]
    if len(overrides) < len(typed):  # resumed: its own checkpoint is looked up anew
        overrides = [override for override in overrides if not is_checkpoint_of(Path(hydra.run.dir), override)]
    sources: Any = OmegaConf.to_container(hydra.runtime.config_sources)

    def find_places(provider: str) -> list[str]:
        found = [(each["schema"], each["path"]) for each in sources if each["provider"] == provider]
        return [str(Path.cwd() / path) if schema == "file" else f"{schema}://{path}" for schema, path in found]

    own: Any = OmegaConf.to_container(hydra.overrides.hydra)
    own = [override for override in own if not OF_STARTS.match(override)]
    if searched := find_places("hydra.searchpath in command-line"):  # relative to where it was typed
        own.append(f"hydra.searchpath={[place if '://' in place else f'file://{place}' for place in searched]}")
    return {
        "overrides": overrides,
        "hydra": own,
        "config_dirs": find_places("command-line"),
        "config_name": hydra.job.config_name,
        "config_path": next((path for path in find_places("main") if Path(path).resolve() != CONF), None),
        "cwd": hydra.runtime.cwd,
        "debug": bool(hydra.runtime.choices.get("debug")),
        "reproduces": os.environ.get(REPRODUCES),
    }


def repeat_start(status: Mapping[str, Any]) -> list[str]:
    """The arguments that start a run once more, by its ``status.json``: flags first."""
    flags = [f"--config-dir={path}" for path in status["config_dirs"]]
    flags += [f"--config-name={name}" for name in [status.get("config_name")] if name not in (None, "train")]
    flags += [f"--config-path={path}" for path in [status.get("config_path")] if path]
    return [*flags, *status["overrides"], *status.get("hydra", [])]


def is_checkpoint_of(folder: Path, override: str) -> bool:
    """Whether an override is a ``ckpt_path=`` of that run; one of another run is where this one has begun."""
    if not override.startswith("ckpt_path="):
        return False
    path = Path(str(OverridesParser.create().parse_override(override).value())).resolve()
    return path.parent == folder.resolve() / "checkpoints" or path in map(Path.resolve, list_checkpoints(folder))


@contextmanager
def tracked(folder: Path, start: Mapping[str, Any]) -> Iterator[None]:
    """Keep ``status.json`` while a run is at work, and other runs out of its folder.

    You are warned where the file system has no locks; on NFS they hold across machines, as far as its server locks.

    An attempt to resume that leaves no checkpoint, since it was refused, say, changes nothing in how the run was
    started; had it finished, it still has.

    Raises:
        ConfigError: If another run is in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder) as is_locked:
        if not is_locked:
            log.warning(f"hydra.run.dir={folder}: a file system without locks: start no other run there meanwhile")
        before, checkpoints = read_status(folder), _times(folder)
        write_status(folder, "running", start)
        state = "failed"
        try:
            yield
            state = "finished"
        except (KeyboardInterrupt, SystemExit) as leave:
            code = getattr(leave, "code", INTERRUPTED + signal.SIGINT)
            state = "interrupted" if isinstance(code, int) and code > INTERRUPTED else "failed"
            raise
        finally:
            had_run = before.get("state", "queued") != "queued"
            if state != "finished" and had_run and _times(folder) == checkpoints:
                start = before
                state = "finished" if before["state"] == "finished" else state
            with suppress(OSError):  # a full disk: the error that is under way says so
                write_status(folder, state, start)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that are there, the newest last: those of its record, and others in its own folder."""
    recorded = [folder / name for name in read_status(folder).get("checkpoints", [])]
    others = sorted(folder.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return list(dict.fromkeys(filter(Path.is_file, [*recorded, *others])))


def _times(folder: Path) -> dict[Path, int]:
    """When each checkpoint of a run was written, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in list_checkpoints(folder)}


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
def _held(folder: Path) -> Iterator[bool]:
    """A lock in the folder that ends with the process, killed though it be: a loader's workers do not have it.

    Yields:
        Whether there is one: some file systems have no locks.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        status = read_status(folder)
        who = f"process {status.get('process')} on {status.get('host')}"
        raise ConfigError(f"hydra.run.dir={folder}: {who} is at work there; wait, or choose another folder") from error
    except OSError:  # a file system without locks, or that takes no files
        pass
    try:
        yield lock.is_locked
    finally:
        lock.release()
