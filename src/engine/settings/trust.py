"""What a checkpoint may build, and what may be stored in one.

conf/ and the command line are the user's own; a checkpoint may come from anybody, and may be given to anybody.
"""

import copy
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from src.engine.errors import CheckpointError, ConfigError
from src.engine.settings.arguments import build, find_nodes, locate, parameters_of
from src.engine.settings.check import CONF, ROOT

log = logging.getLogger(__name__)

# Classes that are defined below one of these; functions only of the last.
LIBRARIES = (
    "torch.nn", "torch.optim", "torchmetrics", "torchvision.transforms", "torchvision.ops", "torchvision.models",
)  # fmt: skip
# These come from the user's config: some of them write where they are told to.
USERS = ("callbacks", "logger", "trainer", "hydra")
NEVER = ("src.engine", "src.callbacks", "hydra_plugins", "hydra", "pytorch_lightning", "lightning_fabric")
# A path that may lead out of the project, an address, an interpolation.
PLACE = re.compile(r"^[/~\\]|^\w:[\\/]|://|(^|[\\/])\.\.([\\/]|$)|\$\{")

# Where the classes are that checkpoints name, by the beginning of their name: {"src.models.net": "src.models.nets.net"}
RENAMED: dict[str, str] = {}

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
                admit(OmegaConf.to_container(OmegaConf.load(path)))
        return
    plain = OmegaConf.to_container(source, resolve=True) if OmegaConf.is_config(source) else source
    _places.update(text for text in _find_places(plain) if "${" not in text)
    _targets.update(text for key, text in _texts(plain) if key.endswith("_target_") and not key.startswith(USERS))


@cache
def _admit_conf() -> None:
    admit(CONF)


def remember(cfg: DictConfig, memory: Path) -> None:
    """Keep the folders that a run's nodes name, so that later commands may test its checkpoints.

    Args:
        cfg: The run's config.
        memory: The file that keeps them, as ``recall`` reads it.
    """
    known = recall(memory)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    groups = {name: node for name, node in plain.items() if isinstance(node, dict)}
    named = {text for text in _find_places(groups) if "://" not in text}
    if not named <= known:
        memory.parent.mkdir(parents=True, exist_ok=True)
        aside = memory.with_name(f"{memory.name}.{os.getpid()}")
        aside.write_text(json.dumps(sorted(known | named), indent=2))
        aside.replace(memory)


def recall(memory: Path) -> set[str]:
    """Let checkpoints use the folders that the user's runs have named before, and return these."""
    known = set()
    with suppress(OSError, ValueError):  # not there yet, or not as remember writes it
        known = set(json.loads(memory.read_text()))
    _places.update(known)
    return known


def instantiate(config: Any, **kwargs: Any) -> Any:
    """Build a node of the user's own config, and let checkpoints build and use what it names from now on.

    Args:
        config: The node; None is None.
        kwargs: Arguments that override the config's.
    """
    admit(config)
    return build(config, **kwargs)


def tame(path: str | Path, key: str, node: Any, unread: str | None = None, /, **own: Any) -> Any:
    """What a checkpoint has of its run's config, such that it may be built.

    It may name the classes that the user's own config names, and the libraries' layers. It reads no environment
    variable, and chooses no folder or address that the user has not named: the default replaces it, if there is one.

    Args:
        path: The checkpoint.
        key: The node's key in its config, as in ``model``.
        node: The node, plain.
        unread: The folder that replaces one which it may not choose, where nothing is read from it.
        own: Arguments from the user, which override the checkpoint's.

    Raises:
        CheckpointError: If the checkpoint asks for anything else.
    """
    _admit_conf()
    admit(unread)
    if not isinstance(node, dict) or ("_target_" not in node and key != "scheduler"):
        raise CheckpointError(f"ckpt_path={path}: its {key} is no node with a _target_; choose another file")
    node = {**copy.deepcopy(node), **own}
    try:
        for full_key, child in find_nodes({**node, "_recursive_": True} if "_target_" not in node else node, key):
            child.pop("_recursive_", None)  # what is built later would not be looked at
            _check_target(full_key, child["_target_"])
            parameters = parameters_of(locate(full_key, child["_target_"]))
            for name in [name for name in child if name in parameters and not (child is node and name in own)]:
                places = [] if isinstance(child[name], dict) else _find_places(child[name])
                if _places.issuperset(places):
                    continue
                if parameters[name].default is not inspect.Parameter.empty:
                    log.warning(f"{full_key}.{name}={places[0]!r}: the checkpoint's; the default is used instead")
                    del child[name]
                elif unread:
                    child[name] = unread
        for full_key, text in _texts({name: value for name, value in node.items() if name not in own}, key):
            if not _places.issuperset(_find_places(text)):
                is_own_key = re.fullmatch(r"data\.\w+", full_key)
                remedy = f"set ++{full_key}=<yours>, or" if is_own_key else "if it is yours,"
                raise ConfigError(
                    f"{full_key}={text}: a checkpoint may not choose a folder or address; {remedy} name it in a file "
                    "of conf/"
                )
    except ConfigError as error:
        raise CheckpointError(f"ckpt_path={path}: {error}") from error
    return node


def renamed(node: Any) -> Any:
    """A checkpoint's config with the names that its classes have now, as ``RENAMED`` says."""
    if isinstance(node, list):
        return [renamed(child) for child in node]
    if not isinstance(node, dict):
        return node
    node = {key: renamed(child) for key, child in node.items()}
    if isinstance(target := node.get("_target_"), str):
        old = next((old for old in RENAMED if target.startswith(old)), "")
        node["_target_"] = RENAMED.get(old, "") + target.removeprefix(old)
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


def _find_places(node: Any) -> list[str]:
    """The folders outside of the project, addresses and interpolations in a node."""
    roots = [ROOT, Path(os.environ.get("PROJECT_ROOT", ROOT)).resolve()]
    found = [text for key, text in _texts(node) if not key.startswith(USERS) and PLACE.search(text)]
    return [
        text
        for text in found
        if "${" in text or not any(Path(text).expanduser().resolve().is_relative_to(root) for root in roots)
    ]
