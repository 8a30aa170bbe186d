"""Predict: ``python -m src.predict [inputs='digits/*.png'] [ckpt_path=...] [output=...]``."""

import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from src.engine.errors import ConfigError, SkippedError
from src.engine.runs import report
from src.engine.runs.checkpoints import newest_checkpoint
from src.engine.runs.command import run_function
from src.engine.runs.inputs import Inputs, describe
from src.engine.runs.predictions import CLASS_COLUMNS, SUFFIXES, Predictions, Row
from src.engine.settings.check import require

log = logging.getLogger(__name__)

MAX_CHARACTERS = 40  # of a cell of the table that is no file
NARROW = 100  # columns of a terminal, below which the table has no runners-up


def predict(cfg: DictConfig) -> None:
    """Predict as ``conf/predict.yaml`` says, and write and show the predictions.

    Raises:
        SkippedError: At the end, if files could not be read.
    """
    from src.engine.runs.build import restore, restore_datamodule  # torch: a bad setting is answered without
    from src.engine.runs.predict import predict_batches, predict_files

    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    path = Path(cfg.ckpt_path or newest_checkpoint(Path(cfg.root_dir) / "logs"))
    # The run's folder of data need not be there, nor be trusted, where nothing is read from it.
    unread = None if cfg.inputs is None else f"{cfg.root_dir}/data"
    datamodule = restore_datamodule(path, unread, **settings.get("data", {}))
    module = restore(path, datamodule)
    failed: list[str] = []
    with Predictions(Path(cfg.output or Path(cfg.output_dir) / "predictions.csv")) as predictions:
        if cfg.inputs is None:
            predict_batches(module, datamodule, settings["accelerator"], predictions.extend)
        else:
            files = Inputs(settings["inputs"])
            if files.others:
                log.warning(f"left out: {describe(files.others)}")
            accelerator, take = settings["accelerator"], predictions.extend
            failed = predict_files(module, datamodule, files, cfg.batch_size, accelerator, take, cfg.split)
    OmegaConf.save(cfg, Path(cfg.output_dir) / "config.yaml", resolve=True)
    if count := predictions.count:
        print_rows(predictions.first, count)
        facts = {"checkpoint": report.shown(path), "rows": f"{count:,}", "written to": report.shown(predictions.path)}
        unsure = {"not sure": f"{predictions.num_unsure:,}, see there why"} if predictions.num_unsure else {}
        report.print_table("predicted", facts | unsure)
    if failed:
        raise SkippedError(
            f"{len(failed):,} of {len(files):,} files could not be read and were skipped: {report.listed(failed, 5)}"
        )


def check_inputs(cfg: DictConfig) -> None:
    """Look for the files, and for what writes the output, before torch is imported and the run's folder is made."""
    suffix = Path(cfg.output or "_.csv").suffix
    if suffix not in SUFFIXES:
        raise ConfigError(f"output={cfg.output}: expected a file that ends in .csv, .json or .parquet")
    if cfg.output and Path(cfg.output).exists() and not cfg.overwrite:
        raise ConfigError(f"output={cfg.output}: is there already; overwrite=true replaces it")
    if suffix == ".parquet":
        require(f"output={cfg.output}", "pyarrow", extra="export")
    if cfg.inputs is not None:
        Inputs(cfg.inputs)


def print_rows(rows: Sequence[Row], count: int) -> None:
    """A table of the first of ``count`` rows: a file's name in full, the start of anything else that is long."""
    console, table = report.make_console(), Table()
    columns = list(dict.fromkeys(chain.from_iterable(rows)))
    if console.width < NARROW:  # what is left out is in the file
        columns = [name for name in columns if name not in CLASS_COLUMNS[2:]]
    short: Any = {"justify": "right", "no_wrap": True, "max_width": MAX_CHARACTERS}
    for name in columns:
        table.add_column(report.cell(name), overflow="fold", **({} if name in ("file", "sure") else short))
    for row in rows:
        values = ("-" if row.get(name) is None else row[name] for name in columns)
        cells = (f"{value:.4f}" if isinstance(value, float) else str(value) for value in values)
        table.add_row(*map(report.cell, cells))
    console.print(table)
    if count > len(rows):
        console.print(f"... and {count - len(rows):,} more")


if __name__ == "__main__":
    run_function(predict, "predict", check=check_inputs, positional="inputs")
