"""What a config may build: one from a stranger must not run what it likes."""

import difflib
import importlib.util
import os
import re
from collections.abc import Iterator
from functools import wraps
from itertools import chain
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import _locate
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf

from src.engine.errors import TargetError

# A `_target_` may name a class that is defined below one of these. Not all of torch and Lightning: there are classes
# that start a program (SubprocessHandler), and functions that unpickle or compile what they are given.
ALLOWED = (
    "src",
    "torch.nn",
    "torch.optim",
    "torch.utils.data",
    "torch.amp",
    "torch.distributed.fsdp",
    "torchvision",
    "torchmetrics",
    "pytorch_lightning.Trainer",
    "pytorch_lightning.trainer",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "pytorch_lightning.plugins",
    "pytorch_lightning.profilers",
    "pytorch_lightning.strategies",
    "lightning_fabric.plugins",
    "lightning_fabric.strategies",
    "lightning_utilities",
    "hydra.experimental.callbacks",
    "optuna.samplers",
    "optuna.pruners",
    "datetime.timedelta",
)
# Functions only where they make something: report.write_json would write to any file.
FACTORIES = re.compile(r"src\..*\.make_\w+|torchvision\.models\..*")
# What Hydra itself builds from registered plugins alone.
PLUGINS = ("hydra._internal.core_plugins", "hydra_plugins")
PLUGIN_KEYS = ("hydra.launcher", "hydra.sweeper")

# Modules of the user's own. From the environment, since a config must not allow itself; read at the start, since it
# could set the environment of the job.
VARIABLE = "ALLOWED_TARGETS"
OWN = tuple(name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip())


def check_targets(config: Any, path: str = "", load: bool = False) -> None:
    """Check each `_target_` in a config, at any depth.

    Args:
        config: Plain values: dicts, lists and so on.
        path: The config's own key.
        load: Whether to import what is named and check where it is defined, too: it must be done before anything is
            built, since a name may lead out of its module, as torch.nn.functional.os.system does.

    Raises:
        TargetError: At the first that is refused.
    """
    for key, target in _find_targets(config, path):
        said = f"{key}._target_={target}"
        if not isinstance(target, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", target):
            raise TargetError(f"{said}: expected the dotted name of a class, as in torch.optim.Adam")
        if _is_within(target, OWN) or (key in PLUGIN_KEYS and _is_within(target, PLUGINS)):
            continue
        if not _is_within(target, ALLOWED) or re.search(r"\b_", target):
            module = target.rpartition(".")[0]
            raise TargetError(
                f"{said}: not among what a config may build; if it is yours, or you trust it, "
                f"set {VARIABLE}={module} in your environment"
            )
        _find_name(said, target)
        if load:
            _check_definition(said, target)


def guard_hydra() -> None:
    """Have ``check_hydra`` called on all that Hydra composes: it leaves no other place ahead of its building."""
    load = ConfigLoaderImpl.load_configuration

    @wraps(load)
    def load_and_check(*args: Any, **kwargs: Any) -> DictConfig:
        config = load(*args, **kwargs)
        check_hydra(config)
        return config

    ConfigLoaderImpl.load_configuration = load_and_check  # type: ignore[method-assign]


def check_hydra(config: DictConfig) -> None:
    """Check what Hydra builds, calls or sets by itself, which it does as soon as it has composed a config.

    Raises:
        TargetError: At the first thing that is refused.
    """
    for name in ("callbacks", "launcher", "sweeper"):
        if OmegaConf.is_config(node := config.hydra.get(name)):
            check_targets(OmegaConf.to_container(node, resolve=True), f"hydra.{name}", load=True)
    logging = OmegaConf.masked_copy(config.hydra, ["hydra_logging", "job_logging"])
    _check_logging(OmegaConf.to_container(logging), "hydra")  # not resolved: the log's folder is not yet known
    if config.hydra.job.env_set:  # Git and Python take commands from there
        raise TargetError("hydra.job.env_set: a config must not set the environment; set it in your shell")


def instantiate(config: Any, **kwargs: Any) -> Any:
    """Hydra's ``instantiate`` behind ``check_targets``.

    Args:
        config: What to build; None is None.
        kwargs: Arguments that go before the config's.

    Raises:
        TargetError: If the config names what it must not.
    """
    if config is not None:
        plain = config if OmegaConf.is_config(config) else OmegaConf.create(config)
        check_targets(OmegaConf.to_container(plain, resolve=True), plain._get_full_key(None) or "config", load=True)
    return hydra_instantiate(config, **kwargs)


def _find_targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and "_target_" in node:
        yield path, node["_target_"]
    for key, child in _children(node):
        yield from _find_targets(child, f"{path}{key}".lstrip("."))


def _check_logging(node: Any, path: str) -> None:
    """Python's logging calls what its config names, too."""
    for key, child in _children(node):
        if key in (".class", ".()"):
            if not re.fullmatch(r"logging\.(handlers\.)?[A-Z]\w+", str(child)):
                raise TargetError(f"{path}{key}={child}: expected a class of Python's logging")
        elif isinstance(child, str) and "${" in child and key != ".filename":
            raise TargetError(f"{path}{key}={child}: expected a plain value; only a file's name may refer to others")
        _check_logging(child, f"{path}{key}")


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        yield from ((f".{key}", child) for key, child in node.items())
    elif isinstance(node, list):
        yield from ((f"[{index}]", child) for index, child in enumerate(node))


def _is_within(name: str, modules: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _find_name(said: str, target: str) -> None:
    """Look for the name in its module's source, which takes milliseconds; importing torch takes seconds."""
    package, *names = target.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise TargetError(f"{said}: no package {package} is installed")
    if not spec.submodule_search_locations:
        return
    place = Path(spec.submodule_search_locations[0])
    while names and (place / names[0]).is_dir():
        place /= names.pop(0)
    if names and (place / f"{names[0]}.py").is_file():
        place /= f"{names.pop(0)}.py"
    module = ".".join(target.split(".")[: -len(names) or None])
    if not names:
        raise TargetError(f"{said}: a module; expected a class in it")
    defined: set[str] = set()
    # The package's own file first: it has what users know, and the search ends there.
    for path in [place] if place.is_file() else chain([place / "__init__.py"], place.rglob("*.py")):
        source = path.read_text("utf-8", "replace") if path.is_file() else ""
        if re.search(rf"\b{names[0]}\b(?!-)", source):
            if len(names) > 1 and not names[0][0].isupper():
                raise TargetError(f"{said}: {names[0]} is no class of {module}")
            return
        defined.update([path.stem, *re.findall(r"^(?:class|def) ([^\W_]\w*)", source, re.MULTILINE)])
    close = difflib.get_close_matches(names[0], defined, n=1)
    raise TargetError(f"{said}: {module} has no {names[0]}" + (f"; did you mean {close[0]}?" if close else ""))


def _check_definition(said: str, target: str) -> None:
    try:
        found = _locate(target)
    except Exception as error:  # whatever a module raises on import
        raise TargetError(f"{said}: {error}") from error
    home = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
    if not _is_within(home, ALLOWED):
        raise TargetError(f"{said}: leads to {home}, which is not among what a config may build")
    if not isinstance(found, type) and not (
        isinstance(found, FunctionType | MethodType) and FACTORIES.fullmatch(target)
    ):
        raise TargetError(f"{said}: expected a class, or a function of src that is called make_...")
