"""Train a run again from its record, in a worktree of its commit, and compare the two to the bit."""

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from src.engine.errors import ConfigError, ReproductionError
from src.engine.runs.checkpoints import find_winner
from src.engine.runs.command import user_environment
from src.engine.runs.origin import PATCH, compare_origins, git
from src.engine.runs.report import listed, shown
from src.engine.runs.resume import describe_differences, quoted
from src.engine.runs.status import REPRODUCES, is_checkpoint_of, list_checkpoints, read_status, repeat_start
from src.engine.settings.check import ROOT

log = logging.getLogger(__name__)

NOT_COMPARED = ("per_second", "DeviceStatsMonitor", "best/")  # in names: what clocks say, what a sweep adds
MAX_SHOWN = 5
Curves = dict[str, dict[int, float]]  # value by step, by name


def find_run(value: str | None) -> Path:
    """The folder of a run that can be trained again; of a sweep's, its winner's.

    Raises:
        ConfigError: If there is none, it has not finished, or its commit is not known here.
    """
    said = f"run={value}:"
    folder = Path(value or "").resolve()
    if value is None or not folder.is_dir():
        raise ConfigError(f"{said} expected the folder of a run or of a sweep, as in run=logs/train/<date_time>")
    if (folder / "sweep.json").is_file():
        if not (winner := find_winner(folder)):
            raise ConfigError(f"{said} no job of this sweep has finished; repeat its command, then this one")
        folder = winner
    status = read_status(folder)
    if status.get("state") != "finished" or "overrides" not in status:
        state = status.get("state", "no run's folder: it has no status.json that can be read")
        raise ConfigError(f"{said} {state}; expected a run that has finished")
    if not (commit := status.get("commit")):
        raise ConfigError(f"{said} its record has no commit: it was trained without git, or by an older release")
    try:
        git("cat-file", "-e", f"{commit}^{{commit}}")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"{said} its commit, {commit}, is not in this clone; git fetch from where it is") from error
    return folder


def train_again(run: Path, folder: Path) -> None:
    """Train a run once more with its settings, commit and threads; what else differs is logged at the start.

    Args:
        run: As ``find_run`` returns it.
        folder: Of the new run.

    Raises:
        ReproductionError: If the run's changes do not apply to its commit, or the training fails.
    """
    status = read_status(run)
    config = _read_config(run)
    for name in status.get("left_out", []):
        log.warning(f"not the same code: {name} was too large for the run's {PATCH}")
    for changed in status.get("resumed_with", []):
        log.warning(f"the run itself was resumed with another origin: {changed}")
    with _worktree(status, run) as tree:
        arguments = [argument for argument in repeat_start(status) if not is_checkpoint_of(run, argument)]
        for number, argument in enumerate(arguments):
            if argument.startswith(("--config-", "hydra.searchpath=")):  # in the code of then
                arguments[number] = argument.replace(f"{ROOT}{os.sep}", f"{tree}{os.sep}")
        if (config.get("callbacks") or {}).get("summary", "") is None:  # as in a sweep's job
            arguments.append("callbacks.summary=null")
        command = [sys.executable, "-m", "src.train", *arguments, f"seed={config['seed']}"]
        environment = {
            **user_environment(), REPRODUCES: str(run), "OMP_NUM_THREADS": str(status["threads"]),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")])),
            "PYTHONSAFEPATH": "1",  # else the code of the working directory comes first
        }  # fmt: skip
        cwd = status["cwd"] if Path(status["cwd"]).is_dir() else tree
        with subprocess.Popen([*command, f"hydra.run.dir={quoted(folder)}"], cwd=cwd, env=environment) as process:
            try:
                while process.poll() is None and "data" not in read_status(folder):
                    time.sleep(0.1)
                if "data" in (now := read_status(folder)):
                    settings = describe_differences(config, _read_config(folder))
                    differs = ", ".join(filter(None, [compare_origins(status, now), settings]))
                    log.info(f"differs from {shown(run)}: {differs}" if differs else f"trains like {shown(run)}")
                process.wait()
            finally:
                process.terminate()  # nothing comes of it where it has ended
    if process.returncode:
        raise ReproductionError(f"run={run}: to train it again failed with exit status {process.returncode}; see above")


