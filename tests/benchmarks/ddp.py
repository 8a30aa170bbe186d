"""What a second process on the CPU gains: ``python -m tests.benchmarks.ddp``.

One process of one thread beside two of one thread each (trainer=ddp_cpu), on the same global batches; they take turns.
Needs all of MNIST, in ``data/`` or at $MNIST_ROOT, and two idle cores; takes about five minutes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from src.config import ROOT

ROOT_DIR = os.environ.get("MNIST_ROOT") or str(ROOT / "data")
REPETITIONS = 3


def images_per_second(*arguments: str) -> float:
    """The rate of a run of two epochs, as its ``metrics.json`` says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "src.train", *arguments, "trainer.max_epochs=2", "test=false", "data.source=files",
            f"data.root={ROOT_DIR}", f"hydra.run.dir={folder}",
        ]  # fmt: skip
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return float(json.loads((Path(folder) / "metrics.json").read_text())["images_per_second"])


def main() -> None:
    """Print the medians."""
    for batch_size in (64, 512):
        rates: dict[str, list[float]] = {"cpu": [], "ddp_cpu": []}
        for _ in range(REPETITIONS):
            for trainer, found in rates.items():
                found.append(images_per_second(f"trainer={trainer}", f"data.batch_size={batch_size}"))
        one, two = (statistics.median(found) for found in rates.values())
        print(
            f"batches of {batch_size}: {one:.0f} images/s by one process, {two:.0f} by two: {two / one:.2f}x "
            f"({', '.join(f'{b / a:.2f}' for a, b in zip(*rates.values(), strict=True))})",
            flush=True,
        )


if __name__ == "__main__":
    main()
