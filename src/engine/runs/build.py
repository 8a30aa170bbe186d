"""From a config to objects, and from a checkpoint to a module and its data."""

import csv
import inspect
import io
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ProgressBar
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.optim import Optimizer

from src.engine.errors import CheckpointError, ConfigError
from src.engine.runs.checkpoint_io import AtomicCheckpointIO
from src.engine.runs.checkpoints import check_checkpoint
from src.engine.runs.groups import GroupedOptimizer
from src.engine.runs.init import COMPILED, load_weights
from src.engine.runs.processes import get_name, is_started_from_outside, prepare_trainer
from src.engine.runs.rehearsal import Rehearsal
from src.engine.runs.report import write_text
from src.engine.runs.resume import find_first_step
from src.engine.runs.session import Session
from src.engine.settings.arguments import check_arguments
from src.engine.settings.explain import explain
from src.engine.settings.trust import instantiate, plain_config, renamed, tame

log = logging.getLogger(__name__)

FACTORIES = ("optimizer", "scheduler")  # groups that a module gets if its constructor takes them


def seed_everything(cfg: DictConfig) -> None:
    """Seed Python, NumPy and torch by ``cfg.seed``. If that is null, draw one first; it is then the run's seed.

    Raises:
        ConfigError: If it is null where several processes are started from outside: each would draw another.
    """
    if cfg.seed is None:
        if is_started_from_outside():
            raise ConfigError("seed=null: several processes cannot agree on one; set it, as in seed=42")
        cfg.seed = int(os.environ.get("PL_GLOBAL_SEED") or secrets.randbelow(2**32))  # a child has its parent's
    pl.seed_everything(cfg.seed, verbose=False)


def build_datamodule(cfg: DictConfig) -> pl.LightningDataModule | None:
    """The data module of ``cfg.data``; None without one: the module then has loaders of its own."""
    datamodule: pl.LightningDataModule | None = None
    if cfg.get("data"):
        datamodule = instantiate(cfg.data, _convert_="object")
        _check_origin("data", cfg.data, datamodule, pl.LightningDataModule)
    return datamodule


def build_module(cfg: DictConfig) -> pl.LightningModule:
    """The LightningModule of ``cfg.model``, ready to train.

    Its constructor gets what stands in ``cfg.model``, lists and dicts as plain ones. It gets ``cfg.optimizer`` and
    ``cfg.scheduler`` too if it takes arguments of these names and ``cfg.model`` does not have them itself; a group that
    it does not get is set to null in ``cfg``. A scheduler's ``total_steps`` that is null is filled in with the run's
    number of optimizer steps when the scheduler is made. An optimizer divides its parameters by
    ``cfg.optimizer_groups``, and the weights are those of ``cfg.init``, unless a checkpoint is about to replace them.
    """
    takes = _parameters(cfg.model)
    entries, init = (OmegaConf.select(cfg, key) or OmegaConf.create() for key in ("optimizer_groups", "init"))
    factories: list[_Schedule | GroupedOptimizer] = []
    arguments: dict[str, Any] = {}
    for name in FACTORIES:
        if cfg.get(name) and (name not in takes or name in cfg.model):
            if not get_name():  # the first process tells it
                log.info(f"{name}: not used: {cfg.model._target_} has its own")
            cfg[name] = None
        if cfg.get(name):
            arguments[name] = _equip(
                instantiate(cfg[name], _convert_="object"), factories, bool(entries), name == "optimizer"
            )
    for name, node in cfg.model.items():
        if OmegaConf.is_dict(node) and node.get("_partial_"):
            arguments[str(name)] = _equip(instantiate(node, _convert_="object"), factories, bool(entries))
    module: pl.LightningModule = instantiate(cfg.model, _convert_="object", **arguments)
    _check_origin("model", cfg.model, module, pl.LightningModule)
    for factory in factories:
        factory.module = module
        if isinstance(factory, GroupedOptimizer):
            factory.entries = _plain(entries)
    if entries and not any(isinstance(factory, GroupedOptimizer) for factory in factories):
        raise ConfigError(
            f"optimizer_groups: {cfg.model._target_} makes its optimizer itself; have it take `optimizer`"
        )
    if init.get("weights") and not cfg.get("ckpt_path"):
        for line in load_weights(module, **_plain(init)):
            if not get_name():
                log.info(line)
    module.register_load_state_dict_pre_hook(_fit_names)
    return module


