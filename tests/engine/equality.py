"""Whether two runs are the same, to the bit."""

import csv
import json
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.engine.runs.build import load_checkpoint


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All curves but the one of a clock."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = {tag for tag in events.Tags()["scalars"] if "per_second" not in tag}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def table(folder: Path) -> list[dict[str, str]]:
    """The lines of the CSV logger; none without one."""
    if not (folder / "csv").exists():
        return []
    with (folder / "csv" / "metrics.csv").open() as file:
        return [{key: line[key] for key in line if "per_second" not in key} for line in csv.DictReader(file)]


def weights(checkpoint: Path) -> torch.Tensor:
    """All weights of a checkpoint in a row, (N,)."""
    return torch.cat([tensor.flatten() for tensor in load_checkpoint(checkpoint)["state_dict"].values()])


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    """Equal to the bit, all the way down."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_equal(mine, theirs, f"{path}[{index}]")
    else:
        assert one == other, path


def content(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, but for the names of folders and for what clocks say."""
    checkpoint = load_checkpoint(path)
    for name in ("config", "hyper_parameters"):
        checkpoint.pop(name, None)
    checkpoint["metrics"] = {
        name: checkpoint["metrics"][name] for name in checkpoint["metrics"] if "per_second" not in name
    }
    checkpoint["callbacks"].pop("Speed", None)
    for state in checkpoint["callbacks"].values():
        for key in [key for key in state if "path" in key or key in ("dirpath", "best_k_models", "current_score")]:
            del state[key]  # the last is what Lightning shows of the last save, and does not restore
    # Lightning keeps books of validation and of an epoch's beginning that nothing depends on.
    loops = checkpoint.pop("loops")["fit_loop"]
    checkpoint["progress"] = {
        "epochs": loops["epoch_progress"]["total"]["completed"],
        "batches": loops["epoch_loop.batch_progress"]["total"]["completed"],
        "logged": loops["epoch_loop.state_dict"]["_batches_that_stepped"],
    }
    return checkpoint


def assert_same_run(whole: Path, other: Path) -> None:
    """Weights, optimizer, schedule, averages, random states, metrics and curves are the uninterrupted run's."""
    assert_equal(content(whole / "checkpoints" / "last.ckpt"), content(other / "checkpoints" / "last.ckpt"))
    assert_equal(
        load_checkpoint(whole / "checkpoints" / "best.ckpt")["state_dict"],
        load_checkpoint(other / "checkpoints" / "best.ckpt")["state_dict"],
    )
    records = [json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (whole, other)]
    assert records[0].keys() == records[1].keys()
    assert {k: v for k, v in records[0].items() if "per_second" not in k} == {
        k: v for k, v in records[1].items() if "per_second" not in k
    }
    assert scalars(whole) == scalars(other)
    assert table(whole) == table(other)
