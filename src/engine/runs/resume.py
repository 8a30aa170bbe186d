"""``resume=<run's folder>``: resume a run where its last checkpoint left off."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import OverrideParseException
from omegaconf import DictConfig

from src.engine.errors import CheckpointError, ConfigError
from src.engine.runs.checkpoints import find_checkpoint
from src.engine.runs.processes import get_name, is_requeued
from src.engine.runs.report import listed, shown
from src.engine.runs.status import read_status, repeat_start

log = logging.getLogger(__name__)

LATEST = "latest"
# What a checkpoint's states go before: another value would be without effect, or would not fit.
KEPT = ("model", "optimizer", "optimizer_groups", "scheduler")
# What says where a run is and what becomes of it, not how it trains.
BESIDE = (
    "resume", "ckpt_path", "root_dir", "output_dir", "paths", "task_name", "tags", "train", "test", "unit", "init",
)  # fmt: skip
LENGTHS = ("trainer.max_epochs", "trainer.max_steps")
# What decides how many steps there are, for which some schedules are made.
OF_LENGTH = (
    "trainer.limit_train_batches", "trainer.overfit_batches", "trainer.accumulate_grad_batches", "data.name",
    "data.source", "data.batch_size", "data.train_size", "data.val_size",
)  # fmt: skip


def expand(arguments: Sequence[str]) -> list[str]:
    """Replace ``resume=<folder>`` by how the run was started, its folder and its newest whole checkpoint.

    Args:
        arguments: Those of ``python -m src.train``.

    Returns:
        Arguments that resume the run; what else was given overrides what it was started with.

    Raises:
        ConfigError: If there is no such run, it has finished, or its checkpoints are all damaged.
    """
    asked = [argument for argument in arguments if _key(argument) == "resume"]
    try:
        value = OverridesParser.create().parse_override(asked[-1]).value() if asked else None
    except OverrideParseException:
        value = None  # Hydra will say what is wrong with it
    if value is None:
        return list(arguments)
    flags = [argument for argument in arguments if not _key(argument)]
    own = [argument for argument in arguments if _key(argument) not in ("", "resume")]
    if {"-m", "--multirun"} & set(flags):
        raise ConfigError(f"resume={value}: resumes one run; a sweep resumes by its own command with hydra.sweep.dir")
    for override in own:
        if _key(override) in ("ckpt_path", "hydra.run.dir"):
            raise ConfigError(f"{override}: resume={value} chooses this itself; leave one of the two out")
    folder = _find_run(str(value)).resolve()
    status = read_status(folder)
    if status["state"] == "finished" and not own:
        raise ConfigError(f"resume={value}: this run has finished; to train longer, add trainer.max_epochs=<more>")
    places = {"resume": folder, "hydra.run.dir": folder, "ckpt_path": find_checkpoint(folder)}
    named = [f"{key}={quoted(path)}" for key, path in places.items() if path]
    return [*flags, *repeat_start(status), *own, *named]


def _key(argument: str) -> str:
    """The key that an argument sets, adds or deletes; empty for Hydra's own flags and their values."""
    if argument.startswith("-") or not ("=" in argument or argument.startswith("~")):
        return ""
    return argument.partition("=")[0].lstrip("+~")


def _can_go_on(folder: Path) -> bool:
    return {"state", "overrides", "config_dirs"} <= read_status(folder).keys()


def _find_run(value: str) -> Path:
    if value == LATEST:
        logs = Path(os.environ["PROJECT_ROOT"]) / "logs"
        found = [path.parent for path in logs.glob("**/status.json") if _can_go_on(path.parent)]
        if not found:
            raise ConfigError(f"resume=latest: no run below {logs}: train first (python -m src.train)")
        return max(found, key=lambda folder: str(read_status(folder).get("since")))
    folder = Path(value)
    if not folder.is_dir():
        raise ConfigError(f"resume={value}: no such folder; expected a run's, logs/train/<date_time>, or latest")
    if (folder / "sweep.json").is_file():
        raise ConfigError(f"resume={value}: a sweep's folder; repeat its command with hydra.sweep.dir={value}")
    if not _can_go_on(folder):
        reason = "no run's folder: its status.json does not say how it was started"
        raise ConfigError(f"resume={value}: {reason}; ckpt_path=<checkpoint> resumes in a new folder")
    return folder


