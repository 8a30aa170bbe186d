"""Predicts what is in files, or what a data module's loaders yield, a row a sample."""

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.progress import track
from torch import Tensor

from src.engine.errors import ConfigError
from src.engine.runs import report
from src.engine.runs.build import preprocess
from src.engine.runs.inputs import AS_IN
from src.engine.runs.predictions import CLASS_COLUMNS, Row

log = logging.getLogger(__name__)

SURE = 0.9  # the probability from which an answer is to be trusted; label smoothing keeps right ones below 0.96
Reader = Callable[..., Any]  # from a file to its images, (N, ...)
Rows = list[Row]
Take = Callable[[Rows], None]  # gets the rows of a batch, as the extend of a list does


def predict_files(
    module: Any, datamodule: Any, files: Iterable[Path], batch_size: int,
    accelerator: Mapping[str, Any], take: Take, split: bool = False,
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
    told: deque[list[tuple[str, str]]] = deque()  # of each batch that is read, and not yet predicted
    failed: list[str] = []
    images = read_files(files, find_reader(datamodule, split), failed)

    def make_batches() -> Iterator[Tensor]:
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


def read_files(files: Iterable[Path], read: Reader, failed: list[str]) -> Iterator[tuple[str, Tensor, str]]:
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


def read_with_doubt(read: Reader, file: Path) -> tuple[Tensor, str]:
    """A file's images, (N, ...), and what the reader has warned of."""
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always", UserWarning)
        images = torch.as_tensor(read(file))
    told = dict.fromkeys(str(each.message) for each in doubts if issubclass(each.category, UserWarning))
    return images, ", ".join(told)


def predict_batches(
    module: Any, datamodule: Any, accelerator: Mapping[str, Any], take: Take, batches: Iterator[Any] | None = None
) -> None:
    """Predict batches, or those of ``predict_dataloader`` or ``test_dataloader``; ``take`` gets the rows of each.

    Raises:
        ConfigError: If there are several devices, or neither batches nor such a loader.
    """
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
    if isinstance(prediction, Tensor) and prediction.shape[1:] == (num_classes,):
        best = prediction.float().softmax(dim=1).topk(min(2, prediction.shape[1]), dim=1)
        pairs = (zip(*pair, strict=True) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True))
        cells = ([cell for label, value in pair for cell in (classes[label], value)] for pair in pairs)
        rows = (dict(zip_longest(CLASS_COLUMNS, row)) for row in cells)
        return [row | {"sure": "yes" if row["probability"] >= SURE else f"below {SURE}"} for row in rows]
    plain = apply_to_collection(prediction, (Tensor, np.ndarray), lambda values: values.tolist())
    if isinstance(plain, list) and all(isinstance(sample, Mapping) for sample in plain):
        return [dict(sample) for sample in plain]
    if isinstance(plain, tuple):
        plain = {f"prediction_{index}": values for index, values in enumerate(plain)}
    columns = plain if isinstance(plain, Mapping) else {"prediction": plain}
    counts = {len(values) if isinstance(values, list) else None for values in columns.values()}
    if len(counts) != 1 or None in counts:
        return [dict(columns)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _choose(function: Callable[..., Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that a function takes by name."""
    parameters = signature(function).parameters
    takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: part for name, part in batch.items() if takes_all or name in parameters}


def complete_prediction(module: Any, source: Any) -> None:
    """Have a module that was restored predict with what it has.

    Without a ``predict_step``, its ``forward`` gets a batch, or, if it does not take that whole, a dict's entries by
    their names, or else the first of several parts. Without a ``predict_dataloader``, it predicts the test split.

    Args:
        module: The module.
        source: Its data module, or itself if its loaders are its own.
    """

    def predict_step(batch: Any, *_: Any) -> Any:
        try:
            try:
                return module(batch)
            except (TypeError, AttributeError):  # a net that gets a list where it expects a tensor
                if isinstance(batch, Mapping) and (named := _choose(module.forward, batch)):
                    return module(**named)
                if not isinstance(batch, list | tuple):
                    raise
            return module(batch[0])
        # What torch and Python raise of a forward that is missing, or written for other arguments; a fault in its own
        # code may be of these kinds, too, so the message names the error.
        except (TypeError, AttributeError, NotImplementedError) as error:
            raise ConfigError(
                f"{type(module).__name__} has no predict_step, and its forward takes no batch "
                f"({type(error).__name__}: {error}; HYDRA_FULL_ERROR=1 shows where): give it a "
                "predict_step(batch, batch_idx)"
            ) from error

    def predict_dataloader() -> Any:
        if not has_loader:
            source.setup("test")
        # No DataLoaders: Lightning makes them anew, and fails where batch_size was given by its position.
        return [chain(loader) for loader in CombinedLoader(make_loaders()).flattened]

    has_loader = is_overridden("predict_dataloader", source)
    make_loaders = source.predict_dataloader if has_loader else source.test_dataloader
    if not is_overridden("predict_step", module):
        module.predict_step = predict_step
    if has_loader or is_overridden("test_dataloader", source):
        source.predict_dataloader = predict_dataloader
