"""Many jobs in one process: what one leaves in memory, a thousand would leave a thousand times."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.engine.settings.check import ROOT
from tests.engine.tiny import TINY

NUM_JOBS = 100


def resident_memory(pid: int) -> float:
    """MiB that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found, status
    return int(found.group(1)) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_hundred_jobs_in_one_process_leave_less_than_a_tenth_of_a_megabyte_each(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "src.train", "-m", *TINY, f"seed=range({NUM_JOBS})", f"hydra.sweep.dir={tmp_path}/sweep",
        "trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "test=false",
    ]  # fmt: skip
    env = {**os.environ, "PROJECT_ROOT": str(tmp_path)}
    memory = []
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=ROOT, env=env, stderr=log) as process,
    ):
        for seed in range(NUM_JOBS):
            while not (tmp_path / "sweep" / f"seed={seed}" / "metrics.json").is_file():
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.01)
            memory.append(resident_memory(process.pid))
    assert process.returncode == 0, (tmp_path / "log").read_text()
    print(f"MiB after job 1, 10, 20, ..., 100: {[round(memory[0]), *(round(mib) for mib in memory[9::10])]}")
    assert (memory[-1] - memory[9]) / (NUM_JOBS - 10) < 0.1
