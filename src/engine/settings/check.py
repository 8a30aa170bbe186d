"""Whether a config makes sense, as far as it can be told without the classes: their imports take seconds."""

import difflib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.engine.errors import ConfigError
from src.engine.settings.arguments import BUILT, check_arguments, find_nodes, takes

ROOT = Path(__file__).resolve().parents[3]
CONF = ROOT / "conf"

POSITIVE = Annotated[int, range(1, sys.maxsize)]
TEXTS = ("monitor", "resume", "ckpt_path", "data.root", "init.weights", "output", "run")
# The template's own keys, those that no class takes: what is expected, for Python and in words.
OWN: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(TEXTS, (str | None, "text or null")),
    "seed": (Annotated[int, range(2**32)] | None, "a whole number from 0 to 4294967295 or null"),
    "mode": (Literal["min", "max"], "min or max"),
    "unit": (Literal["epoch", "step"], "epoch or step"),
    "test": (bool | Literal["all"], "true or false or all"),
    "init.map": (dict[str, str] | None, "a mapping of names' beginnings or null"),
    "init.skip": (list[str] | None, "a list of names or null"),
    "init.strict": (bool, "true or false"),
    "optimizer_groups": (list[dict] | None, "a list of {match: <names>, lr: ...} or null"),
    "float32_matmul_precision": (Literal["highest", "high", "medium"] | None, "highest, high, medium or null"),
    "data.batch_size": (POSITIVE | None, "a whole number of 1 or more or null"),
    "inputs": (str | list[str] | None, "text, a list of text or null"),
    "batch_size": (POSITIVE, "a whole number of 1 or more"),
    "format": (Literal["onnx", "pt2", "safetensors"], "onnx, pt2 or safetensors"),
    "port": (Annotated[int, range(2**16)], "a whole number from 0 to 65535"),
    "root_dir": (str, "text"),
}
DECLARED = ("extras",)  # what other templates have
# Keys that only one command has.
MARKS = dict.fromkeys(("seed", "model", "trainer"), "train")
MARKS |= {"inputs": "predict", "format": "export", "port": "demo", "run": "reproduce"}
NEEDED = ("model", "trainer", "scheduler.scheduler")  # to train
MADE_LATER = ("trainer", "optimizer", "scheduler.scheduler")  # of what the run adds


def check(cfg: DictConfig, declared: Iterable[str] = ()) -> None:
    """Check a command's config without importing what it names: keys, own values, nodes and modules.

    Args:
        cfg: The config, whole.
        declared: Keys at the top that are known beside those of the command's file in ``conf/``.

    Raises:
        ConfigError: At the first that cannot be.
    """
    config = _resolve(cfg)
    command = next((name for key, name in MARKS.items() if key in config), "test")
    _check_keys(config, command, declared)
    for key, (annotation, words) in OWN.items():
        group, _, name = key.rpartition(".")
        node = config.get(group) if group else config
        if isinstance(node, dict) and "_target_" not in node and name in node and not takes(annotation, node[name]):
            raise ConfigError(f"{key}={node[name]}: expected {words}")
    if command == "train":
        _check_training(config)
    for key, node in find_nodes(config):
        _find_module(key, node["_target_"])


def check_values(cfg: DictConfig) -> None:
    """Check what only the classes know that a config names: their arguments. It imports them.

    Raises:
        ConfigError: At the first that cannot be.
    """
    is_drawn = "seed" in cfg and cfg.seed is None  # later
    check_arguments(_resolve(OmegaConf.merge(cfg, {"seed": 0}) if is_drawn else cfg))


def _resolve(cfg: Any) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        said = str(error).splitlines()[0].rpartition("resolving interpolation: ")[2]
        remedy = "; set it in the shell or in .env" if "Environment variable" in said else ""
        raise ConfigError(f"{error.full_key}: {said}{remedy}") from error
    return {str(key): value for key, value in config.items()}  # type: ignore[union-attr]


def _check_keys(config: Mapping[str, Any], command: str, declared: Iterable[str]) -> None:
    """A key in a file that nobody reads is as wrong as one on the command line."""
    root: Any = OmegaConf.load(CONF / f"{command}.yaml")
    own = [key for key in root if key not in ("defaults", "hydra")]
    known = {*own, *find_groups(), *DECLARED, *(name for name in declared if "/" not in name)}
    for key in config:
        if key not in known:
            close = nearest(key, sorted({*known, "_global_"}))
            raise ConfigError(f"{key}: no such key; {close} (a key of your own: conf/{command}.yaml, extras)")
        if key not in BUILT and _is_global(key):
            raise ConfigError(f"{key}: nothing reads its keys; the file's first line must be '# @package _global_'")
    for key in own:
        if key not in config:
            raise ConfigError(f"{key}: is missing" + (f"; expected {OWN[key][1]}" if key in OWN else ""))


