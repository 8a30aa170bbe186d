"""What a command does before its work: bad settings are test_command.py's; this is how it loads the libraries."""

import os
import platform
import subprocess
import sys

import pytest

from src.engine.settings.check import ROOT

COUNT_PAGE_FAULTS = """
import gc, os, resource
from src.engine.runs.preflight import load_libraries
load_libraries()
import torch
for turn in range(60):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.zeros(2_000_000).add_(1) for _ in range(4)]  # 8 MB each, as the layers of a batch
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, gc.isenabled(), torch.cuda.is_available())
print(repr(os.environ.get("CUDA_VISIBLE_DEVICES")))
"""


def _count_page_faults() -> list[str]:
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS]
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert result.stderr == ""  # at the process's end, too
    return result.stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_commands_steps_find_the_memory_of_the_step_before() -> None:
    faults, gc_enabled, has_gpu, visible = _count_page_faults()

    assert int(faults) < 50 * 4 * 8_000_000 / 4096 / 10  # a tenth of all pages; without, half of them as a rule
    assert gc_enabled == "True"
    assert visible == ("None" if has_gpu == "True" else "''")