def _check_origin(key: str, node: Any, built: Any, expected: type) -> None:
    """The package lightning has classes of the same names, which pytorch_lightning's Trainer does not know."""
    said = f"{key}._target_={node['_target_']}"
    for base in type(built).__mro__:
        if base.__name__ == expected.__name__ and base is not expected:
            raise ConfigError(
                f"{said}: its base class is {base.__module__}.{base.__name__}; import that from pytorch_lightning, "
                "which is the same code"
            )
    if key == "model" and not isinstance(built, expected):
        raise ConfigError(f"{said}: a {type(built).__name__}; expected a pytorch_lightning.LightningModule")


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def _parameters(node: Any) -> set[str]:
    """The names that a node's target takes; those of a base class too where its constructor takes ``**kwargs``."""
    target = get_object(node["_target_"])
    names: set[str] = set()
    for each in target.__mro__ if isinstance(target, type) else [target]:
        if isinstance(target, type) and "__init__" not in vars(each):
            continue
        parameters = inspect.signature(each).parameters
        names |= set(parameters)
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


class _Schedule(partial):
    """A scheduler's factory that fills in the run's number of steps, and each group's own peak."""

    module: pl.LightningModule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = {**self.keywords, **kwargs}
        if own.get("total_steps", 0) is None:
            kwargs["total_steps"] = int(self.module.trainer.estimated_stepping_batches)
        optimizer = args[0] if args else own["optimizer"]
        rate, rates = optimizer.defaults["lr"], [group["lr"] for group in optimizer.param_groups]
        for name in ("base_lr", "max_lr"):  # a number: that of the optimizer's own rate
            if isinstance(own.get(name), int | float) and any(other != rate for other in rates):
                kwargs[name] = [own[name] * other / rate if rate else other for other in rates]
        return super().__call__(*args, **kwargs)


def _equip(
    value: Any, factories: list[_Schedule | GroupedOptimizer], is_grouped: bool, is_optimizer: bool = False
) -> Any:
    """Replace the factories in ``value`` that need to know the run, its data or its module."""
    if isinstance(value, dict):
        return {key: _equip(child, factories, is_grouped) for key, child in value.items()}
    if not isinstance(value, partial):
        return value
    kind: Any = None
    if is_optimizer or (isinstance(value.func, type) and issubclass(value.func, Optimizer)):
        kind = GroupedOptimizer if is_grouped else None
    elif value.keywords.get("total_steps", 0) is None or "max_lr" in value.keywords:
        kind = _Schedule
    if kind is None:
        return value
    factories.append(kind(value.func, *value.args, **value.keywords))
    return factories[-1]


