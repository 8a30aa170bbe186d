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

from src.engine.settings.check import ROOT
from tests.conftest import free_port
from tests.engine.tiny import TINY
from tests.readme.table import words_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install -e '.[ray]'"),
]
ENV = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# A callback that waits until two jobs are at work, so that one node cannot do both before the other is up.
MEET = """
import time
from pathlib import Path
from pytorch_lightning.callbacks import Callback

class Meet(Callback):
    def on_train_start(self, trainer, pl_module):
        deadline = time.monotonic() + 240
        while len(list(Path(trainer.default_root_dir).parent.glob("*/config.yaml"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
"""


def start_node(env: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--block", *arguments]
    return subprocess.Popen(
        command, env={**os.environ, **env}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def count_nodes(address: str) -> int:
    code = f"import ray; ray.init('{address}', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    try:
        shown = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **ENV}, capture_output=True, text=True, check=False,
            timeout=60,
        )  # fmt: skip
    except subprocess.TimeoutExpired:  # a node that does not answer yet
        return 0
    return int(shown.stdout.strip() or 0)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of two nodes of one CPU each."""
    folder = tmp_path_factory.mktemp("meet")
    (folder / "meet.py").write_text(MEET)
    env = {**ENV, "PYTHONPATH": f"{ROOT}:{folder}"}  # what jobs have
    address = f"127.0.0.1:{free_port()}"
    nodes = [
        start_node(env, "--head", f"--port={address.split(':')[1]}", "--include-dashboard=false"),
        start_node(env, f"--address={address}"),
    ]
    try:
        deadline = time.monotonic() + 240
        while count_nodes(address) < 2:
            assert time.monotonic() < deadline
            if nodes[1].poll() is not None:  # it came before the head was there
                nodes[1] = start_node(env, f"--address={address}")
        yield address
    finally:
        for node in nodes:
            os.killpg(node.pid, signal.SIGTERM)
        time.sleep(2)
        for node in nodes:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def sweep(address: str, root: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A sweep by Ray as the README has it, to its end, and its folder."""
    words = words_of("Ray, a sweep", address=address)
    command = [*words[:4], *TINY, *words[4:], "trainer.max_epochs=1", *arguments]
    env = {**os.environ, **ENV, "PROJECT_ROOT": str(root)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    (folder,) = (root / "logs" / "multirun").iterdir()
    return result, folder


def test_a_sweeps_jobs_run_on_both_nodes_and_fail_alone(address: str, tmp_path: Path) -> None:
    result, folder = sweep(
        address, tmp_path, "optimizer.lr=0.01", "data.batch_size=20,40,-1",
        "+node=${oc.env:RAY_RAYLET_PID,none}", "+callbacks.meet._target_=meet.Meet",
    )  # fmt: skip
    assert "1 of 3 jobs failed" in result.stderr, result.stderr
    with (folder / "sweep.csv").open() as file:
        status = {row["job"]: row["status"] for row in csv.DictReader(file)}
    nodes = {yaml.safe_load(path.read_text())["node"] for path in folder.glob("*/config.yaml")}

    assert result.returncode == 1
    assert "batch_size=-1: expected 1 or more" in result.stderr
    assert status == {
        "data.batch_size=20": "finished",
        "data.batch_size=40": "finished",
        "data.batch_size=-1": "failed",
    }
    assert len(nodes) == 2
    assert len(list(folder.glob("*/test/metrics.json"))) == 1


def test_jobs_that_would_start_processes_are_refused(address: str, tmp_path: Path) -> None:
    result, folder = sweep(address, tmp_path, "trainer=ddp_cpu", "optimizer.lr=0.001,0.01")
    assert result.returncode == 1
    reason = "trainer.devices=2: in a sweep this needs hydra/launcher=one_process"
    assert result.stderr.count(reason) >= 2
    assert not list(folder.rglob("*.ckpt"))
