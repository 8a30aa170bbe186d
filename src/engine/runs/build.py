"""From a config to objects, and from a checkpoint to a module and its data."""

import inspect
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import nn

from src.engine.errors import CheckpointError, ConfigError
from src.engine.runs.checkpoints import check_checkpoint
from src.engine.runs.groups import InGroups
from src.engine.runs.init import COMPILED, load_weights
from src.engine.runs.processes import get_name, is_started_from_outside
from src.engine.runs.schedules import Schedule, equip
from src.engine.settings.arguments import check_arguments, parameters_of, takes_group
from src.engine.settings.explain import explain
from src.engine.settings.trust import instantiate, renamed, tame

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
        check_kind("data", cfg.data, datamodule, pl.LightningDataModule)
    return datamodule


def build_module(cfg: DictConfig) -> pl.LightningModule:
    """The LightningModule of ``cfg.model``, ready to train.

    Its constructor gets what stands in ``cfg.model``, lists and dicts as plain ones. It gets ``cfg.optimizer`` and
    ``cfg.scheduler`` too if it takes arguments of these names, not as a text or a class, and ``cfg.model`` has none; a
    group that it does not get is set to null in ``cfg``. A scheduler's ``total_steps`` that is null is filled in with
    the run's number of optimizer steps when the scheduler is made. Its optimizers divide their parameters by
    ``cfg.optimizer_groups``, and the weights are those of ``cfg.init``, unless a checkpoint is about to replace them.
    """
    takes, arguments = _parameters(cfg.model), {}
    entries, init = (_plain(OmegaConf.select(cfg, key) or OmegaConf.create()) for key in ("optimizer_groups", "init"))
    for name in FACTORIES:
        if cfg.get(name) and name in takes and name not in cfg.model and takes_group(takes[name], cfg[name]):
            follows = [] if cfg.get("optimizer") else [InterpolationResolutionError]  # an optimizer that is not used
            with suppress(*follows):
                arguments[name] = instantiate(cfg[name], _convert_="object")
        if cfg.get(name) and name not in arguments:
            vain = [word for word in _overrides() if word.lstrip("+").startswith((f"{name}.", f"{name}="))]
            if not get_name():  # the first process tells it
                no_effect = f", so {', '.join(vain)} has no effect" * bool(vain)
                log.info(f"{name}: not used: {cfg.model._target_} has its own{no_effect}")
            cfg[name] = None
    for name, node in cfg.model.items():
        if OmegaConf.is_dict(node) and node.get("_partial_"):
            arguments[str(name)] = instantiate(node, _convert_="object")
    schedules: list[Schedule] = []
    arguments = equip(arguments, schedules)
    module: pl.LightningModule = instantiate(cfg.model, _convert_="object", **arguments)
    check_kind("model", cfg.model, module, pl.LightningModule)
    for schedule in schedules:
        schedule.module = module
    if entries:
        module.configure_optimizers = InGroups(module, entries)  # type: ignore[method-assign]
    if init.get("weights") and not cfg.get("ckpt_path"):
        for line in load_weights(module, **init):
            if not get_name():
                log.info(line)
    module.register_load_state_dict_pre_hook(_fit_names)
    return module


def _overrides() -> list[str]:
    """What the command line says, of a sweep's job too; nothing outside of a command."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def check_kind(key: str, node: Any, built: Any, expected: type) -> None:
    """Check what was built; the package lightning has classes of the same names, which are not pytorch_lightning's.

    Raises:
        ConfigError: If it is something else than its place is for. Data may be of any kind: a loader will do.
    """
    if isinstance(built, expected):
        return
    said = f"{key}._target_={node['_target_']}"
    for base in type(built).__mro__:
        if base.__name__ == expected.__name__:
            theirs = f"{base.__module__}.{base.__name__}"
            raise ConfigError(f"{said}: its base class is {theirs}; import the one of pytorch_lightning, its twin")
    if key != "data":
        name = f"{expected.__module__.partition('.')[0]}.{expected.__name__}"
        raise ConfigError(f"{said}: a {type(built).__name__}; expected a {name}")


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def _parameters(node: Any) -> dict[str, inspect.Parameter]:
    """What a node's target takes; what its base class does, too, where its constructor takes ``**kwargs``."""
    target = get_object(node["_target_"])
    found: dict[str, inspect.Parameter] = {}
    for each in [kind for kind in target.__mro__ if "__init__" in vars(kind)] if isinstance(target, type) else [target]:
        parameters = parameters_of(each)
        found = {**parameters, **found}
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return found