def _fit_names(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Rename what torch.compile has renamed, so that compiled and plain nets load each other's weights."""
    own = {name.replace(COMPILED, ""): name for name in module.state_dict()}
    for name in list(state_dict):
        state_dict[own.get(name.replace(COMPILED, ""), name)] = state_dict.pop(name)


def build_trainer(cfg: DictConfig) -> pl.Trainer:
    """The trainer of ``cfg.trainer`` with the nodes of ``cfg.callbacks`` and ``cfg.logger``.

    Each of its checkpoints holds the config, resolved and plain, under the key ``config``. Where ``cfg.ckpt_path`` or
    ``cfg.resume`` resumes a run, what its curves in ``cfg.output_dir`` have of later steps is dropped.
    """
    config = plain_config(cfg)
    checkpoint = load_checkpoint(cfg.ckpt_path) if cfg.get("ckpt_path") and cfg.get("train", True) else None
    with _naming(cfg.get("ckpt_path")):
        first_step = find_first_step(cfg, config, checkpoint)
    loggers = [_build_logger(node, first_step) for node in (cfg.get("logger") or {}).values() if node is not None]
    # A flag that is off must be enough: Lightning refuses the callbacks that go with it.
    is_bare = cfg.trainer.get("barebones", False)
    off: list[type] = [] if loggers else [LearningRateMonitor, DeviceStatsMonitor]
    for flag, kind in (("enable_checkpointing", Checkpoint), ("enable_progress_bar", ProgressBar)):
        if is_bare or cfg.trainer.get(flag) is False:
            off.append(kind)
    callbacks = [callback for callback in _build_named(cfg.get("callbacks")) if not isinstance(callback, tuple(off))]
    extra: dict[str, Any] = {}
    if not any(isinstance(callback, Checkpoint) for callback in callbacks):
        extra["enable_checkpointing"] = cfg.trainer.get("enable_checkpointing") or False  # else Lightning adds its own
    trainer: pl.Trainer = instantiate(cfg.trainer, _partial_=True)(
        callbacks=[*callbacks, Session(config), Rehearsal(config)],
        logger=False if is_bare else loggers,
        default_root_dir=cfg.output_dir,
        **extra,
    )
    if isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
        trainer.strategy.checkpoint_io.config = config
    prepare_trainer(trainer)
    device = trainer.strategy.root_device
    has_tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    precision = cfg.get("float32_matmul_precision") or ("high" if has_tensor_cores else "highest")  # Lightning's advice
    torch.set_float32_matmul_precision(precision)
    return trainer


def _build_named(nodes: DictConfig | None) -> list[Any]:
    return [instantiate(node, **_tell_apart(node)) for node in nodes.values() if node is not None] if nodes else []


def _tell_apart(node: DictConfig) -> dict[str, str]:
    """Names by epoch and step for a ModelCheckpoint that keeps several files: else each would replace the last."""
    name, is_counting = node.get("filename"), node.get("enable_version_counter", True)
    if is_counting or node.get("save_top_k", 1) in (0, 1) or not name or "{step" in name:
        return {}
    return {"filename": f"{name}-{{epoch}}-{{step}}"}


def _build_logger(node: DictConfig, first_step: int | None) -> Any:
    if first_step is None:
        return instantiate(node)
    if node._target_.endswith(".TensorBoardLogger"):
        return instantiate(node, purge_step=first_step)
    logger = instantiate(node)
    if isinstance(logger, CSVLogger) and not get_name():
        path = Path(logger.log_dir) / "metrics.csv"
        kept = path.with_name(".metrics.csv")  # the logger deletes what is there, and a kill may follow at once
        text = next((each.read_text() for each in (kept, path) if each.is_file()), "")
        lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))  # without one that a kill has cut off
        if lines:
            step = lines[0].index("step")
            file = io.StringIO()
            csv.writer(file).writerows(lines[:1] + [line for line in lines[1:] if int(line[step]) < first_step])
            write_text(kept, file.getvalue())
            path.unlink(missing_ok=True)
            logger.experiment.metrics_keys = lines[0]
            kept.replace(path)
    return logger


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; nothing in it is ever unpickled but tensors and plain values.

    Returns:
        What Lightning wrote, and the run's ``config``. (Checkpoints of release 0.1.0 have it as hyper-parameters.)

    Raises:
        CheckpointError: If the file is missing, damaged, or not of a run of this project.
    """
    check_checkpoint(path)
    with _naming(path):
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    found = checkpoint if isinstance(checkpoint, dict) else {}
    config = found.get("config", found.get("hyper_parameters"))
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict) or "state_dict" not in found:
        raise CheckpointError(
            f"ckpt_path={path}: not a checkpoint of this project: it lacks the weights, or the config of its run"
        )
    for name in ("model", "data", "optimizer", "scheduler"):
        node = config.get(name)
        is_named = isinstance(node, dict) and (name == "scheduler" or isinstance(node.get("_target_"), str))
        if (node or name == "model") and not is_named:
            raise CheckpointError(f"ckpt_path={path}: its {name} is no node with a _target_; choose another file")
    return {**checkpoint, "config": renamed(config)}


@contextmanager
def _naming(path: str | Path | None) -> Iterator[None]:
    """Name the checkpoint in an error that its content leads to; not in one that tells what you have changed.

    Raises:
        CheckpointError: If anything is raised meanwhile but a ``ConfigError``.
    """
    try:
        yield
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:
        reason = explain(error).removeprefix("error: ").partition("\n")[0]
        raise CheckpointError(f"ckpt_path={path}: cannot be used: {reason}") from error


def restore(path: str | Path) -> Any:
    """Build the module that a checkpoint holds, weights and all, from the file alone.

    Args:
        path: A checkpoint of a run.

    Returns:
        The LightningModule in evaluation mode, on the CPU.

    Raises:
        CheckpointError: If the file is missing, damaged, or its weights do not fit the model that it describes.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    groups = [name for name in ("model", *FACTORIES) if config.get(name)]
    with _naming(path):
        cfg = OmegaConf.create({name: tame(path, name, config[name]) for name in groups})
        try:
            module = build_module(cfg)
        except Exception as error:
            if not isinstance(error.__cause__, OSError):
                raise
            with _without_files():  # the constructor reads weights from a file that is gone: the checkpoint has them
                module = build_module(cfg)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"ckpt_path={path}: its weights do not fit its model: {' '.join(str(error).split())}"
        ) from error
    return module.eval()


