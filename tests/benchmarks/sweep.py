"""What a sweep costs beside its jobs, and what two slots save: ``python -m tests.benchmarks.sweep``.

Needs all of MNIST, in ``data/`` or at $MNIST_ROOT; takes about ten minutes on two cores.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from src.engine.settings.check import ROOT

ROOT_DIR = os.environ.get("MNIST_ROOT") or str(ROOT / "data")
RATES = "optimizer.lr=5e-4,1e-3,2e-3,3e-3,4e-3,5e-3,6e-3,8e-3"


def run(logs: str, *arguments: str) -> float:
    """Seconds that a command takes."""
    start = time.perf_counter()
    data = ["data.source=files", f"data.root={ROOT_DIR}", "test=false"]
    command = [sys.executable, "-m", "src.train", *arguments, *data]
    env = os.environ | {"PROJECT_ROOT": logs}
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def pauses(logs: str) -> tuple[float, float]:
    """Seconds from the first job's end to the sweep's, and how many of them no job was at work."""
    sweep = next(Path(logs).glob("logs/multirun/*"))
    ends = sorted(
        (path.stat().st_mtime, json.loads(path.read_text())["seconds"]) for path in sweep.glob("*/metrics.json")
    )
    total = (sweep / "sweep.png").stat().st_mtime - ends[0][0]
    return total, total - sum(seconds for _, seconds in ends[1:])


def main() -> None:
    """Print the two figures."""
    with tempfile.TemporaryDirectory() as logs:
        run(logs, "-m", "trainer.max_epochs=1", RATES)
        total, pause = pauses(logs)
        print(
            f"one-epoch jobs: {total:.1f} s, of which the sweep itself {pause:.1f} s: {pause / total:.1%}", flush=True
        )
    for epochs in (3,):
        ratio = []
        for launcher in ("basic", "process"):
            with tempfile.TemporaryDirectory() as logs:
                ratio.append(run(logs, "-m", f"trainer.max_epochs={epochs}", RATES, f"hydra/launcher={launcher}"))
        text = f"{ratio[0]:.1f} s one after the other, {ratio[1]:.1f} s in two slots: {ratio[0] / ratio[1]:.2f}x"
        print(f"8 jobs of {epochs} epochs: {text}", flush=True)


if __name__ == "__main__":
    main()