def _fit_names(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Rename what torch.compile has renamed, so that compiled and plain nets load each other's weights."""
    own = {name.replace(COMPILED, ""): name for name in module.state_dict()}
    for name in list(state_dict):
        state_dict[own.get(name.replace(COMPILED, ""), name)] = state_dict.pop(name)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; nothing in it is ever unpickled but tensors and plain values.

    Returns:
        What Lightning wrote, and the run's ``config``. (Checkpoints of release 0.1.0 have it as hyper-parameters.)

    Raises:
        CheckpointError: If the file is missing, damaged, or not of a run of this project.
    """
    check_checkpoint(path)
    with naming(path):
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    found = checkpoint if isinstance(checkpoint, dict) else {}
    config = found.get("config", found.get("hyper_parameters"))
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict) or "state_dict" not in found:
        remedy = "src.train with train=false, your model and data tests it, init.weights=<file> starts from its weights"
        lacks = f"config; {remedy}" if "state_dict" in found else "weights"
        raise CheckpointError(f"ckpt_path={path}: not of a run of this project: it lacks the {lacks}")
    return {**checkpoint, "config": renamed(config)}


@contextmanager
def naming(path: str | Path | None) -> Iterator[None]:
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


def restore(path: str | Path, datamodule: Any = None) -> Any:
    """Build the module that a checkpoint holds, weights and all, from only the file, by Lightning's hooks for that.

    Args:
        path: A checkpoint of a run.
        datamodule: Its data, for a module that makes layers in ``setup``, which may ask for them.

    Returns:
        The LightningModule in evaluation mode, on the CPU.

    Raises:
        CheckpointError: If the file is missing, damaged, or its weights do not fit the model that it describes.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    groups = [name for name in ("model", *FACTORIES) if config.get(name)]
    with naming(path):
        cfg = OmegaConf.create({name: tame(path, name, config[name]) for name in groups})
        try:
            module = build_module(cfg)
        except Exception as error:
            if not isinstance(error.__cause__, OSError):
                raise
            with _without_files():  # the constructor reads weights from a file that is gone: the checkpoint has them
                module = build_module(cfg)
        if is_overridden("configure_model", module):
            module.configure_model()
        own = {name.replace(COMPILED, "") for name in module.state_dict()}
        is_lacking = any(name.replace(COMPILED, "") not in own for name in checkpoint["state_dict"])
        if is_lacking and is_overridden("setup", module):
            _set_up(module, datamodule or restore_datamodule(path), checkpoint["state_dict"])
        module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"ckpt_path={path}: its weights do not fit its model: {reason}") from error
    return module.eval()


def _set_up(module: pl.LightningModule, datamodule: Any, weights: dict[str, Any]) -> None:
    """Have a module make its layers in ``setup``, by its data, as Lightning does; each time they get their weights."""

    def set_up(stage: str) -> None:
        type(module).setup(module, stage)
        module.load_state_dict(weights, strict=module.strict_loading)

    module.trainer = trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    if isinstance(datamodule, pl.LightningDataModule):
        trainer.datamodule, datamodule.trainer = datamodule, trainer  # type: ignore[attr-defined]
        datamodule.prepare_data()
        datamodule.setup("test")
    type(module).setup(module, "test")
    module.trainer, module.setup = None, set_up  # type: ignore[method-assign]


class _Gone(dict):
    """What a file of weights is taken for that is not there: all its parts are the same."""

    def __missing__(self, key: Any) -> "_Gone":
        return self


@contextmanager
def _without_files() -> Iterator[None]:
    """Meanwhile, torch takes a file that is not there for an empty one, and a module takes any weights."""
    load = torch.load

    def read(*args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **kwargs)
        except OSError:
            return _Gone()

    with (
        patch("torch.load", read),
        patch("torch.hub.load_state_dict_from_url", lambda *_, **__: _Gone()),
        patch("torch.nn.Module.load_state_dict", lambda *_, **__: None),
    ):
        yield


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
    with naming(path):
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
