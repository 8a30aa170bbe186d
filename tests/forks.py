"""``python -m src.train`` without the seconds of its imports: forked off a process that has them behind it."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from src.config import ROOT

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["src.train", "src.build", "src.report", "src.callbacks.last_checkpoint", "torchvision"])


def start(verb: str, arguments: Sequence[str], said: Path, env: Mapping[str, str]) -> ForkServerProcess:
    """Start a command; what it prints is added to the file ``said``. It does not outlive this process."""
    process = _forks.Process(target=_run, args=(verb, list(arguments), said, dict(env)), daemon=True)
    process.start()
    return process


def _run(verb: str, arguments: list[str], said: Path, env: Mapping[str, str]) -> None:
    with said.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(ROOT)
    os.environ.update(env)
    torch.set_num_threads(1)  # what OMP_NUM_THREADS says is read at the import
    sys.argv = [f"src/{verb}.py", *arguments]
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]  # some read the environment when they are imported
    runpy.run_module(f"src.{verb}", run_name="__main__", alter_sys=True)
