"""Train a run again and compare: ``python -m src.reproduce run=<a run's folder>``."""

from pathlib import Path

from omegaconf import DictConfig

from src.engine.errors import ReproductionError
from src.engine.runs import report
from src.engine.runs.command import run_function
from src.engine.runs.reproduce import compare_runs, find_run, train_again


def check_run(cfg: DictConfig) -> None:
    """Look for the run and its commit, before torch is imported and a folder is made."""
    find_run(cfg.run)


def reproduce(cfg: DictConfig) -> str:
    """Train a run again as its record says, into ``cfg.output_dir``/run, and show whether it came out the same.

    Returns:
        What was compared.

    Raises:
        ReproductionError: If the two are not equal to the bit; it says where they part.
    """
    run, again = find_run(cfg.run), Path(cfg.output_dir) / "run"
    train_again(run, again)
    counts, differences = compare_runs(run, again)
    if differences:
        raise ReproductionError(f"{report.shown(run)} and {report.shown(again)}: {differences}; compared: {counts}")
    paths = {"run": report.shown(run), "trained again": report.shown(again)}
    report.print_table("reproduced", paths | {"equal to the bit": counts})
    return counts


if __name__ == "__main__":
    run_function(reproduce, "reproduce", check=check_run)
