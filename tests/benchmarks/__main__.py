"""``make bench``: how fast the template is, beside peers written from the common recipe; about twenty minutes.

    make bench ARGS="--parts epoch start --turns 5 --output logs/bench"

The peers are bare, the shortest hand-written PyTorch loop (``bare.py``), tuned, the same loop in a process with the
settings that our commands make (``load_libraries``), barebones, that loop in Lightning's own barebones Trainer
(``barebones.py``), and recipe, Lightning as tutorials write it (``recipe.py``). Each side runs in a fresh process on a
terminal, as users run it; they take turns, so that a slow moment of the machine meets all of them, and a figure is the
median of the turns' ratios. The table is printed and written to ``bench.md``, all that was measured to ``bench.json``,
the figure to ``scale.svg``.
"""

import argparse
import gzip
import json
import os
import platform
import pty
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from src.engine.settings.check import ROOT

EPOCHS = 3
SCALE = [(5_000, 64), (20_000, 64), (55_000, 64), (55_000, 16), (55_000, 256), (55_000, 1024)]  # images, batch size
IMPORTS = "import torch, pytorch_lightning\n"
PEAK = "from tests.benchmarks.clock import get_peak\nprint('peak', get_peak())"
TUNED = {
    "CUDA_VISIBLE_DEVICES": "",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}


class Run(NamedTuple):
    """A process that has ended: seconds to its end, to its first step, of each epoch; its peak memory in MB."""

    seconds: float
    first_step: float
    epochs: list[float]
    peak: float
    output: str


class Data(NamedTuple):
    """Where each side finds the images: MNIST's files (and unzipped ones for torchvision), or the package's digits."""

    root: Path
    unzipped: Path
    source: str


def find_data(folder: Path) -> Data:
    """Copy MNIST's files to a folder, gzipped and not; without files, use the package's digits."""
    roots = [Path(os.environ.get("MNIST_ROOT") or ROOT / "data"), ROOT.parent / "shared" / "mnist"]
    found = next((root for root in roots if list(root.glob("MNIST/raw/train-images*.gz"))), None)
    data = Data(folder / "gz", folder / "unzipped", "files" if found else "package")
    for path in found.glob("MNIST/raw/*.gz") if found else ():
        for root in data[:2]:
            (root / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, data.root / "MNIST" / "raw" / path.name)
        (data.unzipped / "MNIST" / "raw" / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return data


def run(*arguments: str, stamps: Path | None = None, status: int = 0, env: Mapping[str, str] | None = None) -> Run:
    """Run Python on a terminal of its own.

    Args:
        arguments: Those of the interpreter.
        stamps: Where the process writes when it has got how far; else its output says so.
        status: Its expected exit status.
        env: Beside what is in the environment.
    """
    primary, terminal = pty.openpty()
    start = time.time()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "CI": "", **(env or {})}, stdin=subprocess.DEVNULL,
        stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    output = b"".join(_read(primary)).decode()
    process.wait()
    seconds = time.time() - start
    if process.returncode != status:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{output}")
    lines = (stamps.read_text() if stamps else output).splitlines()
    stamped = [line.split()[1] for line in lines if line.startswith(("step ", "epoch "))]
    at = [float(text) for text in stamped if "/" not in text]  # not "epoch 1/3", which a run may say
    epochs = [after - before for before, after in pairwise(at)]
    peak = next((float(line.split()[1]) for line in lines if line.startswith("peak ")), 0.0)
    return Run(seconds, at[0] - start if at else 0.0, epochs, peak, output)


def _read(descriptor: int) -> Sequence[bytes]:
    parts = []
    try:
        while part := os.read(descriptor, 65536):
            parts.append(part)
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(descriptor)
    return parts


def run_template(data: Data, *overrides: str, ends: bool = False) -> Run:
    """``python -m src.train`` with its defaults, and a callback that writes down when it has got how far."""
    with tempfile.TemporaryDirectory() as folder:
        stamps = Path(folder) / "stamps"
        clock = [f"+callbacks.clock.path={stamps}", f"+callbacks.clock.ends={ends}"]
        return run(
            "-m", "src.train", f"data.root={data.root}", f"data.source={data.source}", f"hydra.run.dir={folder}/run",
            "test=false", "+callbacks.clock._target_=tests.benchmarks.clock.Clock", *clock, *overrides,
            stamps=stamps,
        )  # fmt: skip