def find_first_step(cfg: DictConfig, asked: Mapping[str, Any], checkpoint: Mapping[str, Any] | None) -> int | None:
    """Where a run resumes; what differs from the run so far is warned of, or rejected.

    Args:
        cfg: Its config.
        asked: The same, resolved and plain.
        checkpoint: What ``cfg.ckpt_path`` holds; None without one.

    Returns:
        The step that comes next, 0 for a run that has not come to its first checkpoint, or None for a new run.

    Raises:
        CheckpointError: If the checkpoint holds weights only.
        ConfigError: If a difference would be without effect, or would not make sense.
    """
    if checkpoint is None:
        return 0 if cfg.get("resume") or is_requeued() else None
    if "loops" not in checkpoint or "optimizer_states" not in checkpoint:
        reason = "holds weights only, nothing to resume from"
        raise CheckpointError(f"ckpt_path={cfg.ckpt_path}: {reason}; choose a run's last.ckpt")
    fit_loop = checkpoint["loops"]["fit_loop"]
    first_step: int = fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"]
    begun = fit_loop["epoch_progress"]["current"]["ready"]
    for key, done in {"max_epochs": begun, "max_steps": checkpoint["global_step"]}.items():
        if 0 <= (length := (asked.get("trainer") or {}).get(key) or -1) < done:
            raise ConfigError(f"trainer.{key}={length}: the run so far has come to its {key[4:-1]} {done}; choose more")
    check_difference(checkpoint["config"], asked)
    if not get_name():
        log.info(f"resuming from {shown(cfg.ckpt_path)}, step {first_step}")
    return first_step


def check_difference(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Compare the config of a checkpoint with that of the run that resumes from it, and warn of what differs.

    Args:
        stored: The checkpoint's config, plain.
        asked: The new one, plain.

    Raises:
        ConfigError: If a difference would be without effect, or would not make sense.
    """
    changed = _find_differences(stored, asked)
    schedule = (stored.get("scheduler") or {}).get("scheduler") or {}
    bound: tuple[str, ...] = ()  # what the schedule is made for
    if schedule.get("total_steps", 0) is None:
        bound = (*LENGTHS, *OF_LENGTH)
    elif [key for key in changed if key.startswith("scheduler.")] == ["scheduler.scheduler.T_max"]:  # a cosine's
        bound = LENGTHS
    before, now = ((config.get("init") or {}).get("weights") for config in (stored, asked))
    if now not in (None, before):
        raise ConfigError(f"init.weights={now}: a run that resumes has its checkpoint's weights; start a new run")
    for key in filter(changed.__contains__, (*bound, *changed)):
        before, now = changed[key]
        said = f"{key}={now}: the run so far has {before}"
        if key in bound:
            name = schedule["_target_"].split(".")[-1]
            raise ConfigError(f"{said}, and its schedule, {name}, is made for those steps; start a new run")
        if key.partition(".")[0] in KEPT:
            raise ConfigError(f"{said}, which its checkpoint keeps; leave it so, or start a new run")
    if changed:
        log.warning(f"not an exact continuation: the config differs: {describe_differences(stored, asked)}")


def describe_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs between two runs' configs, but for what tells where a run is; empty if nothing does."""
    return listed([f"{key}: {before} -> {now}" for key, (before, now) in _find_differences(one, other).items()])


def _find_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    old, new = dict(leaves(one)), dict(leaves(other))
    pairs = {key: (old.get(key), new.get(key)) for key in old | new if key.partition(".")[0] not in BESIDE}
    folders = [str(config.get("output_dir")) for config in (one, other)]
    return {
        key: pair
        for key, pair in pairs.items()
        if len({str(value).replace(folder, "") for value, folder in zip(pair, folders, strict=True)}) > 1
    }


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values of a nested config, by their full keys; lists are values."""
    if isinstance(node, Mapping) and node:
        for key, child in node.items():
            yield from leaves(child, f"{path}.{key}".lstrip("."))
    else:
        yield path, node


def quoted(value: object) -> str:
    """A text in the quotes that Hydra's overrides need around = and commas."""
    return QuotedString(str(value), Quote.single).with_quotes()