def _is_global(group: str) -> bool:
    """Whether a group's files set the keys of others, as experiments do."""
    texts = [path.read_text("utf-8") for path in (CONF / group).glob("*.yaml")]
    return bool(texts) and all("@package _global_" in text for text in texts)


def find_groups() -> list[str]:
    """The names of the groups in ``conf/``."""
    return [path.name for path in CONF.iterdir() if path.is_dir()]


def find_close(name: str, options: Iterable[str]) -> list[str]:
    """Which of some names is meant: those whose last part it is or ends with, or the one that is similar."""
    options = list(options)
    same = [option for option in options if option.rpartition(".")[2] == name]
    same = same or [option for option in options if option.endswith(f"_{name}")][:3]  # epochs: max_epochs
    return same or difflib.get_close_matches(name, options, n=1, cutoff=0.7)


def nearest(name: str, options: Iterable[str]) -> str:
    """Which of some names is meant, in words; else all of them, if there are few."""
    options = list(options)
    if close := find_close(name, options):
        return f"did you mean {' or '.join(close)}?"
    if len(options) > 20:
        return "--cfg job shows what there is, --cfg hydra Hydra's own keys"
    return f"there are: {', '.join(options) or 'none'}"


def _check_training(config: Mapping[str, Any]) -> None:
    nodes = {name: config.get(name) for name in ("model", "trainer", "data", "optimizer")}
    scheduler = config.get("scheduler")
    if isinstance(scheduler, dict) and "_target_" not in scheduler:
        nodes["scheduler.scheduler"] = scheduler.get("scheduler")
    for name in ("callbacks", "logger"):
        named = config.get(name) or {}
        if not isinstance(named, dict) or "_target_" in named:
            found = "_target_" if isinstance(named, dict) else named
            raise ConfigError(f"{name}: expected named nodes, as in mine: {{_target_: ...}}; found {found}")
        nodes |= {f"{name}.{key}": node for key, node in named.items()}
    for key, node in nodes.items():
        if (node is not None or key in NEEDED) and not (isinstance(node, dict) and "_target_" in node):
            found = ", ".join(map(str, node)) if isinstance(node, dict) else node
            # A file that sets keys of several groups may have been read as one of its own group.
            remedy = "; the file's first line must be '# @package _global_'" if key in (node or ()) else ""
            raise ConfigError(f"{key}: expected a node with a _target_, the class to build; found {found}{remedy}")
        if node and node.get("_partial_") and key not in MADE_LATER:
            raise ConfigError(f"{key}._partial_={node['_partial_']}: makes no object; leave it out")
    weights = (config["init"] or {}).get("weights")
    if weights and not config["ckpt_path"] and not Path(weights).is_file():  # a checkpoint has its own
        raise ConfigError(f"init.weights={weights}: no such file; expected one with weights to start from")
    resume, folder = config["resume"], config["output_dir"]
    if resume is not None and Path(resume).resolve() != Path(folder).resolve():
        # From a file, it would come too late to be replaced by how its run was started.
        raise ConfigError(f"resume={resume}: resumes a run from the command line only, not from a file")


def require(key: str, *packages: str, extra: str) -> None:
    """Look for packages that a setting needs.

    Raises:
        ConfigError: If one is not installed.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{key}: needs {' and '.join(missing)}: pip install -e '.[{extra}]'")


def _find_module(key: str, target: Any) -> None:
    """Look for a target's module among the files: importing torch takes seconds."""
    said = f"{key}._target_={target}"
    if not isinstance(target, str) or not all(name.isidentifier() for name in target.split(".")) or "." not in target:
        raise ConfigError(f"{said}: expected the dotted name of a class, as in torch.optim.Adam")
    package, *names = target.split(".")[:-1]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ConfigError(f"{said}: no package {package} is installed")
    for name in names:
        places = list(spec.submodule_search_locations or ())
        found = PathFinder.find_spec(name, places)
        if found is None:  # then the package itself defines it, or has none
            initial = [path for place in places if (path := Path(place, "__init__.py")).is_file()]
            if places and not any(name in path.read_text("utf-8", "replace") for path in initial):
                known = [module.name for module in pkgutil.iter_modules(places)]
                raise ConfigError(f"{said}: {package} has no {name}; {nearest(name, known)}")
            return
        package, spec = f"{package}.{name}", found
