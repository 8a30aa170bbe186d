"""Configs as the commands get them, and the commands themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig

from src.engine.settings.check import CONF, ROOT
from tests.configs import compose_fast

needs_mnist = pytest.mark.skipif(not (CONF / "data" / "mnist.yaml").exists(), reason="MNIST has been deleted")


def compose_cfg(output_dir: Path, *overrides: str, config_name: str = "train") -> DictConfig:
    """The config of a command that writes to ``output_dir``."""
    return compose_fast(config_name, f"output_dir={output_dir}", f"root_dir={output_dir}", *overrides)


def run_command(verb: str, *arguments: str, cwd: str | Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m src.<verb>`` as a user does; its output is no terminal."""
    return subprocess.run(
        [sys.executable, "-m", f"src.{verb}", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