@contextmanager
def _worktree(status: dict[str, Any], run: Path) -> Iterator[Path]:
    """The project as it was when the run started, in a folder of its own."""
    with tempfile.TemporaryDirectory() as aside:
        tree = Path(aside).resolve() / "code"
        git("-c", "core.hooksPath=/dev/null", "worktree", "add", "--detach", str(tree), status["commit"])
        try:
            if status.get("changes"):
                git("apply", "--whitespace=nowarn", str(run / PATCH), cwd=tree)
            project = tree / git("rev-parse", "--show-prefix").decode().strip()
            if (local := ROOT / "conf" / "local").is_dir():  # this machine's, which git ignores
                shutil.copytree(local, project / "conf" / "local", dirs_exist_ok=True)
            yield project
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode(errors="replace").strip().splitlines()[0]
            raise ReproductionError(f"{run / PATCH}: does not apply to {status['commit']}: {reason}") from error
        finally:
            git("worktree", "remove", "--force", str(tree))


def _read_config(folder: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))


def compare_runs(run: Path, again: Path) -> tuple[str, str]:
    """Compare the curves, the metrics and the weights of two runs; what clocks say is left out.

    Returns:
        What was compared, as in ``12 curves of 480 points``, and where the two part, the earliest step first; that is
        empty if they are equal to the bit.
    """
    curves, others = read_curves(run), read_curves(again)
    common = sorted(curves.keys() & others.keys())
    found = []
    for step in sorted({step for name in common for step in {*curves[name], *others[name]}}):
        pair = [{name: each[name][step] for name in common if step in each[name]} for each in (curves, others)]
        if parted := _compare(*pair):
            found.append(f"the curves part at step {step}: {parted}")
            break
    for place, extra in {"there": curves.keys() - others.keys(), "here": others.keys() - curves.keys()}.items():
        if extra:
            found.append(f"curves only {place}: {', '.join(sorted(extra)[:MAX_SHOWN])}")
    metrics = _read_metrics(run)
    if parted := _compare(metrics, _read_metrics(again)):
        found.append(f"the last metrics differ: {parted}")
    files = [path.relative_to(run) for path in list_checkpoints(run) if path.is_relative_to(run)]
    for path in files:
        if not (again / path).is_file():
            found.append(f"{path} is only there")
        elif distance := _measure(run / path, again / path):
            found.append(f"the weights of {path.name} differ by up to {distance:.2g}")
    weights = f", weights of {', '.join(path.name for path in files)}" if files else ""
    num_points = sum(len(curves[name]) for name in common)
    return f"{len(common)} curves of {num_points:,} points, {len(metrics)} metrics{weights}", "; ".join(found)


def read_curves(folder: Path) -> Curves:
    """All curves below a folder that TensorBoard or a CSV logger has, by their file's folder and name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # here: its import is slow

    curves: Curves = {}
    for place in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(place), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            values = {event.step: event.value for event in events.Scalars(tag)}
            curves[f"{tag} ({place.relative_to(folder)})".removesuffix(" (.)")] = values
    for path in folder.rglob("metrics.csv"):
        for row in csv.DictReader(path.read_text().splitlines()):
            for name in [name for name in row if name != "step" and row[name]]:
                curves.setdefault(f"{name} ({path.relative_to(folder)})", {})[int(row["step"])] = float(row[name])
    return {name: values for name, values in curves.items() if not any(word in name for word in NOT_COMPARED)}


def _read_metrics(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {name: value for name, value in metrics["metrics"].items() if not any(word in name for word in NOT_COMPARED)}


def _compare(values: dict[str, float], others: dict[str, float]) -> str:
    """What differs, not-a-number from itself not; empty if nothing does."""
    said = []
    for name in sorted(values | others):
        one, other = values.get(name), others.get(name)
        by = f" (by {abs(one - other):.2g})" if one is not None and other is not None else ""
        if repr(one) != repr(other):
            said.append(f"{name} {one} there, {other} here{by}")
    return listed(said, MAX_SHOWN)


def _measure(one: Path, other: Path) -> float:
    """How far the weights of two checkpoints are apart: the largest difference, infinite for other shapes."""
    import torch  # here: a bad setting is answered without

    weights, others = (torch.load(path, "cpu", weights_only=True)["state_dict"] for path in (one, other))
    if weights.keys() != others.keys() or any(weights[name].shape != others[name].shape for name in weights):
        return float("inf")
    apart = [name for name in weights if not torch.equal(weights[name], others[name])]
    return max((float((weights[name].double() - others[name].double()).abs().max()) for name in apart), default=0.0)
