"""What is only known with data is found before the first epoch, by Lightning's sanity check of one validation batch."""

import difflib
import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from src.engine.errors import ConfigError
from src.engine.runs.checkpoint_io import is_plain

log = logging.getLogger(__name__)

OF_VALIDATION = re.compile(r"(val|valid|validation|test)[/_.-]")  # the beginning of what training does not log
BETWEEN = ("every_n_train_steps", "train_time_interval")  # when ModelCheckpoint saves, if not after a validation
LOW = re.compile(r"(loss|error|mae|mse|nll|perplexity|rmse)(_epoch|_step|/dataloader_idx_\d+)?$")  # what is good if low
HIGH = re.compile(r"(acc|accuracy|auc|auroc|f1|iou|precision|recall)(_epoch|_step|/dataloader_idx_\d+)?$")
BEGINNING = re.compile(r".*?[/_.-]")
PARTS = frozenset(vars(nn.Module()))  # what every module has: its parts and its mode are kept by other means


def is_tested(test: bool | str, module: LightningModule, datamodule: Any = None, is_fresh: bool = False) -> bool | str:
    """Whether a run is to be tested: ``test``, or False where something is missing for that, which is logged.

    Args:
        test: What the config says.
        module: The module.
        datamodule: Its data; None: the module has the loaders.
        is_fresh: Whether it is neither trained nor read from a checkpoint, which is logged, too.
    """
    if is_fresh:
        log.warning("train=false without ckpt_path: tests the weights that the module starts with")
    if test and (missing := missing_for_test(module, datamodule)):
        log.warning(f"test=false: {missing}")
        return False
    return test


def missing_for_test(module: LightningModule, datamodule: Any) -> str:
    """What a test needs and is not there, in words; empty if nothing is missing."""
    source = module if datamodule is None else datamodule  # which may be a loader itself
    has_loaders = isinstance(source, LightningModule | LightningDataModule)
    for owner, name in ((module, "test_step"), *(((source, "test_dataloader"),) if has_loaders else ())):
        if not is_overridden(name, owner):
            return f"{type(owner).__name__} has no {name}"
    return ""


