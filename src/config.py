"""What every command does before torch is imported: check its config, claim its folder, say errors in short."""

import difflib
import logging
import os
import re
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
FULL_ERROR = "HYDRA_FULL_ERROR"
_asked_full_error = ""  # what the user has set it to


class ConfigError(ValueError):
    """A setting that cannot be; the message names the key, the value and what was expected."""


class CheckpointError(Exception):
    """A file that is no checkpoint of this template, or a damaged one; the message names it."""


# ---------------------------------------------------------------------------------------------------------------------
# Which values make sense. Checked here, in milliseconds, since the classes that take them need seconds to import.


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _int(minimum: int) -> Rule:
    return Rule(f"a whole number of {minimum} or more", lambda v: _is_int(v) and v >= minimum)


def _between(low: float, high: float) -> Rule:
    return Rule(f"a number from {low} to {high}", lambda v: _is_number(v) and low <= v <= high)


def _one_of(*options: Any) -> Rule:
    return Rule(f"one of {', '.join(str(option) for option in options)}", lambda v: v in options)


def _or_null(rule: Rule) -> Rule:
    return Rule(f"{rule.expected}, or null", lambda v: v is None or rule.holds(v))


FLAG = Rule("true or false", lambda v: isinstance(v, bool))
TEXT = Rule("text", lambda v: isinstance(v, str) and v != "")
POSITIVE = Rule("a number above 0", lambda v: _is_number(v) and 0 < v < float("inf"))
NOT_NEGATIVE = Rule("a number of 0 or more", lambda v: _is_number(v) and 0 <= v < float("inf"))
SHARE = Rule(
    "a whole number of 0 or more, or a share from 0.0 to 1.0",
    lambda v: v >= 0 if _is_int(v) else _is_number(v) and 0 <= v <= 1,
)
BETAS = Rule(
    "two numbers from 0 up to, not including, 1",
    lambda v: isinstance(v, list) and len(v) == 2 and all(_is_number(b) and 0 <= b < 1 for b in v),
)
SEED = Rule("a whole number from 0 to 4294967295", lambda v: _is_int(v) and 0 <= v < 2**32)

# By the beginning of a node's `_target_`; "" is the top of the config. Keys that are not there are not checked.
RULES: dict[str, dict[str, Rule]] = {
    "": {"seed": SEED, "test": FLAG, "ckpt_path": _or_null(TEXT)},
    "src.data.mnist.": {
        "root": TEXT,
        "name": TEXT,
        "source": _one_of("auto", "files", "download", "package"),
        "timeout": POSITIVE,
        "batch_size": _int(1),
        "eval_batch_size": _int(1),
        "val_size": Rule("a whole number from 1 to 59999", lambda v: _is_int(v) and 1 <= v <= 59999),
        "split_seed": SEED,
        "seed": SEED,
        "augment": _one_of("none", "affine"),
    },
    "src.models.lenet5.": {
        "num_classes": _int(1),
        "in_channels": _int(1),
        "activation": _one_of("tanh", "relu"),
        "pooling": _one_of("avg", "max"),
    },
    "src.classifier.": {"num_classes": _int(1)},
    "torch.optim.lr_scheduler.": {
        "max_lr": POSITIVE,
        "total_steps": _or_null(_int(1)),
        "pct_start": _between(0, 1),
        "T_max": _int(1),
        "eta_min": NOT_NEGATIVE,
        "step_size": _int(1),
        "gamma": POSITIVE,
        "factor": _between(0, 1),
        "patience": _int(0),
    },
    "torch.optim.": {
        "lr": POSITIVE,
        "betas": BETAS,
        "eps": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
        "momentum": NOT_NEGATIVE,
        "nesterov": FLAG,
        "fused": _or_null(FLAG),
    },
    "pytorch_lightning.Trainer": {
        "accelerator": _one_of("auto", "cpu", "gpu", "mps", "cuda", "tpu"),
        "devices": Rule(
            "auto, a number of devices, or a list of their indices",
            lambda v: v >= 1 or v == -1 if _is_int(v) else isinstance(v, list | str) and len(v) > 0,
        ),
        "max_epochs": _int(1),
        "check_val_every_n_epoch": _int(1),
        "log_every_n_steps": _int(1),
        "accumulate_grad_batches": _int(1),
        "gradient_clip_val": _or_null(POSITIVE),
        "deterministic": FLAG,
        "num_sanity_val_steps": _int(-1),
        "limit_train_batches": _or_null(SHARE),
        "limit_val_batches": _or_null(SHARE),
        "limit_test_batches": _or_null(SHARE),
        "overfit_batches": _or_null(SHARE),
    },
}

