"""From a config to a Trainer, with what the engine adds to it; the curves of a run that resumes are cut to its step."""

import csv
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ProgressBar
from pytorch_lightning.loggers import CSVLogger

from src.engine.errors import ConfigError
from src.engine.runs.build import check_kind, load_checkpoint, naming
from src.engine.runs.checkpoint_io import AtomicCheckpointIO
from src.engine.runs.processes import get_name, prepare_trainer
from src.engine.runs.rehearsal import Rehearsal
from src.engine.runs.report import write_text
from src.engine.runs.resume import find_first_step
from src.engine.runs.session import Session
from src.engine.settings.arguments import build
from src.engine.settings.trust import plain_config


def build_trainer(cfg: DictConfig) -> pl.Trainer:
    """The trainer of ``cfg.trainer`` with the nodes of ``cfg.callbacks`` and ``cfg.logger``.

    Each of its checkpoints holds the config, resolved and plain, under the key ``config``. Where ``cfg.ckpt_path`` or
    ``cfg.resume`` resumes a run, what its curves in ``cfg.output_dir`` have of later steps is dropped.
    """
    if "spawn" in str(strategy := cfg.trainer.get("strategy")):
        raise ConfigError(
            f"trainer.strategy={strategy}: hands the run over pickled, which it cannot be; use trainer=ddp"
        )
    config = plain_config(cfg)
    checkpoint = load_checkpoint(cfg.ckpt_path) if cfg.get("ckpt_path") and cfg.get("train", True) else None
    with naming(cfg.get("ckpt_path")):
        first_step = find_first_step(cfg, config, checkpoint)
    loggers = [_build_logger(node, first_step) for node in (cfg.get("logger") or {}).values() if node is not None]
    # A flag that is off must be enough: Lightning refuses the callbacks that go with it.
    is_bare = cfg.trainer.get("barebones", False)
    off: list[type] = [] if loggers else [LearningRateMonitor, DeviceStatsMonitor]
    flags = {"enable_checkpointing": Checkpoint, "enable_progress_bar": ProgressBar}
    off += [kind for flag, kind in flags.items() if is_bare or cfg.trainer.get(flag) is False]
    nodes = {name: node for name, node in (cfg.get("callbacks") or {}).items() if node is not None}
    built = {name: build(node, **_tell_apart(node)) for name, node in nodes.items()}
    for name, callback in built.items():
        check_kind(f"callbacks.{name}", nodes[name], callback, pl.Callback)
    callbacks = [callback for callback in built.values() if not isinstance(callback, tuple(off))]
    extra: dict[str, Any] = {}
    if not any(isinstance(callback, Checkpoint) for callback in callbacks):
        extra["enable_checkpointing"] = cfg.trainer.get("enable_checkpointing") or False  # else Lightning adds its own
    trainer: pl.Trainer = build(cfg.trainer, _partial_=True)(
        callbacks=[*callbacks, Session(config), Rehearsal(config)],
        logger=False if is_bare else loggers,
        default_root_dir=cfg.output_dir,
        **extra,
    )
    if trainer.accumulate_grad_batches == 0:  # Lightning would divide by it
        raise ConfigError("trainer.accumulate_grad_batches=0: expected 1 or more")
    if isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
        trainer.strategy.checkpoint_io.config = config
    prepare_trainer(trainer)
    set_matmul_precision(config, trainer.strategy.root_device)
    return trainer


def set_matmul_precision(config: Mapping[str, Any], device: torch.device) -> None:
    """Set the precision of float32 matrix products that a run's config asks for; null follows Lightning's advice."""
    has_tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    precision = config.get("float32_matmul_precision") or ("high" if has_tensor_cores else "highest")
    torch.set_float32_matmul_precision(precision)


def _tell_apart(node: DictConfig) -> dict[str, str]:
    """Names by epoch and step for a ModelCheckpoint that keeps several files: else each would replace the last."""
    name, is_counting = node.get("filename"), node.get("enable_version_counter", True)
    if is_counting or node.get("save_top_k", 1) in (0, 1) or not name or "{step" in name:
        return {}
    return {"filename": f"{name}-{{epoch}}-{{step}}"}


def _build_logger(node: DictConfig, first_step: int | None) -> Any:
    """A logger; of the curves that it has, what a run that resumes has not come to is dropped."""
    is_resumed = first_step is not None
    is_tensorboard = node._target_.endswith(".TensorBoardLogger")
    # TensorBoard's server in Python takes the first such mark for a run's start and drops nothing: each run has one.
    purge_step = first_step if is_resumed else node.get("purge_step", 0)
    logger = build(node, **({"purge_step": purge_step} if is_tensorboard else {}))
    if is_tensorboard and is_resumed and not get_name():
        put_before_now(Path(logger.log_dir))
    if isinstance(logger, CSVLogger) and first_step is not None and not get_name():
        path = Path(logger.log_dir) / "metrics.csv"
        before = path.with_name(".metrics.csv")  # the logger deletes what is there, and a kill may follow at once
        if path.exists() and not before.exists():
            path.replace(before)
        text = before.read_text() if before.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)  # without one that a kill has cut off
        if rows := list(csv.reader(lines)):
            logger.experiment.metrics_keys = rows[0]
            steps = [-1, *(int(row[rows[0].index("step")]) for row in rows[1:])]  # the first line has the names
            write_text(path, "".join(line for line, step in zip(lines, steps, strict=True) if step < first_step))
        before.unlink(missing_ok=True)
    return logger


def put_before_now(folder: Path) -> None:
    """Rename event files that a clock has dated later than now: TensorBoard reads them in the order of their names."""
    paths = sorted(folder.glob("events.out.tfevents.[0-9]*"))
    if paths and paths[-1].name >= f"events.out.tfevents.{int(time.time()) + 1:010}":
        for number, path in enumerate(paths):
            path.rename(path.with_name(re.sub(r"\d+", f"{number:010}", path.name, count=1)))