def run_bare(data: Data, *arguments: str, peer: str = "bare", env: Mapping[str, str] | None = None) -> Run:
    """The bare loop, or Lightning's barebones."""
    return run("-m", f"tests.benchmarks.{peer}", str(data.root), "--source", data.source, *arguments, env=env)


def run_recipe(data: Data, batch_size: int) -> Run:
    """The tutorials' way, for one epoch, which is enough."""
    with tempfile.TemporaryDirectory() as folder:
        stamps = Path(folder) / "stamps"
        arguments = (str(data.unzipped), folder, str(stamps), "--batch-size", str(batch_size))
        return run("-m", "tests.benchmarks.recipe", *arguments, stamps=stamps)


def take_turns(turns: int, sides: Mapping[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """What each side returns, turn by turn."""
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for turn in range(turns):
        for name, side in sides.items():
            print(f"\r\033[K{turn + 1}/{turns} {name}", end="", file=sys.stderr, flush=True)
            found[name].append(side())
    print("\r\033[K", end="", file=sys.stderr, flush=True)
    return found


def compare(
    what: str, unit: str, ours: Sequence[float], peer: str, theirs: Sequence[float], goal: str, inverse: bool = False
) -> dict[str, Any]:
    """A figure: both sides, and their ratio in each turn: ours over theirs, or the other way round."""
    pairs = [(b, a) if inverse else (a, b) for a, b in zip(ours, theirs, strict=True)]
    ratios = [a / b for a, b in pairs]
    return {
        "what": what, "unit": unit, "template": list(ours), "peer": peer, "theirs": list(theirs), "goal": goal,
        "ratio": statistics.median(ratios), "from": min(ratios), "to": max(ratios),
    }  # fmt: skip


def bench_epoch(data: Data, turns: int, quick: bool) -> list[dict[str, Any]]:
    """An epoch of training and its validation, and the peak of memory meanwhile."""
    figures = []
    for batch_size, goal in ((64, "1.05"), (512, "1.02"))[: 1 if quick else 2]:
        few = ("--batches", "4") if quick else ()
        limit = ("trainer.limit_train_batches=4",) if quick else ()
        loop = ("--batch-size", str(batch_size), "--epochs", str(EPOCHS), *few)
        overrides = (f"data.batch_size={batch_size}", f"trainer.max_epochs={EPOCHS}", *limit)
        sides: dict[str, Callable[[], Run]] = {
            "template": lambda o=overrides: run_template(data, *o),  # type: ignore[misc]
            "bare": lambda a=loop: run_bare(data, *a),  # type: ignore[misc]
            "tuned": lambda a=loop: run_bare(data, *a, env=TUNED),  # type: ignore[misc]
            "barebones": lambda a=loop: run_bare(data, *a, peer="barebones", env=TUNED),  # type: ignore[misc]
        }
        if batch_size == 64:
            sides["imports"] = lambda: run("-c", IMPORTS + PEAK)
            if data.source == "files" and not quick:
                sides["recipe"] = lambda: run_recipe(data, 64)
        found = take_turns(turns, sides)
        epoch = {name: [statistics.median(each.epochs or [0.0]) for each in runs] for name, runs in found.items()}
        what = f"an epoch, batches of {batch_size}"
        for peer, most in (("bare", goal), ("tuned", goal), ("barebones", "1.05")):
            figures.append(compare(what, "s", epoch["template"], peer, epoch[peer], f"at most {most}"))
        if "recipe" in epoch:
            figures.append(compare(what, "s", epoch["template"], "recipe", epoch["recipe"], "at least 3", inverse=True))
        if batch_size == 64:
            peaks = {name: [each.peak for each in found[name]] for name in ("template", "bare", "imports")}
            for peer in ("imports", "bare"):
                figures.append(compare("peak memory", "MB", peaks["template"], peer, peaks[peer], "imports + 150 MB"))
    return figures


def bench_start(data: Data, turns: int, quick: bool) -> list[dict[str, Any]]:
    """From Enter to an answer, and to the first optimizer step."""
    found = take_turns(
        turns,
        {
            "hydra": lambda: run("-c", "import hydra").seconds,
            "--help": lambda: run("-m", "src.train", "--help").seconds,
            "--cfg job": lambda: run("-m", "src.train", "--cfg", "job").seconds,
            "a misspelt key": lambda: run("-m", "src.train", "optimizer.lrr=1", status=1).seconds,
            "imports": lambda: run("-c", IMPORTS).seconds,
            "template": lambda: run_template(data, ends=True).first_step,
            "bare": lambda: run_bare(data, "--batches", "1").first_step,
        },
    )
    figures = [
        compare(name, "s", found[name], "import hydra", found["hydra"], "at most 2")
        for name in ("--help", "--cfg job", "a misspelt key")
    ]
    for peer in ("imports", "bare"):
        figures.append(compare("Enter to first step", "s", found["template"], peer, found[peer], "imports + 0.5 s"))
    return figures


def bench_bar(data: Data, turns: int, quick: bool) -> list[dict[str, Any]]:
    """What the bar costs: an epoch with it, beside one on the terminal of a CI, which has none."""
    overrides = (f"trainer.max_epochs={EPOCHS}", *(["trainer.limit_train_batches=4"] if quick else []))
    found = take_turns(
        turns,
        {
            "bar": lambda: statistics.median(run_template(data, *overrides).epochs),
            "no bar": lambda: statistics.median(run_template(data, *overrides, "callbacks.progress.ci=yes").epochs),
        },
    )
    return [compare("an epoch with the bar", "s", found["bar"], "no bar", found["no bar"], "at most 1.02")]


def bench_test(data: Data, turns: int, quick: bool) -> list[dict[str, Any]]:
    """The test split, in one process."""
    arguments = (str(data.root), "--source", data.source, "--turns", str(1 if quick else 10 * turns))
    output = run("-m", "tests.benchmarks.evaluation", *arguments).output
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    return [compare("the test split", "s", found["template"], "bare inference", found["bare"], "at most 1.1")]


def bench_scale(data: Data, turns: int, quick: bool) -> list[dict[str, Any]]:
    """An epoch of other sizes; once, since the curve's other points tell an outlier."""
    figures = []
    for images, batch_size in [(256, 64)] if quick else SCALE:
        batches = -(-images // batch_size)
        loop = ("--batch-size", str(batch_size), "--batches", str(batches), "--epochs", "2")
        overrides = (f"data.batch_size={batch_size}", f"trainer.limit_train_batches={batches}", "trainer.max_epochs=2")
        found = take_turns(
            1,
            {
                "template": lambda o=overrides: run_template(data, *o).epochs[-1],  # type: ignore[misc]
                "bare": lambda a=loop: run_bare(data, *a).epochs[-1],  # type: ignore[misc]
            },
        )
        figure = compare(
            f"an epoch of {images:,}, batches of {batch_size}", "s", found["template"], "bare", found["bare"], ""
        )
        figures.append({**figure, "images": images, "batch_size": batch_size})
    return figures


def bench_ddp(data: Data, turns: int, quick: bool) -> list[dict[str, Any]]:
    """What a second process on the CPU gains: one of one thread beside two, on the same batches."""
    figures = []
    for batch_size in (64,) if quick else (64, 512):
        overrides = [f"data.batch_size={batch_size}", *(["trainer.limit_train_batches=4"] if quick else [])]
        found = take_turns(
            turns,
            {
                trainer: lambda o=(f"trainer={trainer}", *overrides): time_epoch(data, *o)  # type: ignore[misc]
                for trainer in ("ddp_cpu", "cpu")
            },
        )
        what = f"training of an epoch by two processes, batches of {batch_size}"
        goal = "at least 1.6"
        figures.append(compare(what, "s", found["ddp_cpu"], "one process", found["cpu"], goal, inverse=True))
    return figures


def time_epoch(data: Data, *overrides: str) -> float:
    """Seconds that the batches of an epoch take processes of one thread each, as a run's record says."""
    with tempfile.TemporaryDirectory() as folder:
        run(
            "-m", "src.train", f"data.root={data.root}", f"data.source={data.source}", f"hydra.run.dir={folder}/run",
            "test=false", "trainer.max_epochs=2", *overrides, env={"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        record = json.loads((Path(folder) / "run" / "metrics.json").read_text())
    return float(record["data"]["num_images"]["train"] / record["images_per_second"])


def bench_predict(data: Data, turns: int, quick: bool) -> list[dict[str, Any]]:
    """Pictures of digits that ``src.predict`` gets right; of ``PICTURES_ROOT``, files ``*_is_<digit>.png``, too."""
    pictures = Path(os.environ.get("PICTURES_ROOT") or ROOT.parent / "shared" / "cases" / "digits")
    own = ("--pictures", str(pictures)) if pictures.is_dir() else ()
    with tempfile.TemporaryDirectory() as folder:
        run(
            "-m", "src.train", f"data.root={data.root}", f"data.source={data.source}", f"hydra.run.dir={folder}/run",
            "test=false", f"trainer.max_epochs={1 if quick else 10}",
        )  # fmt: skip
        checkpoint = f"{folder}/run/checkpoints/best.ckpt"
        limit = ("--limit", "100") if quick else ()
        output = run("-m", "tests.benchmarks.pictures", checkpoint, str(data.root), *own, *limit).output
    found = json.loads(output[output.index("{") : output.rindex("}") + 1])  # after what the progress bar left
    return [
        compare(f"right of {of['count']:,} {kind}", "%", [of["template"]], "only resized", [of["plain"]], "96 %")
        for kind, of in found.items()
    ]


PARTS = {
    "epoch": bench_epoch,
    "start": bench_start,
    "bar": bench_bar,
    "test": bench_test,
    "scale": bench_scale,
    "ddp": bench_ddp,
    "predict": bench_predict,
}


def make_table(figures: Sequence[Mapping[str, Any]]) -> str:
    """The figures as a Markdown table."""
    rows = ["| | template | beside | | ratio (from, to) | goal |", "| --- | ---: | --- | ---: | ---: | ---: |"]
    for figure in figures:
        digits = 0 if figure["unit"] == "MB" else 2
        ours, theirs = (
            f"{statistics.median(figure[side]):.{digits}f} {figure['unit']}" for side in ("template", "theirs")
        )
        ratio = f"{figure['ratio']:.2f} ({figure['from']:.2f}, {figure['to']:.2f})"
        rows.append(f"| {figure['what']} | {ours} | {figure['peer']} | {theirs} | {ratio} | {figure['goal']} |")
    return "\n".join(rows) + "\n"


def draw(figures: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds of an epoch against the number of images and the batch size."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "lenet5"  # the same figures give the same file
    points = [figure for figure in figures if "images" in figure]
    page = Figure(figsize=(8, 2.8), layout="constrained")
    panels = (
        ("images", "images, in batches of 64", "batch_size"),
        ("batch_size", "batch size, 55,000 images", "images"),
    )
    all_axes = page.subplots(1, 2)
    all_axes[1].sharey(all_axes[0])
    for axes, (key, label, other) in zip(all_axes, panels, strict=False):
        fixed = {"batch_size": 64, "images": max(point["images"] for point in points)}[other]
        line = sorted((point for point in points if point[other] == fixed), key=lambda point: point[key])
        for side, name in (("template", "template, all on"), ("theirs", "bare loop")):
            axes.plot([point[key] for point in line], [point[side][0] for point in line], "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.set_xticks([point[key] for point in line], [f"{point[key]:,}" for point in line])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    page.axes[0].set_ylabel("seconds an epoch")
    page.axes[0].legend(frameon=False)
    page.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few batches, to see whether it runs")
    parser.add_argument("--output", type=Path, default=ROOT / "logs" / "bench")
    arguments = parser.parse_args()

    start, load = time.time(), os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        data = find_data(Path(folder))
        figures = []
        for part in arguments.parts:
            figures += PARTS[part](data, arguments.turns, arguments.quick)
            print(make_table(figures), file=sys.stderr)  # so that what ends the next part loses none of it
    machine = {
        "cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "pytorch-lightning", "hydra-core")},
        "data": data.source, "turns": arguments.turns, "seconds": round(time.time() - start),
        "load_before": load, "load_after": os.getloadavg(),
    }  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = make_table(figures)
    (arguments.output / "bench.json").write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")
    (arguments.output / "bench.md").write_text(table)
    if "scale" in arguments.parts:
        draw(figures, arguments.output / "scale.svg")
    print(table)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
