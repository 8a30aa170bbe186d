"""``python -m src.train`` without the seconds of its imports: forked off a process that has made them."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from src.engine.settings.check import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
# Slow to import; the project itself is imported anew by each command.
CONTEXT.set_forkserver_preload(["hydra", "pytorch_lightning", "torchvision", "torch.utils.tensorboard"])


def start(
    verb: str,
    arguments: Sequence[str],
    stdout: Path,
    env: Mapping[str, str],
    stderr: Path | None = None,
    cwd: str | Path = ROOT,
) -> ForkServerProcess:
    """Start a command; what it prints is added to files, by default to one. It does not outlive this process."""
    environment = {**os.environ, **env}
    process = CONTEXT.Process(
        target=_run, args=(verb, list(arguments), stdout, stderr or stdout, environment, cwd), daemon=True
    )
    process.start()
    return process


def run_command(verb: str, *arguments: str, cwd: str | Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """As ``tests.compose.run_command``, for tests of what a command does, not of how it starts; on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = start(verb, arguments, stdout, env, stderr, cwd)
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([verb, *arguments], 300, stdout.read_bytes(), stderr.read_bytes())
        said = stdout.read_text(), stderr.read_text()
        return subprocess.CompletedProcess([verb, *arguments], process.exitcode, *said)


def _run(verb: str, arguments: list[str], stdout: Path, stderr: Path, env: Mapping[str, str], cwd: str | Path) -> None:
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if ahead := env.get("CLOCK_AHEAD"):
        true = time.time
        time.time = lambda: true() + float(ahead)
    torch.set_num_threads(1)  # what OMP_NUM_THREADS says is read at the import
    sys.argv = [f"src/{verb}.py", *arguments]
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]  # some read the environment when they are imported
    runpy.run_module(f"src.{verb}", run_name="__main__", alter_sys=True)
