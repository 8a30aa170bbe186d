"""Predict: ``python -m src.predict [inputs='digits/*.png'] [ckpt_path=...] [output=...]``."""

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from src.engine.errors import ConfigError, SkippedError
from src.engine.runs import report
from src.engine.runs.checkpoints import newest_checkpoint
from src.engine.runs.command import run_function
from src.engine.runs.inputs import AS_IN, Inputs, describe
from src.engine.runs.predictions import SUFFIXES, Predictions, Row
from src.engine.settings.check import require

if TYPE_CHECKING:  # functions import torch and Lightning: a bad setting is answered without them
    from torch import Tensor

log = logging.getLogger(__name__)

MAX_CHARACTERS = 40  # of a cell of the table that is no file
NARROW = 100  # columns of a terminal, below which the table has no runners-up
SURE = 0.9  # the probability from which an answer is to be trusted; label smoothing keeps right ones below 0.96
Settings = Mapping[str, Any]
Reader = Callable[..., Any]  # from a file to its images, (N, ...)
Rows = list[Row]
Take = Callable[[Rows], None]  # gets the rows of a batch, as the extend of a list does
CLASS_COLUMNS = ("class", "probability", "runner_up", "runner_up_probability")


def predict(cfg: DictConfig) -> None:
    """Predict as ``conf/predict.yaml`` says, and write and show the predictions.

    Raises:
        SkippedError: At the end, if files could not be read.
    """
    from src.engine.runs.build import restore, restore_datamodule

    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    path = Path(cfg.ckpt_path or newest_checkpoint(Path(cfg.root_dir) / "logs"))
    # The run's folder of data need not be there, nor be trusted, where nothing is read from it.
    unread = None if cfg.inputs is None else f"{cfg.root_dir}/data"
    module, datamodule = restore(path), restore_datamodule(path, unread, **settings.get("data", {}))
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


def predict_files(
    module: Any, datamodule: Any, files: Iterable[Path], batch_size: int,
    accelerator: Settings, take: Take, split: bool = False,
) -> list[str]:  # fmt: skip
    """Predict what is in files; those that cannot be read are logged and skipped.

    Args:
        module: A checkpoint's.
        datamodule: Its data's; ``read_images(path)`` reads a file.
        files: Image or IDX files.
        batch_size: Images that the module gets at a time, 1 or more.
        accelerator: ``accelerator``, ``devices`` (one) and ``precision``, as the Trainer takes them.
        take: Gets a row for each image, in order, as ``make_rows`` returns them, with what ``read_images`` has warned
            of as ``sure``. A row's ``file`` ends with the image's number, from 0, if the file holds several:
            ``t10k-images-idx3-ubyte#17``.
        split: Whether several digits in a picture become a row each, from left to right.

    Returns:
        The files that could not be read.
    """
    import torch

    from src.engine.runs.build import preprocess

    told: deque[list[tuple[str, str]]] = deque()  # of each batch that is read, and not yet predicted
    failed: list[str] = []
    images = read_files(files, find_reader(datamodule, split), failed)

    def make_batches() -> Iterator["Tensor"]:
        while chunk := list(islice(images, batch_size)):
            told.append([(name, doubt) for name, _, doubt in chunk])
            yield preprocess(torch.stack([image for _, image, _ in chunk]), datamodule)

    def name_rows(rows: Rows) -> None:
        names = told.popleft()
        if len(rows) != len(names):
            raise ConfigError(f"predict_step: {len(rows)} predictions for {len(names)} images; expected one each")
        pairs = zip(names, rows, strict=True)
        take([{"file": name, **row, **({"sure": doubt} if doubt else {})} for (name, doubt), row in pairs])

    predict_batches(module, datamodule, accelerator, name_rows, make_batches())
    return failed


def find_reader(datamodule: Any, split: bool = False) -> Reader:
    """The data module's ``read_images(path)``, or ``read_images(path, split=True)``: a file's images, (N, ...).

    Raises:
        ConfigError: If it has none.
    """
    reader: Reader | None = getattr(datamodule, "read_images", None)
    if reader is None or (split and "split" not in signature(reader).parameters):
        raise ConfigError(
            f"{type(datamodule).__name__}, the checkpoint's data module, does not say how to read a file; give it a "
            f"method read_images(path{', split' * split}), which returns images as its loaders yield them, (N, ...)"
        )
    return partial(reader, split=True) if split else reader


