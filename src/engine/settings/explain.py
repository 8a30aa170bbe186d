"""Errors in a line or two: the setting or file, the value, what was expected, the remedy."""

import inspect
import os
import re
import sys
import sysconfig
import traceback
from pathlib import Path
from types import CodeType

from hydra import compose, initialize_config_dir
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from src.engine.errors import CheckpointError, ConfigError, DataError, SweepError
from src.engine.settings.arguments import TARGETS, find_nodes, walk
from src.engine.settings.check import CONF, ROOT, find_close, find_groups, nearest

EXTRAS = {"hydra/launcher/submitit_slurm": "slurm", "hydra/launcher/ray": "ray"}
LISTED = "Cannot merge DictConfig with ListConfig", "it has a list where there are names, as in name: {...}"
IN_LOG = "The stack trace is in the run's log; HYDRA_FULL_ERROR=1 prints it."
DOORS = [f"src/{name}.py" for name in ("train", "test", "predict", "export", "demo", "reproduce")]
PLUMBING = tuple(str(ROOT / name) for name in ("src/engine", "hydra_plugins", *DOORS))
KEYS = {"lr scheduler dict": "scheduler", "_dataloader` must be": "data"}  # of what Lightning says without one
AS_CONFIG = "where a module expects a DictConfig or Namespace, annotate its argument so, or set +model._convert_=none"
CONNECTOR = "checkpoint_connector.py"  # Lightning's
LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


def is_refusal(error: BaseException, cfg: DictConfig) -> bool:
    """Whether the settings are at fault, or what they lead to: nothing that a run which is on its way comes to."""
    is_ours = isinstance(error, ConfigError | CheckpointError | DataError | InstantiationException)
    return is_ours or _is_lightnings(error) or _is_restoring(error, cfg) or bool(_find_key(error, cfg))


def _is_lightnings(error: BaseException) -> bool:
    return type(error).__name__ == "MisconfigurationException"  # by name: it takes seconds to import


def explain(error: BaseException, config_name: str = "", cfg: DictConfig | None = None) -> str:
    """An error in one or two lines: the setting or file, the value, what was expected, the remedy.

    Args:
        error: What was raised.
        config_name: The command, where its config could not be composed.
        cfg: The config that the command ran with.
    """
    said = re.sub(r"(\S{100})\S{300,}", r"\1...", f"error: {_explain(error, config_name, cfg)}")
    said = re.sub("'dict' object has no attribute .*", rf"\g<0>; {AS_CONFIG}", said)
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in said)


def _explain(error: BaseException, config_name: str, cfg: DictConfig | None) -> str:
    if isinstance(error, InstantiationException):  # "Error in call to target 'x.Y':\n...\nfull_key: optimizer"
        found = re.search(r"full_key: (\S+)", str(error))
        return _explain_constructor(error.__cause__ or error, found[1] if found else "config", cfg)
    if cfg is not None and _is_restoring(error, cfg):
        said = f"{' '.join(str(error).split())[:400] or type(error).__name__}{_where(error)}"
        return f"ckpt_path={cfg.ckpt_path}: does not fit this run: {said}; init.weights=<file> takes only its weights"
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark):
        return f"{mark.name}, line {mark.line + 1}: {error.problem}; expected YAML"
    if isinstance(error, UnicodeDecodeError):
        for path in (Path(os.environ.get("PROJECT_ROOT", ROOT), ".env"), *CONF.rglob("*.yaml")):
            if path.is_file() and path.read_bytes().startswith(error.object):
                return f"{path}: {error.reason} at byte {error.start}; expected UTF-8"
    if isinstance(error, HydraException | OmegaConfBaseException) or "Invalid defaults list" in str(error):
        return " ".join(_explain_config(error, config_name).split())  # a value may have line breaks
    if any(kind.__module__ == "src.engine.errors" for kind in type(error).__mro__):
        return str(error) if isinstance(error, SweepError) else " ".join(str(error).split())
    if key := _find_key(error, cfg):
        return _explain_constructor(error, key, cfg)
    if isinstance(error, IndexError) and (label := re.fullmatch(r"Target (\d+) is out of bounds\.", str(error))):
        is_named = cfg is not None and OmegaConf.select(cfg, "model.num_classes") is not None
        key, few = ("model.num_classes", "") if is_named else ("model", ", for which it has no output")
        return f"{key}: the data have a class {label[1]}{few}; expected {int(label[1]) + 1} or more"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; mend that or choose another folder with hydra.run.dir=<folder>"
    if "/gloo/" in str(error) or type(error).__name__.startswith("Dist"):  # torch's DistNetworkError and so on
        reason = re.sub(r".*/gloo/\S+\] ", "", _first_line(error)).split(". This is")[0]
        if "connectFullMesh" in str(error):
            reason += " (is GLOO_SOCKET_IFNAME the interface that leads to the other machines?)"
        return (
            f"another process of this run has ended or does not answer: {reason}; "
            "see what it says itself, then continue with resume=<the run's folder>"
        )
    if isinstance(error, OSError) or _is_lightnings(error):
        said = " ".join(str(error).split())
        return next((f"{key}: {said}" for part, key in KEYS.items() if part in said), said)
    trace = "HYDRA_FULL_ERROR=1 prints the stack trace." if config_name else IN_LOG
    return f"{type(error).__name__}: {_first_line(error)}{_where(error) or _where(error, is_own=False)}\n{trace}"


