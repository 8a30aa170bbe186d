"""From a config to objects, and from a checkpoint to a module."""

import csv
import pickle
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import DeviceStatsMonitor, LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger

from src.classifier import ImageClassifier
from src.engine.errors import CheckpointError
from src.engine.runs.checkpoints import check_checkpoint
from src.engine.settings.trust import instantiate


def build_datamodule(cfg: DictConfig) -> pl.LightningDataModule:
    """The data module of ``cfg.data``."""
    datamodule: pl.LightningDataModule = instantiate(cfg.data)
    return datamodule


def build_module(cfg: DictConfig) -> ImageClassifier:
    """The task of ``cfg.model`` with its optimizer and scheduler, ready to train.

    The whole config, resolved to plain values, becomes the module's hyper-parameters: Lightning puts them into each
    checkpoint, from which ``restore`` builds the module again.
    """
    module: ImageClassifier = instantiate(
        cfg.model, optimizer=instantiate(cfg.optimizer), scheduler=_plain(instantiate(cfg.get("scheduler")))
    )
    module.save_hyperparameters(OmegaConf.to_container(cfg, resolve=True))
    return module


def _plain(node: Any) -> dict[str, Any] | None:
    """The scheduler's DictConfig around a live factory, as a dict."""
    return dict(node) if node else None


def build_trainer(cfg: DictConfig, first_step: int | None = None, **overrides: Any) -> pl.Trainer:
    """The trainer of ``cfg.trainer`` with the nodes of ``cfg.callbacks`` and ``cfg.logger``.

    Args:
        cfg: A command's config.
        first_step: Where a run goes on: what its curves in ``cfg.output_dir`` have from this step on is dropped.
        overrides: Arguments of the Trainer that go before the config's.
    """
    loggers = [_build_logger(node, first_step) for node in (cfg.get("logger") or {}).values() if node is not None]
    callbacks = _build_named(cfg.get("callbacks"))
    if not loggers:  # these refuse to run without; so that logger=[] works alone
        alone = (LearningRateMonitor, DeviceStatsMonitor)
        callbacks = [callback for callback in callbacks if not isinstance(callback, alone)]
    trainer: pl.Trainer = instantiate(cfg.trainer)(
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=cfg.output_dir,
        **overrides,
    )
    return trainer


def _build_named(nodes: DictConfig | None) -> list[Any]:
    return [instantiate(node) for node in nodes.values() if node is not None] if nodes else []


def _build_logger(node: DictConfig, first_step: int | None) -> Any:
    if first_step is None:
        return instantiate(node)
    if node._target_.endswith(".TensorBoardLogger"):
        return instantiate(node, purge_step=first_step)
    logger = instantiate(node)
    if isinstance(logger, CSVLogger):  # it would delete what is there
        path = Path(logger.log_dir) / "metrics.csv"
        lines = list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []
        path.unlink(missing_ok=True)
        for line in lines:
            if int(line["step"]) < first_step:
                logger.experiment.metrics.append({key: value for key, value in line.items() if value != ""})
    return logger


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; nothing in it is ever unpickled but tensors and plain values.

    Raises:
        CheckpointError: If the file is missing, damaged, or holds anything else.
    """
    check_checkpoint(path)
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"ckpt_path={path}: no checkpoint that can be read ({reason}); choose another file"
        ) from error
    missing = {"state_dict", "hyper_parameters"} - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise CheckpointError(
            f"ckpt_path={path}: not a checkpoint of this template: it lacks {' and '.join(sorted(missing))}"
        )
    return checkpoint


def restore(path: str | Path) -> ImageClassifier:
    """Build the module that a checkpoint holds, weights and all, from the file alone.

    Args:
        path: A ``best.ckpt`` or ``last.ckpt``.

    Returns:
        The module in evaluation mode, on the CPU.

    Raises:
        CheckpointError: If the file is missing, damaged, or its weights do not fit the model that it describes.
    """
    checkpoint = load_checkpoint(path)
    cfg = OmegaConf.create(checkpoint["hyper_parameters"])
    module: ImageClassifier = instantiate(cfg.model)
    module.save_hyperparameters(checkpoint["hyper_parameters"])
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise CheckpointError(
            f"ckpt_path={path}: its weights do not fit its model: {' '.join(str(error).split())}"
        ) from error
    return module.eval()


def restore_datamodule(path: str | Path, **overrides: Any) -> pl.LightningDataModule:
    """Build the data module that a checkpoint's run used, with the same split.

    A run on the package's digits is given those again, any other the files: neither is ever tested on images that it
    was trained on.

    Args:
        path: A checkpoint.
        overrides: Arguments of the data module that go before the run's; None keeps the run's.
    """
    checkpoint = load_checkpoint(path)
    cfg = OmegaConf.create(checkpoint["hyper_parameters"])
    cfg.data.update({key: value for key, value in overrides.items() if value is not None})
    state = next((state for state in checkpoint.values() if isinstance(state, dict) and "source" in state), {})
    if cfg.data.get("source") == "auto":
        cfg.data.source = "package" if state.get("source") == "package" else "download"
    return build_datamodule(cfg)


def preprocess(inputs: torch.Tensor, datamodule: pl.LightningDataModule | None) -> torch.Tensor:
    """What a module's ``forward`` is given for inputs as its data module's loaders yield them.

    Args:
        inputs: A batch's first part, (B, ...).
        datamodule: Its ``on_after_batch_transfer`` is applied to a batch of the inputs and labels of zero, int64 (B,).
    """
    if datamodule is None:
        return inputs
    labels = torch.zeros(inputs.shape[0], dtype=torch.int64, device=inputs.device)
    processed: torch.Tensor = datamodule.on_after_batch_transfer((inputs, labels), 0)[0]
    return processed