def read_files(files: Iterable[Path], read: Reader, failed: list[str]) -> Iterator[tuple[str, "Tensor", str]]:
    """Each image with its name and what is doubtful; files that cannot be read are logged and added to ``failed``."""
    console = Console(stderr=True)
    for file in track(files, "reading", console=console, transient=True, disable=not console.is_terminal):
        try:
            images, doubt = read_with_doubt(read, file)
        except Exception as error:  # whatever a decoder raises
            log.debug("stack trace:", exc_info=error)
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
            failed.append(report.shown(file))
            log.warning(f"{failed[-1]}: skipped: {reason}")
            continue
        for index, image in enumerate(images):
            yield f"{file}#{index}" if len(images) > 1 else str(file), image, doubt


def read_with_doubt(read: Reader, file: Path) -> tuple["Tensor", str]:
    """A file's images, (N, ...), and what the reader has warned of."""
    import torch

    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always", UserWarning)
        images = torch.as_tensor(read(file))
    told = dict.fromkeys(str(each.message) for each in doubts if issubclass(each.category, UserWarning))
    return images, ", ".join(told)


def predict_batches(
    module: Any, datamodule: Any, accelerator: Settings, take: Take, batches: Iterator[Any] | None = None
) -> None:
    """Predict batches, or those of ``predict_dataloader`` or ``test_dataloader``; ``take`` gets the rows of each.

    Raises:
        ConfigError: If there are several devices, or neither batches nor such a loader.
    """
    import pytorch_lightning as pl
    from pytorch_lightning.utilities.model_helpers import is_overridden

    from src.engine.runs.evaluate import complete_prediction

    source = datamodule or module  # without a data module the loaders are the module's
    if batches is None:
        complete_prediction(module, source)
    if batches is None and not is_overridden("predict_dataloader", source):
        raise ConfigError(
            f"inputs=null: {type(source).__name__} has no predict_dataloader and no test_dataloader; {AS_IN}"
        )
    is_own = type(module).predict_step is not pl.LightningModule.predict_step
    num_classes = None if is_own else getattr(module, "num_classes", None)

    def take_batch(trainer: Any, module: Any, prediction: Any, *_: Any) -> None:
        classes = getattr(datamodule, "classes", None) or range(num_classes or 0)
        take(make_rows(prediction, num_classes, classes))

    trainer = pl.Trainer(
        **accelerator, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=pl.callbacks.LambdaCallback(on_predict_batch_end=take_batch),
    )  # fmt: skip
    if trainer.world_size > 1:
        raise ConfigError(f"accelerator.devices={accelerator['devices']}: expected 1, or a list of one, as in [0]")
    # Lightning would keep all predictions until the end.
    trainer.predict(module, batches, datamodule if batches is None else None, return_predictions=False)


def make_rows(prediction: Any, num_classes: int | None = None, classes: Sequence[Any] = ()) -> Rows:
    """A row for each sample of a batch.

    Args:
        prediction: What ``predict_step``, or ``forward`` in its place, has returned for a batch.
        num_classes: The module's attribute, if it has one and no ``predict_step`` of its own: predictions of shape
            (B, num_classes) are then logits, and rows have CLASS_COLUMNS (None for lack of classes) and ``sure``.
        classes: Their names: the data module's attribute, or numbers.

    Returns:
        Otherwise a dict's entries are columns, so are a tuple's, and anything else is the column ``prediction``. Of
        (B, ...) a row has a number or nested lists. What has no entry for each sample makes one row a batch.
    """
    import numpy as np
    import torch
    from lightning_utilities.core.apply_func import apply_to_collection

    if isinstance(prediction, torch.Tensor) and prediction.shape[1:] == (num_classes,):
        best = prediction.float().softmax(dim=1).topk(min(2, prediction.shape[1]), dim=1)
        pairs = (zip(*pair, strict=True) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True))
        cells = ([cell for label, value in pair for cell in (classes[label], value)] for pair in pairs)
        rows = (dict(zip_longest(CLASS_COLUMNS, row)) for row in cells)
        return [row | {"sure": "yes" if row["probability"] >= SURE else f"below {SURE}"} for row in rows]
    plain = apply_to_collection(prediction, (torch.Tensor, np.ndarray), lambda values: values.tolist())
    if isinstance(plain, list) and all(isinstance(sample, Mapping) for sample in plain):
        return [dict(sample) for sample in plain]
    if isinstance(plain, tuple):
        plain = {f"prediction_{index}": values for index, values in enumerate(plain)}
    columns = plain if isinstance(plain, Mapping) else {"prediction": plain}
    counts = {len(values) if isinstance(values, list) else None for values in columns.values()}
    if len(counts) != 1 or None in counts:
        return [dict(columns)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def print_rows(rows: Rows, count: int) -> None:
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