def _explain_constructor(error: BaseException, key: str, cfg: DictConfig | None) -> str:
    """What the constructor of a node raises; its own keys are told in full."""
    lines = (str(error).strip() or repr(error)).splitlines()  # a bare assert says nothing
    said = " ".join(" ".join(lines[: 2 if lines[0].endswith(":") else 1]).split())  # the reason follows the colon
    if re.search("gpu backend found|can not run on your system", said):  # Lightning's
        said = f"{said.rstrip('!')}; use trainer=cpu"
    if "empty parameter list" in said:  # torch's
        return f"model: has no parameters to train ({said}); is its net built, without _partial_?"
    name = re.match(r"(\w+)(=|[.:\[])", said)
    if name and (name[2] == "=" or (cfg is not None and OmegaConf.select(cfg, f"{key}.{name[1]}") is not None)):
        return f"{key}.{said}"
    return f"{key}: {said}" + ("" if isinstance(error, ValueError) else _where(error))


def _find_key(error: BaseException, cfg: DictConfig | None) -> str:
    """The key of the node whose constructor has raised an error: optimizers, say, are built in the module."""
    if cfg is None or error.__traceback__ is None:
        return ""
    nodes = find_nodes(OmegaConf.to_container(cfg, resolve=True))
    targets = [(TARGETS[key], key) for key in TARGETS if key in cfg] + [(node["_target_"], key) for key, node in nodes]
    keys = {_code(str(target)): key for target, key in targets}
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((keys[code] for code in reversed(codes) if code in keys), "")


def _code(target: str) -> CodeType | None:
    """What runs when a target is called that is imported: without the decorators of a class's or function's own."""
    module, _, name = target.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    runs = found.__init__ if isinstance(found, type) else found  # type: ignore[misc]
    return getattr(inspect.unwrap(runs), "__code__", None) if callable(runs) else None


def _is_restoring(error: BaseException, cfg: DictConfig | None) -> bool:
    """Whether it was raised while the states of a run's checkpoint were given back, by Lightning or in your code."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(cfg and cfg.get("ckpt_path")) and any(
        frame.name == "load_state_dict" or ("restore" in frame.name and frame.filename.endswith(CONNECTOR))
        for frame in frames
    )


def _where(error: BaseException, is_own: bool = True) -> str:
    """The last place of a trace, or the last one in the user's own code."""
    skipped = (*LIBRARIES, *PLUMBING, "<") if is_own else ()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(skipped)]
    if not frames:
        return ""
    path = Path(frames[-1].filename)
    return f" ({path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}, line {frames[-1].lineno})"