class _Gone(dict):
    """What a file of weights is taken for that is not there: all its parts are the same."""

    def __missing__(self, key: Any) -> "_Gone":
        return self


@contextmanager
def _without_files() -> Iterator[None]:
    """Meanwhile, torch takes a file that is not there for an empty one, and a module takes any weights."""
    load: Any = torch.load
    fetch, fill = torch.hub.load_state_dict_from_url, nn.Module.load_state_dict

    def read(*args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **kwargs)
        except OSError:
            return _Gone()

    torch.load, torch.hub.load_state_dict_from_url = read, lambda *_, **__: _Gone()
    nn.Module.load_state_dict = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.load, torch.hub.load_state_dict_from_url = load, fetch
        nn.Module.load_state_dict = fill  # type: ignore[method-assign]


def restore_datamodule(path: str | Path, unread: str | None = None, **overrides: Any) -> Any:
    """Build the data module that a checkpoint's run used, with the same split.

    It gets the state that the run's data module has left in the checkpoint, by its ``load_state_dict``.

    Args:
        path: A checkpoint.
        unread: Where no data are read: the folder that replaces one that the checkpoint may not choose.
        overrides: Arguments of the data module that override the run's, as a command's ``data`` has them; None keeps
            the run's. ``batch_size`` is its ``eval_batch_size`` if it takes that.

    Returns:
        The LightningDataModule; None of a run without one.

    Raises:
        ConfigError: If the data module takes no such argument.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint["config"].get("data") is None:
        return None
    node = checkpoint["config"]["data"]
    own = {name: value for name, value in overrides.items() if value is not None}
    data = tame(path, "data", node, unread, **own)
    if "batch_size" in own and "eval_batch_size" in _parameters(data):
        data["eval_batch_size"] = own["eval_batch_size"] = own.pop("batch_size")
        data |= {"batch_size": node["batch_size"]} if "batch_size" in node else {}
    check_arguments({"data": {"_target_": data["_target_"], "_partial_": True, **own}})
    with _naming(path):
        datamodule: Any = build_datamodule(OmegaConf.create({"data": data}))
        if state := checkpoint.get(type(datamodule).__qualname__):  # where Lightning puts it
            datamodule.load_state_dict(state)
    return datamodule


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
