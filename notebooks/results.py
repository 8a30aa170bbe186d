"""The results of README.md: ``python -m notebooks.results [sweep folder ...]`` adds to results.json, prints tables.

A sweep is called by its folder's name, as in ``hydra.sweep.dir=logs/multirun/best``.
"""

import argparse
import csv
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESULTS = Path(__file__).with_name("results.json")
CURVES = ("train/acc", "val/acc")
NO_SETTING = ("rank", "job", "status", "seconds", "checkpoint", "error")

# What results.json has of each sweep: data, versions, git commit, and its runs, each with its swept values, its test
# accuracy, its seconds and its curves, an entry an epoch.
Sweep = dict[str, Any]


def read_sweep(folder: Path) -> Sweep:
    """Summarise a sweep of which each job is tested.

    Raises:
        ValueError: If there is no such sweep, or a job of it has no test.
    """
    if not (folder / "sweep.csv").is_file():
        raise ValueError(f"{folder}: no sweep.csv there")
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    untested = [row["job"] for row in rows if not row.get("test/acc")]
    if untested:
        raise ValueError(f"{folder / untested[0]}: not tested; run the sweep with test=all")
    records = [json.loads((folder / row["job"] / "metrics.json").read_text()) for row in rows]
    runs = [_read_run(folder / row["job"], row, record) for row, record in zip(rows, records, strict=True)]
    runs.sort(key=lambda run: str(run["values"]))
    first = records[0]
    return {key: first[key] for key in ("data", "versions", "git_commit")} | {"runs": runs}


def _read_run(folder: Path, row: dict[str, str], record: dict[str, Any]) -> dict[str, Any]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        "values": {key: _parse(value) for key, value in row.items() if "/" not in key and key not in NO_SETTING},
        "test/acc": float(row["test/acc"]),
        "seconds": round(record["seconds"]),
        **{name: [round(point.value, 5) for point in events.Scalars(name)] for name in CURVES},
    }


def _parse(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def select(sweep: Sweep, **values: Any) -> list[dict[str, Any]]:
    """A sweep's runs that have these swept values; dots of the keys are written as two underscores."""
    wanted = {key.replace("__", "."): value for key, value in values.items()}
    return [run for run in sweep["runs"] if wanted.items() <= run["values"].items()]


def percent(runs: Sequence[dict[str, Any]]) -> str:
    """Mean and sample standard deviation of the runs' test accuracies."""
    accuracies = [100 * run["test/acc"] for run in runs]
    return f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} %"


def make_recipes_table(results: dict[str, Sweep]) -> list[str]:
    """A row an experiment, in Markdown."""
    lines = ["| recipe | epochs | n | test accuracy | test error |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, sweep in results.items():
        if name in ("ablation", "paper1998_train_size"):
            continue
        runs = sweep["runs"]
        error = 100 - 100 * statistics.mean(run["test/acc"] for run in runs)
        lines.append(f"| `{name}` | {len(runs[0]['val/acc'])} | {len(runs)} | {percent(runs)} | {error:.2f} % |")
    return lines


def make_ablation_table(results: dict[str, Sweep]) -> list[str]:
    """Rows of activation and pooling, columns of augmentation and weight averaging, in Markdown; empty without them."""
    if "ablation" not in results:
        return []
    augments, decays = ("none", "elastic"), (0, 0.995)
    heads = [f"{augment}{', averaged' if decay else ''}" for augment in augments for decay in decays]
    lines = [f"| activation | pooling | {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * len(heads)}"]
    for activation in ("tanh", "relu"):
        for pooling in ("avg", "max"):
            cells = [
                percent(
                    select(
                        results["ablation"],
                        model__net__activation=activation,
                        model__net__pooling=pooling,
                        data__augment=augment,
                        callbacks__weight_averaging__decay=decay,
                    )
                )
                for augment in augments
                for decay in decays
            ]
            lines.append(f"| {activation} | {pooling} | {' | '.join(cells)} |")
    return lines


def read_results() -> dict[str, Sweep]:
    """What results.json holds, by the sweeps' names."""
    results: dict[str, Sweep] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return results


def write_results(results: dict[str, Sweep]) -> None:
    """Write results.json, a line a run."""
    lines = []
    for name, sweep in sorted(results.items()):
        head = json.dumps({key: value for key, value in sweep.items() if key != "runs"})
        runs = ",\n".join(f"    {json.dumps(run)}" for run in sweep["runs"])
        lines.append(f'  {json.dumps(name)}: {head[:-1]}, "runs": [\n{runs}\n  ]}}')
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(arguments: Iterable[str] | None = None) -> None:
    """Add sweeps to results.json, each in the place of an older one of its name, and print the README's tables."""
    parser = argparse.ArgumentParser(prog="python -m notebooks.results", description=main.__doc__)
    parser.add_argument("sweeps", nargs="*", type=Path, help="folders of sweeps that ran with test=all")
    folders = parser.parse_args(None if arguments is None else list(arguments)).sweeps
    results = read_results()
    try:
        results |= {folder.resolve().name: read_sweep(folder) for folder in folders}
    except ValueError as error:
        parser.error(str(error))
    if folders:
        write_results(results)
    print("\n".join(make_recipes_table(results)))
    print("\n".join(["", *make_ablation_table(results)]))


if __name__ == "__main__":
    main()