def _explain_config(error: BaseException, config_name: str) -> str:
    """What Hydra and OmegaConf raise."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if extra := EXTRAS.get(error.missing_cfg_file):
            return f"{group}={option}: not installed; pip install -e '.[{extra}]' does it"
        options = error.options or sorted(path.stem for path in (CONF / group).glob("*.yaml"))  # a list has none
        if "/" in group and (meant := group.rpartition("/")[2]) in find_groups():  # a file's own group comes first
            return f"{group}={option}: no such file; a file's defaults want override /{meant}: {option}"
        key, place = (group, f"conf/{group}/") if group else ("--config-name", "conf/")
        return f"{key}={option}: no such file in {place}; {nearest(option, options)}"
    if several := re.match(r"\s*Ambiguous value for argument '(.*?)'\s", str(error), re.DOTALL):
        return f"{several[1]}: several values need -m: python -m src.train -m {several[1]}"
    if isinstance(error, ConfigCompositionException):
        return _explain_composition(error, config_name)
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key or 'config'}: {_first_line(error)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: expected key=value, with quotes as in 'key=\"a, b\"' or 'key=[a,b]'"
    return str(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _explain_composition(error: ConfigCompositionException, config_name: str) -> str:
    """Find the nearest name for a key that is not there."""
    said, cause = " ".join(str(error).split("full_key")[0].split()), error.__cause__
    if group := re.search(r"Could not override '(?:\w+/)?(\w+)@\S+'", said):
        first = "and '# @package _global_' must be the file's first line"
        return f"{said.partition(':')[0]}: defaults want override /{group[1]}: <option>, with the slash, {first}"
    if group := re.match(r"Multiple values for (\S+)\.", said):
        return f"{group[1]}: chosen twice; a file wants override /{group[1]}: <option>, the command line no plus"
    found = re.search(r"Could not (override|delete)[^']*'([^']+)'", said)
    if not found or (isinstance(cause, OmegaConfBaseException) and "not in struct" not in str(cause)):
        full_key = getattr(cause, "full_key", "") or (found[2].split("=")[0].lstrip("+~") if found else "")
        said = " ".join(str(cause).split("full_key")[0].split()) if cause else said
        return (f"{full_key}: " if full_key else "") + said.replace(*LISTED)
    key = getattr(cause, "full_key", None) or found[2].split("=")[0].lstrip("+~")
    keys = _all_keys(config_name)
    if key in keys and found[1] == "delete":
        return f"{key}: cannot be deleted; {key}=null may do"
    if config_name != "train" and (CONF / key).is_dir():
        return f"{key}: python -m src.{config_name} reads this from the checkpoint; there are: {', '.join(keys)}"
    top = str(key).partition(".")[0]
    own = [each for each in keys if each.startswith(f"{top}.") and "._" not in each] if "." in key else []
    known = own or [*keys, *find_groups()]  # those that are off have no key
    chosen = [word for word in sys.argv if word.startswith(f"{top}=") and (CONF / top).is_dir()]
    said = f"{key}: {chosen[-1]} has no such key" if chosen else f"{key}: no such key"
    if f"{top}.{key}" in keys:
        return f"{said}; the first line of a file that sets keys of several groups must be '# @package _global_'"
    typed = [word.lstrip("+~") for word in sys.argv]
    if any(word.startswith("sweep=") for word in typed) and not any(word.startswith(key) for word in typed):
        return f"{said}; it is the sweep's: choose another one of conf/sweep/"
    return f"{said}; {nearest(key, known)} (+{key}=... adds a new one)"


def nearest_key(name: str, config_name: str) -> str:
    """The key of a command's config that is called so, or nearly so; empty without one."""
    return next(iter(find_close(name, _all_keys(config_name))), "")


def _all_keys(config_name: str) -> list[str]:
    """The keys of a command's config, with the options that the command line chooses as far as they compose."""
    chosen = [word for word in sys.argv[1:] if (CONF / word.partition("=")[0].lstrip("+")).is_dir()]
    folders = [Path(word.partition("=")[2]).resolve() for word in sys.argv if word.startswith("--config-dir=")]
    chosen.append(f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders)}]")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            config = compose(config_name, chosen)
        except (HydraException, OmegaConfBaseException):  # of several values, say
            config = compose(config_name)
        return [key for key, _ in walk(OmegaConf.to_container(config)) if key]