class Rehearsal(Callback):
    """Refuses, before the first step, to wait for a metric that validation does not log.

    It looks at what a batch of validation logs: ``trainer.num_sanity_val_steps`` says how many. Lightning keeps the
    random states meanwhile, and this callback the module's own: buffers, metrics, plain attributes. A metric that
    begins in another way than those of validation may be one of training: that is known after the first batch.

    Args:
        config: The run's config, plain; errors name its keys.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self._kept: list[tuple[nn.Module, dict[str, bytes]]] = []
        # Each metric that training may log, what is wrong if not, and whether it is like one of validation.
        self._awaited: dict[str, tuple[str, bool]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where there is no validation, nothing may wait for it but checkpoints: the last is kept.

        Warns of the highest loss, or the lowest accuracy, as the best, and of weights with another step's validation.

        Raises:
            ConfigError: If something does.
        """
        modes = {(monitor, key.replace("monitor", "mode"), _mode(who)) for key, monitor, who in self._monitors(trainer)}
        for monitor, key, mode in sorted(modes) if trainer.is_global_zero else ():
            if (mode == "max" and LOW.search(monitor)) or (mode == "min" and HIGH.search(monitor)):
                end, other = ("highest", "min") if mode == "max" else ("lowest", "max")
                log.warning(f"{key}={mode}: takes the {end} {monitor} for the best; did you mean {key}={other}?")
        for name, node in (self.config.get("callbacks") or {}).items() if trainer.is_global_zero else ():
            given = [each for each in BETWEEN if node and node.get(each)]
            if given and OF_VALIDATION.match(monitor := str(node.get("monitor"))):
                said = f"callbacks.{name}.{given[0]}: ranks weights by the {monitor} of the validation before them"
                log.warning(f"{said}; leave it out and set trainer.val_check_interval to rank them by their own")
        for key, monitor, callback in [] if trainer.enable_validation else self._monitors(trainer):
            if OF_VALIDATION.match(monitor) and not isinstance(callback, Checkpoint):
                reason = "this run has no validation (limit_val_batches=0, no validation_step or no val_dataloader)"
                raise ConfigError(f"{key}={monitor}: {reason}; choose a metric of training, or leave out what waits")

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the state of the module."""
        for module in pl_module.modules():
            if isinstance(module, LazyModuleMixin):  # this batch makes its weights, which stay
                continue
            self._kept.append((module, {name: pickle.dumps(value) for name, value in _attributes(module).items()}))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its state back, and look at what was logged.

        Raises:
            ConfigError: If something waits for what was not, or not that often.
        """
        for module, kept in self._kept:
            _restore(module, kept)
        self._kept = []
        logged = sorted(_names(trainer))
        beginnings = tuple({match[0] for name in logged if (match := BEGINNING.match(name))})
        common = self.config.get("monitor")
        for key, monitor, callback in [*self._monitors(trainer), *([("monitor", common, None)] if common else [])]:
            if monitor in logged:
                continue
            close = [name for name in logged if BEGINNING.sub("", name, 1) == monitor]
            close = close or difflib.get_close_matches(monitor, logged, n=1)
            meant = f"did you mean {close[0]}?" if close else f"it logs {', '.join(logged) or 'nothing'}"
            off = f"; {key}=null keeps the last checkpoint" if isinstance(callback, Checkpoint | None) else ""
            said = f"{key}={monitor}: validation logs no such metric; {meant}{off}"
            if OF_VALIDATION.match(monitor) or monitor.startswith(beginnings):
                raise ConfigError(said)
            self._awaited.setdefault(monitor, (said, bool(close)))
        every: int = trainer.check_val_every_n_epoch or 1
        for scheduler in trainer.lr_scheduler_configs:
            is_waiting = scheduler.reduce_on_plateau and scheduler.strict and scheduler.monitor in logged
            if is_waiting and scheduler.interval == "epoch" and scheduler.frequency % every:
                said = f"scheduler.monitor={scheduler.monitor}: validation logs it every {every} epochs"
                raise ConfigError(f"{said}; set +scheduler.frequency={every}, or +scheduler.strict=false")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Look, once, for what may have been a metric of training; one that only a callback can still log is warned of.

        Raises:
            ConfigError: If the first batch has not logged it, and the module logs nothing at an epoch's end.
        """
        awaited, self._awaited = self._awaited, {}
        for monitor, (said, is_close) in awaited.items():
            if monitor in _names(trainer) or is_overridden("on_train_epoch_end", pl_module):
                continue
            if is_close:
                raise ConfigError(said)
            if trainer.is_global_zero:
                log.warning(f"{said}; unless a callback logs it, this run ends after its first validation")

    def _monitors(self, trainer: Trainer) -> Iterator[tuple[str, str, Any]]:
        """What callbacks and schedulers wait for, with its key and who does."""
        nodes = {name: node for name, node in (self.config.get("callbacks") or {}).items() if node}
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(monitor := getattr(callback, "monitor", None), str):
                keys = [f"callbacks.{name}.monitor" for name, node in nodes.items() if node.get("monitor") == monitor]
                is_common = monitor == self.config.get("monitor") or not keys
                yield "monitor" if is_common else keys[0], monitor, callback
        for scheduler in trainer.lr_scheduler_configs:
            if scheduler.reduce_on_plateau and scheduler.strict and scheduler.monitor:
                yield "scheduler.monitor", scheduler.monitor, scheduler


def _mode(waiting: Any) -> str:
    """The mode of what waits for a metric: a callback, or a scheduler in its configuration."""
    return str(getattr(getattr(waiting, "scheduler", waiting), "mode", ""))


def _names(trainer: Trainer) -> set[str]:
    """The metrics of an epoch so far; in its sanity check Lightning has those of several loaders in no public place."""
    results: Any = trainer._results
    names = [results._forked_name(each, False) for each in results.values() if each.meta.on_epoch]
    return {*trainer.callback_metrics}.union(*names)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What validation may change in a module itself: buffers, and attributes of plain values and tensors."""
    own = {name: value for name, value in vars(module).items() if name not in PARTS and is_plain(value)}
    return own | dict(module.named_buffers(recurse=False))


def _restore(module: nn.Module, kept: Mapping[str, bytes]) -> None:
    """Set back what has changed."""
    now = _attributes(module)
    for name in now.keys() - kept.keys():
        delattr(module, name)
    for name, content in kept.items():
        if name not in now or pickle.dumps(now[name]) != content:
            setattr(module, name, pickle.loads(content))
