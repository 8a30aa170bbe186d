"""Classify image files: ``python -m src.predict inputs='digits/*.png' [ckpt_path=...] [output=...]``."""

import csv
import glob
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from src.engine.errors import ConfigError
from src.engine.runs.checkpoints import newest_checkpoint
from src.engine.runs.command import run, short_errors

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule
    from torch import Tensor

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".pbm", ".pgm", ".ppm")
IDX = "idx3-ubyte"  # in an IDX file's name
MAX_ROWS = 50  # of the table
MAX_NAMED = 5  # files that could not be read, at the end
COLUMNS = ("file", "digit", "probability", "runner_up", "runner_up_probability")


def predict_files(
    path: Path, files: Sequence[Path], batch_size: int, accelerator: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Classify what is in image files; those that cannot be read are logged and skipped.

    Args:
        path: A checkpoint.
        files: Image or IDX files.
        batch_size: Images that go through the net at a time, 1 or more.
        accelerator: ``accelerator``, ``devices`` (one) and ``precision``, as the Trainer takes them.

    Returns:
        A row of COLUMNS for each image, in order, and the files that could not be read. ``file`` has the number of an
        image behind it, from 0, where the file holds several: ``t10k-images-idx3-ubyte#17``. The runner-up of a net
        of one class is None.
    """
    import torch
    from lightning_fabric import Fabric

    from src.engine.runs import build

    fabric = Fabric(**accelerator)
    if fabric.world_size > 1:
        raise ConfigError(f"accelerator.devices={accelerator['devices']}: expected 1, or a list of one, as in [0]")
    datamodule = build.restore_datamodule(path)
    read = find_reader(datamodule)
    net = fabric.setup_module(build.restore(path).net)
    failed: list[Path] = []
    rows = []
    for names, images in _make_batches(_read(files, read, failed), batch_size):
        # The data module's own preprocessing; it expects labels, too.
        batch = fabric.to_device((images, torch.zeros(len(images), dtype=torch.int64)))
        inputs, _ = datamodule.on_after_batch_transfer(batch, 0)
        with torch.inference_mode():
            probabilities = net(inputs).float().softmax(dim=1)  # (B, num_classes)
        best = probabilities.topk(min(2, probabilities.shape[1]), dim=1)
        for name, labels, values in zip(names, best.indices.tolist(), best.values.tolist(), strict=True):
            cells = [cell for pair in zip(labels, values, strict=True) for cell in pair]
            rows.append(dict(zip(COLUMNS, [name, *cells, None, None], strict=False)))
    return rows, failed


def find_inputs(inputs: str | Sequence[str]) -> list[Path]:
    """The files that are meant, in order, each once.

    Args:
        inputs: Files, folders (their image and IDX files at any depth) and patterns (``*``, ``?``, ``**``).

    Raises:
        ConfigError: If one of them leads to no file.
    """
    found: dict[Path, None] = {}
    for name in [inputs] if isinstance(inputs, str) else inputs:
        path = Path(name).expanduser()
        places = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
        files = [file for place in places for file in (_list_folder(place) if place.is_dir() else [place])]
        if not files:
            reason = "no image or IDX file in there" if places else "no such file, folder or pattern that fits one"
            raise ConfigError(f"inputs={name}: {reason}; write as in inputs='digits/*.png'")
        found.update(dict.fromkeys(files))
    return list(found)


def _list_folder(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if (path.suffix.lower() in SUFFIXES or IDX in path.name) and not path.name.startswith(".") and path.is_file()
    )


def find_reader(datamodule: "LightningDataModule") -> Callable[[Path], Any]:
    """What reads an image file as the data module's loaders would yield it, (N, ...).

    Raises:
        ConfigError: If it is no MNIST and has no method ``read_images`` that does so.
    """
    from src.data.images import read_digits, read_like
    from src.data.mnist import MNISTDataModule

    if own := getattr(datamodule, "read_images", None):
        reader: Callable[[Path], Any] = own
        return reader
    if isinstance(datamodule, MNISTDataModule):  # what other data sets' pictures went through is not known
        return read_digits if datamodule.name == "MNIST" else read_like
    raise ConfigError(
        f"inputs: {type(datamodule).__name__}, the checkpoint's data, does not say how to read a file; give it a "
        "method read_images(path), which returns images as its loaders yield them, (N, ...)"
    )


def _read(files: Sequence[Path], read: Callable[[Path], Any], failed: list[Path]) -> Iterator[tuple[str, "Tensor"]]:
    """Each image with its name, in order; files that cannot be read are logged and added to ``failed``."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from src.engine.runs.report import shown

    console = Console(stderr=True)
    for file in track(files, "reading", console=console, transient=True, disable=not console.is_terminal):
        try:
            images = torch.as_tensor(read(file))
        except Exception as error:  # whatever a decoder raises
            log.debug("stack trace:", exc_info=error)
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
            log.warning(f"{shown(file)}: skipped: {reason}")
            failed.append(file)
            continue
        for index, image in enumerate(images):
            yield f"{file}#{index}" if len(images) > 1 else str(file), image


def _make_batches(images: Iterable[tuple[str, "Tensor"]], batch_size: int) -> Iterator[tuple[Sequence[str], "Tensor"]]:
    import torch

    remaining = iter(images)
    while chunk := list(islice(remaining, batch_size)):
        names, parts = zip(*chunk, strict=True)
        yield names, torch.stack(parts)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, JSON (a list of objects) or Parquet, as the path's suffix says; whole or not at all."""
    from src.engine.runs import report

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        report.write_bytes(path, sink.getvalue().to_pybytes())
    elif path.suffix == ".json":
        report.write_text(path, json.dumps(rows, indent=2) + "\n")
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        report.write_text(path, text.getvalue())


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of the first MAX_ROWS rows; brackets in a file's name are no markup."""
    from rich.table import Table
    from rich.text import Text

    from src.engine.runs.report import make_console

    table = Table()
    table.add_column("file", overflow="fold")
    for name in ("digit", "probability", "runner-up", ""):
        table.add_column(name, justify="right")
    for row in rows[:MAX_ROWS]:
        cells = [row[column] for column in COLUMNS[1:]]
        shown = ["-" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells]
        table.add_row(Text(row["file"]), *shown)
    console = make_console()
    console.print(table)
    if len(rows) > MAX_ROWS:
        console.print(f"... and {len(rows) - MAX_ROWS:,} more")


def predict(cfg: DictConfig) -> list[dict[str, Any]]:
    """Classify files as ``conf/predict.yaml`` says, show and write what came out.

    Returns:
        The rows of ``predict_files``.

    Raises:
        DataError: At the end, if files could not be read.
    """
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    files = find_inputs(settings["inputs"])
    path = Path(cfg.ckpt_path or newest_checkpoint(Path(cfg.root_dir) / "logs"))
    output_dir = Path(cfg.output_dir)
    output = Path(cfg.output or output_dir / "predictions.csv")

    from src.engine.errors import DataError
    from src.engine.runs import report

    rows, failed = predict_files(path, files, cfg.batch_size, settings["accelerator"])
    OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)
    if rows:
        write_rows(output, rows)
        print_rows(rows)
        said = {"checkpoint": report.shown(path), "images": f"{len(rows):,}", "written to": report.shown(output)}
        report.print_table("predicted", said)
    if failed:
        names = ", ".join(map(report.shown, failed[:MAX_NAMED])) + (", ..." if len(failed) > MAX_NAMED else "")
        raise DataError(f"{len(failed)} of {len(files)} files could not be read and were skipped: {names}")
    return rows


def check_inputs(cfg: DictConfig) -> None:
    """Look for the files before the run's folder is made."""
    find_inputs(cfg.inputs)


@hydra.main(version_base="1.3", config_path="../conf", config_name="predict")
def main(cfg: DictConfig) -> None:
    """Predict as the command line says."""
    with short_errors(cfg):
        predict(cfg)


if __name__ == "__main__":
    run(main, "predict", check=check_inputs)