REQUIRED_NODES = ("data", "model", "optimizer", "trainer")  # each builds one object, where a command trains
NODES_BY_NAME = ("callbacks", "logger")  # each holds named nodes


def check(cfg: DictConfig) -> None:
    """Check a command's config, resolved and whole.

    Raises:
        ConfigError: At the first value that cannot be.
        CheckpointError: If ``ckpt_path`` is no checkpoint.
    """
    try:
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error
    assert isinstance(config, dict)
    if "trainer" in config:
        for name in REQUIRED_NODES:
            _require_target(name, config.get(name))
    for name in NODES_BY_NAME:
        for key, node in (config.get(name) or {}).items():
            if node is not None:
                _require_target(f"{name}.{key}", node)
    _check_node("", config)
    if config.get("ckpt_path"):
        check_checkpoint(config["ckpt_path"])
    _check_accelerator(config.get("trainer", config).get("accelerator"))


def _require_target(key: str, node: Any) -> None:
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        found = ", ".join(map(str, node)) if isinstance(node, dict) else node
        raise ConfigError(f"{key}: expected a node with a _target_, the class to build; found {found}")


def _check_node(path: str, node: Any) -> None:
    """Apply the rules of the node's target, then go down into it."""
    if isinstance(node, list):
        for index, child in enumerate(node):
            _check_node(f"{path}[{index}]", child)
    if not isinstance(node, dict):
        return
    target = node.get("_target_", "") if path else ""
    prefix = next((prefix for prefix in RULES if prefix and target.startswith(prefix)), "" if not path else None)
    for key, value in node.items():
        full_key = f"{path}.{key}" if path else str(key)
        rule = RULES[prefix].get(key) if prefix is not None else None
        if rule and not rule.holds(value):
            raise ConfigError(f"{full_key}={value}: expected {rule.expected}")
        _check_node(full_key, value)


