"""Errors in a line or two: the setting or file, the value, what was expected, the remedy."""

import difflib
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from src.engine.errors import SweepError
from src.engine.settings.check import CONF

EXTRAS = {"hydra/launcher/submitit_slurm": "slurm", "hydra/launcher/ray": "ray"}
UNEXPECTED = r"got an unexpected keyword argument '(\w+)'"
MAX_OPTIONS = 20  # more are not listed


def explain(error: BaseException, config_name: str = "") -> str:
    """Say an error in one or two lines: the setting or file, the value, what was expected, the remedy."""
    return re.sub(r"(\S{100})\S{300,}", r"\1...", _explain(error, config_name))


def _explain(error: BaseException, config_name: str) -> str:
    if isinstance(error, HydraException | OmegaConfBaseException | MissingConfigException):
        return " ".join(_explain_config(error, config_name).split())  # a value may have line breaks
    if isinstance(error, TypeError) and (name := re.match(rf"Trainer\.__init__\(\) {UNEXPECTED}", str(error))):
        return f"error: trainer.{name[1]}: pytorch_lightning.Trainer takes no such argument"
    if isinstance(error, IndexError) and (label := re.fullmatch(r"Target (\d+) is out of bounds\.", str(error))):
        return f"error: model.num_classes: the data have a class {label[1]}; expected {int(label[1]) + 1} or more"
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        return f"error:{where}: {error.strerror}; mend that or choose another folder with hydra.run.dir=<folder>"
    if isinstance(error, SweepError):
        return f"error: {error}"
    if "/gloo/" in str(error) or type(error).__name__.startswith("Dist"):  # torch's DistNetworkError and so on
        reason = re.sub(r".*/gloo/\S+\] ", "", _first_line(error)).split(". This is")[0]
        if "connectFullMesh" in str(error):
            reason += " (is GLOO_SOCKET_IFNAME the interface that leads to the other machines?)"
        return (
            f"error: another process of this run has ended or does not answer: {reason}; "
            "see what it says itself, then go on with resume=<the run's folder>"
        )
    if isinstance(error, OSError) or type(error).__module__.startswith("src."):
        return f"error: {' '.join(str(error).split())}"
    frame = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" ({Path(frame.filename).name}, line {frame.lineno})" if frame else ""
    trace = "HYDRA_FULL_ERROR=1 prints the stack trace."
    if not config_name:
        trace = "The stack trace is in the run's log; HYDRA_FULL_ERROR=1 prints it."
    return f"error: {type(error).__name__}: {_first_line(error)}{where}\n{trace}"


def _explain_config(error: Exception, config_name: str) -> str:
    """What Hydra and OmegaConf raise."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if error.missing_cfg_file in EXTRAS:
            extra = EXTRAS[error.missing_cfg_file]
            return f"error: {group}={option}: not installed; pip install -e '.[{extra}]' does it"
        options = error.options or sorted(path.stem for path in (CONF / group).glob("*.yaml"))  # a list has none
        return f"error: {group}={option}: no such file in conf/{group}/; {_nearest(option, options)}"
    if isinstance(error, ConfigCompositionException):
        return f"error: {_explain_composition(error, config_name)}"
    if isinstance(error, OmegaConfBaseException):
        return f"error: {error.full_key or 'config'}: {_first_line(error)}"
    if type(error).__name__ == "InstantiationException":
        # "Error in call to target 'torch.optim.Adam':\nTypeError(...)\nfull_key: optimizer"
        if type(error.__cause__).__module__.startswith("src.") and error.__cause__:
            return _explain(error.__cause__, config_name)
        key = re.search(r"full_key: (\S+)", str(error))
        cause = error.__cause__ or error
        where = key.group(1) if key else "config"
        if name := re.search(UNEXPECTED, str(cause)):
            target = re.search(r"target '(\S+)'", str(error))
            return f"error: {where}.{name[1]}: {target[1] if target else 'its _target_'} takes no such argument"
        lines = (str(cause).strip() or repr(cause)).splitlines()  # a bare assert says nothing
        said = " ".join(lines[: 2 if lines[0].endswith(":") else 1])  # the reason stands behind the colon
        return f"error: {where}: {said}"
    if isinstance(error, OverrideParseException):
        return f"error: {error.override}: expected key=value, with quotes as in 'key=\"a, b\"' or 'key=[a,b]'"
    return f"error: {error}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _nearest(name: str, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if len(options) > MAX_OPTIONS and not close:
        return "--cfg job shows what there is, --cfg hydra Hydra's own keys"
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(options) or 'none'}"


def _explain_composition(error: ConfigCompositionException, config_name: str) -> str:
    """Find the nearest name for a key that is not there."""
    found = re.search(r"Could not (?:override|delete)[^']*'([^']+)'", str(error))
    if not found:
        cause = error.__cause__
        key = f"{cause.full_key}: " if isinstance(cause, OmegaConfBaseException) and cause.full_key else ""
        return key + " ".join(str(cause or error).split("full_key")[0].split())
    key = found.group(1).split("=")[0].lstrip("+~")
    if isinstance(error.__cause__, OmegaConfBaseException) and "not in struct" not in str(error.__cause__):
        return f"{key}: {_first_line(error.__cause__)}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(config_name)
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]  # those that are off have no key
    keys = [*_all_keys(cfg), *groups]
    if key in keys:
        return f"{key}: cannot be deleted; {key}=null may do"
    return f"{key}: no such key; {_nearest(key, keys)}" + f" (+{key}=... adds a new one)"


def _all_keys(node: Any, path: str = "") -> list[str]:
    if not isinstance(node, DictConfig) or node._is_none():
        return []
    keys = []
    for key in node:
        full_key = f"{path}.{key!s}".lstrip(".")
        keys += [full_key, *_all_keys(node._get_node(key), full_key)]
    return keys
