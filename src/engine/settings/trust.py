"""What a checkpoint may build, and what may be stored in one.

conf/ and the command line are the user's own; a checkpoint may come from anybody, and may be given to anybody.
"""

import copy
import logging
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from src.engine.errors import CheckpointError, ConfigError
from src.engine.settings.arguments import build, locate, parameters_of, walk
from src.engine.settings.check import CONF, ROOT

log = logging.getLogger(__name__)

# Classes that are defined below one of these; functions only of the last.
LIBRARIES = (
    "torch.nn", "torch.optim", "torchmetrics", "torchvision.transforms", "torchvision.ops", "torchvision.models",
)  # fmt: skip
# These come from the user's config: some of them write where they are told to.
USERS = ("callbacks", "logger", "trainer", "hydra")
# A path that may lead out of the project; an address, a drive of another system, an interpolation.
LEADING_OUT = re.compile(r"^[/~\\]|(^|[\\/])\.\.([\\/]|$)")
ELSEWHERE = re.compile(r"^\w[\w.+-]*:[\\/]|://|\$\{")

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
        memory: The file that keeps them, one a line.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    groups = {name: node for name, node in plain.items() if isinstance(node, dict)}
    if named := {text for text in _find_places(groups) if "://" not in text} - recall(memory):
        memory.parent.mkdir(parents=True, exist_ok=True)
        with memory.open("a", encoding="utf-8") as file:
            file.write("".join(f"{text}\n" for text in sorted(named)))


def recall(memory: Path) -> set[str]:
    """Let checkpoints use the folders that the user's runs have named before, and return these."""
    known = set(memory.read_text(encoding="utf-8").splitlines()) if memory.is_file() else set()
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
    node = {name: child for name, child in copy.deepcopy(node).items() if name not in own}
    try:
        for full_key, child in walk(node, key):
            if isinstance(child, dict) and "_target_" in child:
                _check_target(full_key, child["_target_"])
                _replace_places(full_key, child, unread)
            elif isinstance(child, str) and _find_unknown(child):
                remedy = f"set ++{full_key}=<yours>, or" if re.fullmatch(r"data\.\w+", full_key) else "if it is yours,"
                said = f"{full_key}={child}: a checkpoint may not choose a folder or address"
                raise ConfigError(f"{said}; {remedy} name it in a file of conf/")
    except ConfigError as error:
        raise CheckpointError(f"ckpt_path={path}: {error}") from error
    return {**node, **own}


def _replace_places(key: str, node: dict[str, Any], unread: str | None) -> None:
    """Replace a node's own arguments that are places which the user has not named."""
    for name, parameter in parameters_of(locate(key, node["_target_"])).items():
        places = _find_unknown(node[name]) if name in node and not isinstance(node[name], dict) else []
        if places and parameter.default is not parameter.empty:
            log.warning(f"{key}.{name}={places[0]!r}: the checkpoint's; the default is used instead")
            del node[name]
        elif places and unread:
            node[name] = unread


def renamed(node: Any) -> Any:
    """A checkpoint's config with the names that its classes have now, as ``RENAMED`` says."""
    node = copy.deepcopy(node)
    for _, child in walk(node):
        if isinstance(child, dict) and isinstance(target := child.get("_target_"), str):
            found = (new + target.removeprefix(old) for old, new in RENAMED.items() if target.startswith(old))
            child["_target_"] = next(found, target)
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


def _texts(node: Any, path: str = "") -> list[tuple[str, str]]:
    return [(key, child) for key, child in walk(node, path) if isinstance(child, str)]


def _check_target(key: str, target: Any) -> None:
    said = f"{key}._target_={target}"
    if isinstance(target, str) and target in _targets:
        return
    if not isinstance(target, str) or re.search(r"\b_", target) or not _is_within(target, LIBRARIES):
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

    def is_outside(text: str) -> bool:
        return not any(Path(text).expanduser().resolve().is_relative_to(root) for root in roots)

    texts = [text for key, text in _texts(node) if not key.startswith(USERS)]
    return [text for text in texts if ELSEWHERE.search(text) or (LEADING_OUT.search(text) and is_outside(text))]


def _find_unknown(node: Any) -> list[str]:
    return [place for place in _find_places(node) if place not in _places]