def check_checkpoint(path: str | Path) -> None:
    """Check that a checkpoint is there and is one, as far as can be told without torch.

    Raises:
        CheckpointError: If it is not.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"ckpt_path={path}: no such file; runs keep theirs in logs/train/<run>/checkpoints/")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"ckpt_path={path}: not a checkpoint, or a truncated one; choose another file")


def _check_accelerator(accelerator: str | None) -> None:
    """Look for the device; torch is imported only when one is asked for, as the run will need it anyway."""
    if accelerator in ("gpu", "cuda", "mps"):
        import torch

        has_mps = torch.backends.mps.is_available()
        if accelerator == "mps" and not has_mps:
            raise ConfigError("accelerator=mps: needs a Mac with Apple silicon; use trainer=cpu or trainer=gpu")
        if not (torch.cuda.is_available() or (has_mps and accelerator != "cuda")):
            raise ConfigError(f"accelerator={accelerator}: torch finds no GPU; use trainer=cpu or mend the driver")


# ---------------------------------------------------------------------------------------------------------------------
# Before the run.


class Preflight(Callback):
    """Hydra's callback ahead of a run: rejects a bad config before its folder is made, then claims the folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the config and claim ``hydra.run.dir``; ends the command where that fails."""
        _restore_full_error()
        try:
            job = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
            job.output_dir = config.hydra.run.dir
            check(job)
            folder = Path(config.hydra.run.dir)
            if any(override.startswith("hydra.run.dir=") for override in config.hydra.overrides.hydra):
                folder.mkdir(parents=True, exist_ok=True)  # named by the user, it may be there: another rank's, say
            else:
                config.hydra.run.dir = str(_claim(folder))
        except Exception as error:  # Hydra turns an Exception in a callback into a warning
            if os.environ.get(FULL_ERROR) == "1":
                traceback.print_exc()
            sys.exit(explain(error))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Each job of a sweep is checked when it starts."""
        _restore_full_error()


def _claim(folder: Path) -> Path:
    """Make a folder that no other run has, even one started in the same second: name, name_2, name_3..."""
    for number in range(1, 1000):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise FileExistsError(f"{folder} and 999 more are taken")


# ---------------------------------------------------------------------------------------------------------------------
# Errors: a line or two for what the user can mend; the stack trace goes to the log, or to who asks for it.


def run(main: Callable[[], Any], config_name: str) -> None:
    """Run a command that ``hydra.main`` decorates; errors of composition are said in short, with exit status 1.

    Args:
        main: The decorated function.
        config_name: Its root in ``conf/``, where misspelt keys are looked up.
    """
    global _asked_full_error
    # Lightning 2.6 calls what torch 2.15 has deprecated; nothing that a user could mend.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    os.environ.setdefault("PROJECT_ROOT", str(ROOT))
    _asked_full_error = os.environ.get(FULL_ERROR, "")
    os.environ[FULL_ERROR] = "1"  # Hydra then raises what it would print over many lines
    try:
        main()
    except Exception as error:
        if _asked_full_error == "1":
            raise
        sys.exit(explain(error, config_name))


def _restore_full_error() -> None:
    """The config is composed: what the job starts shall see what the user has set."""
    os.environ[FULL_ERROR] = _asked_full_error


@contextmanager
def short_errors() -> Iterator[None]:
    """Within a job: log an error in short, its trace to the log file alone, and end with exit status 1.

    In a sweep the error goes on to the launcher, so that the other jobs run.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        logging.raiseExceptions = False  # a log that cannot be written, on a full disk, shall not hide the error
        log.debug("stack trace of the error that follows", exc_info=error)
        log.error(explain(error))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        sys.exit(1)


def explain(error: BaseException, config_name: str = "") -> str:
    """Say an error in one or two lines: the setting or file, the value, what was expected, the remedy."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"error: {group}={option}: no such file in conf/{group}/; {_nearest(option, error.options or ())}"
    if isinstance(error, ConfigCompositionException):
        return f"error: {_explain_composition(error, config_name)}"
    if isinstance(error, OmegaConfBaseException):
        return f"error: {error.full_key or 'config'}: {_first_line(error)}"
    if type(error).__name__ == "InstantiationException":
        # "Error in call to target 'torch.optim.Adam':\nTypeError(...)\nfull_key: optimizer"
        key = re.search(r"full_key: (\S+)", str(error))
        cause = error.__cause__ or error
        return f"error: {key.group(1) if key else 'config'}: {_first_line(cause)}"
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        return f"error:{where}: {error.strerror}; mend that or choose another folder with hydra.run.dir=<folder>"
    if isinstance(error, HydraException | ValueError | OSError) or type(error).__module__.startswith("src."):
        return f"error: {' '.join(str(error).split())}"
    frame = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" ({Path(frame.filename).name}, line {frame.lineno})" if frame else ""
    return (
        f"error: {type(error).__name__}: {_first_line(error)}{where}\n"
        f"The stack trace is in the run's log; {FULL_ERROR}=1 prints it."
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _nearest(name: str, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
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
    return f"{key}: no such key; {_nearest(key, _all_keys(cfg))}" + f" (+{key}=... adds a new one)"


def _all_keys(node: Any, path: str = "") -> list[str]:
    if not isinstance(node, DictConfig) or node._is_none():
        return []
    keys = []
    for key in node:
        full_key = f"{path}.{key}" if path else str(key)
        keys += [full_key, *_all_keys(node._get_node(key), full_key)]
    return keys
