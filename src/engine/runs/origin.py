"""What a run comes from: its commit and what has changed since, packages, threads, device."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from src.engine.runs.report import listed, write_bytes
from src.engine.settings.check import ROOT

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "hydra-core", "tensorboard")
PATCH = "changes.patch"
MAX_BYTES = 10_000_000  # of a patch
COMPARED = ("commit", "changes", "python", "threads", "device", "data")  # and the packages


def environment() -> dict[str, Any]:
    """The main versions, git commit and arguments, a sweep's job's own; -dirty where files differ from the commit."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    commit, _, untracked, is_changed = _read_changes()
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git_commit": f"{commit}-dirty" if commit and (untracked or is_changed) else commit,
        "arguments": list(hydra.overrides.task) if hydra and hydra.mode == RunMode.MULTIRUN else sys.argv[1:],
    }


def describe_origin(folder: Path, device: Any) -> dict[str, Any]:
    """What somebody needs to repeat a run, for its ``status.json``; what differs from the commit goes beside it.

    Args:
        folder: The run's. ``changes.patch`` has all changes, untracked files included, up to ``MAX_BYTES``.
        device: The ``torch.device`` that it trains on.

    Returns:
        ``commit`` (None without git), ``changes`` (the patch's hash, None without changes), ``left_out`` (what was too
        large for it), ``python``, ``packages`` by name, ``threads`` and ``device``.
    """
    import torch  # here: whoever asks for a commit only need not wait for it

    commit, top, untracked, is_changed = _read_changes()
    patch, left_out = _make_patch(top, untracked) if untracked or is_changed else (b"", [])
    (folder / PATCH).unlink(missing_ok=True)
    if patch:
        write_bytes(folder / PATCH, patch)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    capability = [torch.backends.cpu.get_cpu_capability()] if device.type == "cpu" else []
    return {
        "commit": commit,
        "changes": hashlib.sha256(patch).hexdigest()[:12] if patch else None,
        "left_out": left_out,
        "python": platform.python_version(),
        "packages": _list_packages(),
        "threads": torch.get_num_threads(),
        "device": " ".join([device.type, name, *capability]),
    }


def compare_origins(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs of what two records say, as in ``threads: 1 -> 2, torch: 2.14.0 -> 2.15.0``; empty if nothing."""
    pairs = {key: (before[key], now[key]) for key in COMPARED if key in before and key in now}
    if old := before.get("packages"):
        pairs |= {name: (old.get(name), now["packages"].get(name)) for name in sorted({*old, *now["packages"]})}
    return listed([f"{key}: {one} -> {other}" for key, (one, other) in pairs.items() if one != other])


def git(*arguments: str, cwd: Path | None = None, given: bytes = b"", env: Mapping[str, str] | None = None) -> bytes:
    """What git prints.

    Raises:
        OSError: If git is not installed.
        CalledProcessError: If it fails; ``stderr`` says why.
    """
    command = ["git", "--no-optional-locks", "--literal-pathspecs", *arguments]
    env = {**os.environ, **(env or {})}
    return subprocess.run(command, cwd=cwd or ROOT, input=given, capture_output=True, check=True, env=env).stdout


def _read_changes() -> tuple[str | None, Path, list[str], bool]:
    """The commit, the repository's folder, its untracked files and whether others differ; None without git."""
    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").decode().splitlines()
        status = os.fsdecode(git("status", "--porcelain", "-z", "--untracked-files=all", cwd=Path(top)))
    except (OSError, subprocess.CalledProcessError):
        return None, ROOT, [], False
    entries = status.split("\0")[:-1]
    files = [entry[3:] for entry in entries if entry.startswith("?? ") and not entry.endswith("/")]
    untracked = [name for name in files if not _is_written_by_run(Path(top, name))]
    return commit, Path(top), untracked, any(not entry.startswith("?? ") for entry in entries)


def _is_written_by_run(path: Path) -> bool:
    return any((folder / name).is_file() for folder in path.parents for name in ("status.json", "sweep.json"))


def _make_patch(top: Path, untracked: list[str]) -> tuple[bytes, list[str]]:
    """All changes as git applies them, made beside the repository's own index; and what was too large for it."""
    kept: list[str] = []
    left_out: list[str] = []
    total = 0
    for size, name in sorted((os.lstat(top / name).st_size, name) for name in untracked):
        total += size
        (kept if total <= MAX_BYTES else left_out).append(name)
    paths = git("rev-parse", "--path-format=absolute", "--git-path", "index", "--git-path", "objects", cwd=top)
    index, objects = paths.decode().splitlines()
    with tempfile.TemporaryDirectory() as aside:
        env = {
            "GIT_INDEX_FILE": str(shutil.copy(index, f"{aside}/index")), "GIT_OBJECT_DIRECTORY": aside,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": objects,
        }  # fmt: skip
        if kept:
            listing = ("--pathspec-from-file=-", "--pathspec-file-nul")
            git("add", "--intent-to-add", *listing, cwd=top, given=os.fsencode("\0".join(kept)), env=env)
        plain = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--src-prefix=a/", "--dst-prefix=b/")
        patch = git("diff", "--binary", *plain, "HEAD", cwd=top, env=env)
    if len(patch) > MAX_BYTES:
        return b"", [*left_out, f"changes of {len(patch):,} bytes"]
    return patch, left_out


def _list_packages() -> dict[str, str]:
    """Installed packages and versions, by their folders' names: to read their metadata takes long."""
    names = [path.stem for folder in reversed(sys.path) for path in Path(folder).glob("*.dist-info")]
    return dict(sorted((name.partition("-")[0], name.partition("-")[2]) for name in names))
