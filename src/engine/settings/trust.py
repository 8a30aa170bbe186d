"""What a checkpoint may build, and what may be stored in one.

conf/ and the command line are the user's own; a checkpoint may come from anybody, and may be given to anybody.
"""

import copy
import os
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from src.engine.errors import CheckpointError, ConfigError
from src.engine.settings.arguments import build, find_nodes, locate, parameters_of
from src.engine.settings.check import CONF, ROOT

# Classes that are defined below one of these; functions only of the last.
LIBRARIES = (
    "torch.nn", "torch.optim", "torchmetrics", "torchvision.transforms", "torchvision.ops", "torchvision.models",
)  # fmt: skip
# These come from the user's config: some of them write where they are told to.
USERS = ("callbacks", "logger", "trainer", "hydra")
NEVER = ("src.engine", "src.callbacks", "hydra_plugins", "hydra", "pytorch_lightning", "lightning_fabric")
# A path that may lead out of the project, an address, an interpolation.
PLACE = re.compile(r"^[/~\\]|^\w:[\\/]|://|(^|[\\/])\.\.([\\/]|$)|\$\{")

# Of an environment variable that holds a secret, perhaps within an address.
SECRET = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|UR[IL]|DSN", re.IGNORECASE)

_targets: set[str] = set()
_places: set[str] = set()


def admit(source: Any) -> None:
    """Let checkpoints build and use what the user's own config names.

    Args:
        source: A folder of YAML files, or a config.
    """
    if isinstance(source, Path):
        for path in source.rglob("*.yaml"):
            if path.relative_to(source).parts[0] not in USERS:
                admit(OmegaConf.load(path))
    else:
        plain = OmegaConf.to_container(source) if OmegaConf.is_config(source) else source
        for key, text in _texts(plain):
            if not key.startswith(USERS):
                (_targets if key.rpartition(".")[2] == "_target_" else _places).add(text)


@cache
def _admit_conf() -> None:
    admit(CONF)


def instantiate(config: Any, **kwargs: Any) -> Any:
    """Build a node of the user's own config, and let checkpoints build and use what it names from now on.

    Args:
        config: The node; None is None.
        kwargs: Arguments that override the config's.
    """
    admit(config)
    return build(config, **kwargs)


def tame(path: str | Path, key: str, node: Any, /, **own: Any) -> Any:
    """What a checkpoint has of its run's config, such that it may be built.

    It may name the classes that the user's own config names, and the libraries' layers. It reads no environment
    variable, and no folder or address that it chooses: where it has one that the user's config does not have, the
    user's own value is taken, or the constructor's default.

    Args:
        path: The checkpoint.
        key: The node's key in its config, as in ``model``.
        node: The node, plain.
        own: Arguments from the user, which override the checkpoint's.

    Raises:
        CheckpointError: If the checkpoint asks for anything else.
    """
    _admit_conf()
    if not isinstance(node, dict) or ("_target_" not in node and key != "scheduler"):
        raise CheckpointError(f"ckpt_path={path}: its {key} is no node with a _target_; choose another file")
    node = {**copy.deepcopy(node), **own}
    try:
        for full_key, child in find_nodes({**node, "_recursive_": True} if "_target_" not in node else node, key):
            child.pop("_recursive_", None)  # what is built later would not be looked at
            _check_target(full_key, child["_target_"])
            for name in [name for name in child if _find_place(child[name]) and not (child is node and name in own)]:
                _replace_place(full_key, child, name)
        for full_key, text in _texts({name: value for name, value in node.items() if name not in own}, key):
            if "${" in text:
                raise ConfigError(f"{full_key}={text}: a checkpoint may not refer to what is outside of it")
    except ConfigError as error:
        raise CheckpointError(f"ckpt_path={path}: {error}") from error
    return node


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """A run's config, resolved, as it may be stored and logged.

    What is read from the environment for a logger stays ``${oc.env:NAME}``; so does, anywhere, a variable whose name
    is that of a secret.
    """
    config = _resolve(cfg, lambda name: bool(SECRET.search(name)))
    if config.get("logger"):
        config["logger"] = _resolve(cfg, lambda name: name != "PROJECT_ROOT")["logger"]
    return config


def _resolve(cfg: DictConfig, is_hidden: Callable[[str], bool]) -> dict[str, Any]:
    def read(name: str, *default: Any) -> Any:
        return f"${{oc.env:{name}}}" if name in os.environ and is_hidden(name) else oc.env(name, *default)

    OmegaConf.register_new_resolver("oc.env", read, replace=True)
    try:
        return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _texts(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from _texts(child, f"{path}.{key}".lstrip("."))
    if isinstance(node, str):
        yield path, node


def _check_target(key: str, target: Any) -> None:
    said = f"{key}._target_={target}"
    if not isinstance(target, str) or re.search(r"\b_", target) or _is_within(target, NEVER):
        raise ConfigError(f"{said}: not among what a checkpoint may build")
    if target in _targets:
        return
    if not _is_within(target, LIBRARIES):
        raise ConfigError(f"{said}: a checkpoint may build what conf/ names; if it is yours, name it in a file there")
    found = locate(key, target)
    home = f"{found.__module__}.{found.__qualname__}"
    if not _is_within(home, LIBRARIES if isinstance(found, type) else LIBRARIES[-1:]):
        raise ConfigError(f"{said}: leads to {home}, which is not among what a checkpoint may build")


def _is_within(name: str, modules: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _find_place(value: Any) -> str:
    """A folder, address or interpolation in a value that is neither in the project nor in the user's config."""
    if isinstance(value, dict) and "_target_" in value:  # a node of its own
        return ""
    roots = [ROOT, Path(os.environ.get("PROJECT_ROOT", ROOT)).resolve()]
    for _, text in _texts(value):
        is_inside = "${" not in text and any(Path(text).expanduser().resolve().is_relative_to(root) for root in roots)
        if PLACE.search(text) and text not in _places and not is_inside:
            return text
    return ""


def _replace_place(key: str, node: dict[str, Any], name: str) -> None:
    options = [option for option in _own_options(key) if option.get("_target_") == node["_target_"] and name in option]
    if options:
        node[name] = max(options, key=lambda option: sum(option.get(key) == node[key] for key in node))[name]
        return
    parameter = (parameters_of(locate(key, node["_target_"])) or {}).get(name)
    if parameter is None or parameter.default is parameter.empty:
        raise ConfigError(
            f"{key}.{name}={_find_place(node[name])}: a checkpoint may not choose a folder or address; "
            f"name it in a file of conf/, or set {key}.{name}"
        )
    del node[name]


@cache
def _own_options(key: str) -> list[dict[str, Any]]:
    """The nodes that a key has by the options of its group in conf/."""
    group = key.partition(".")[0]
    found = []
    is_composed = GlobalHydra.instance().is_initialized()  # by the command
    with nullcontext() if is_composed else initialize_config_dir(str(CONF), version_base="1.3"):
        for path in sorted((CONF / group).glob("*.yaml")):
            node = OmegaConf.select(compose("train", [f"{group}={path.stem}"]), key)
            if OmegaConf.is_dict(node):
                found.append(OmegaConf.to_container(node, resolve=True))
    return found  # type: ignore[return-value]
