"""Runs of several processes, to their end."""

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.compose import run_command
from tests.engine.equality import weights
from tests.processes import living, wait_until

ENV = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # threads that outnumber the cores spin for each other


class Run(NamedTuple):
    """A run that has ended: its folder and what it has printed."""

    path: Path
    stdout: str = ""
    stderr: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = json.loads((self.path / "metrics.json").read_text())["metrics"]
        return {name: value for name, value in metrics.items() if "per_second" not in name}


def assert_equal_runs(run: Run, alone: Run) -> None:
    """Several processes come to the weights and metrics of one, but for what rounding in another order changes."""
    assert run.metrics.keys() == alone.metrics.keys()
    for name, value in alone.metrics.items():
        assert run.metrics[name] == pytest.approx(value, rel=0 if name.endswith("/acc") else 1e-5), name
    last, other = (weights(each.path / "checkpoints" / "last.ckpt") for each in (run, alone))
    torch.testing.assert_close(last, other, rtol=0, atol=2e-6)


def run_together(verb: str, root: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, below a root of its own, and look that it leaves no process."""
    result = run_command(verb, *arguments, PROJECT_ROOT=str(root), **ENV, **env)
    wait_until(lambda: not living(str(root)), seconds=60)
    return result


def train_together(root: Path, *arguments: str) -> Run:
    """Train to the end, into one folder."""
    result = run_together("train", root, *arguments)
    assert result.returncode == 0, result.stderr
    (folder,) = (root / "logs" / "train").iterdir()
    return Run(folder, result.stdout, result.stderr)
