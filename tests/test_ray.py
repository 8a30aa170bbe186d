"""A sweep on a Ray cluster of two nodes, each its own ``ray start``, on this machine."""

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from src.config import ROOT
from tests.conftest import free_port
from tests.readme import words_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install -e '.[ray]'"),
]
ENV = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start_node(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--block", *arguments]
    return subprocess.Popen(
        command, env={**os.environ, **ENV}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def count_nodes(address: str) -> int:
    code = f"import ray; ray.init('{address}', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    shown = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ENV}, capture_output=True, text=True, check=False
    )
    return int(shown.stdout.strip() or 0)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a cluster of two nodes of one CPU each."""
    address = f"127.0.0.1:{free_port()}"
    nodes = [
        start_node("--head", f"--port={address.split(':')[1]}", "--include-dashboard=false"),
        start_node(f"--address={address}"),
    ]
    try:
        deadline = time.monotonic() + 90
        while count_nodes(address) < 2 and time.monotonic() < deadline:
            if nodes[1].poll() is not None:  # it came before the head was there
                nodes[1] = start_node(f"--address={address}")
        yield address
    finally:
        for node in nodes:
            os.killpg(node.pid, signal.SIGTERM)
        time.sleep(2)
        for node in nodes:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def test_a_sweeps_jobs_run_on_both_nodes_and_fail_alone(address: str, tmp_path: Path) -> None:
    command = [
        *words_of("Ray, a sweep", address=address), "optimizer.lr=0.001,0.01,-1", "data=mnist5k",
        "trainer.max_epochs=1", "trainer.limit_train_batches=20", "+node=${oc.env:RAY_RAYLET_PID,none}",
    ]  # fmt: skip
    env = {**os.environ, **ENV, "PROJECT_ROOT": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert "1 of 3 jobs failed" in result.stderr
    (sweep,) = (tmp_path / "logs" / "multirun").iterdir()
    with (sweep / "sweep.csv").open() as file:
        status = {row["job"]: row["status"] for row in csv.DictReader(file)}
    nodes = {yaml.safe_load(path.read_text())["node"] for path in sweep.glob("*/config.yaml")}

    assert result.returncode == 1
    assert "optimizer.lr=-1: expected a number above 0" in result.stderr
    assert status == {"optimizer.lr=0.001": "finished", "optimizer.lr=0.01": "finished", "optimizer.lr=-1": "failed"}
    assert len(nodes) == 2
    assert len(list(sweep.glob("*/test/metrics.json"))) == 1
