"""What Lightning leaves out of a checkpoint, and how a run takes it up again: at the same batch, to the bit."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states
from pytorch_lightning import Trainer
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor

from src.engine.runs.checkpoint_io import is_plain
from src.engine.runs.running_metrics import collect_means, collect_metrics, restore_metrics

log = logging.getLogger(__name__)

STATEFUL = ("state_dict", "load_state_dict")


def collect(trainer: Trainer, means: dict[str, list[Tensor]], in_step: bool = False) -> dict[str, Any]:
    """What this process has of its own: random states, running metrics, batches that were fetched ahead.

    Args:
        trainer: The run's.
        means: Running means that are to be added yet.
        in_step: Whether a step has failed, so that it is repeated.
    """
    states = _collect_rng_states()
    name, keys, *rest = states["numpy"]
    fetcher: Any = trainer.fit_loop._data_fetcher
    # Those of a loader without a length, whose state is after them. The rest of each counts from where a run resumes.
    fetched = [] if in_step else [batch for batch, *_ in getattr(fetcher, "batches", [])]
    has_state = fetched and all(hasattr(each, STATEFUL[0]) for each in fetcher.combined_loader.flattened)
    return {
        "random_states": {**states, "numpy": (name, keys.tolist(), *rest)},  # weights_only takes no NumPy
        "metrics": collect_metrics(trainer.lightning_module),
        "means": {**collect_means(trainer), **means},
        "fetched": fetched if has_state and is_plain(fetched) else [],
    }


def prepare(trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Have a run that is to be longer than it was train on where it had ended, and return what ``resume`` needs."""
    before = checkpoint.get("config", {}).get("trainer", {})
    lengths = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
    is_longer = any(value != before[name] for name, value in lengths.items() if before.get(name) is not None)
    fit_loop = checkpoint["loops"]["fit_loop"]
    if checkpoint.get("is_cut") and is_longer:
        for progress in fit_loop["epoch_progress"].values():  # its epoch is not over
            progress["processed"] = progress["completed"] = progress["started"] - 1
    if checkpoint.get("should_stop"):  # by early stopping, or pruned
        trainer.should_stop = not is_longer
        if is_longer:
            for state in checkpoint["callbacks"].values():
                if "wait_count" in state:
                    state["wait_count"] = 0
            warn(trainer, "it had been stopped early; now it is to train longer, and early stopping waits anew")
    loaded = {name: checkpoint.get(name) for name in ("processes", "in_step", "is_cut")}
    return {**loaded, "loader_states": fit_loop["state_dict"].get("combined_loader", [])}


def resume(trainer: Trainer, loaded: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Take over where a checkpoint was written, and warn of what is not exact.

    Args:
        trainer: At the start of its training.
        loaded: What ``prepare`` has returned; nothing of a checkpoint without callbacks' states.

    Returns:
        Running means, to be added where each is logged again.
    """
    loop, steps = trainer.fit_loop, trainer.fit_loop.epoch_loop
    total: Any = loop.epoch_progress.total
    is_in_epoch = total.processed < total.ready
    is_lightnings = total.completed < total.processed  # written by a hook at an epoch's end, as best.ckpt
    if loop._combined_loader_states_to_load:  # a schedule has asked for the run's steps too early (Lightning#20550)
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)  # type: ignore[arg-type]
    if is_in_epoch:  # its end is to be as ever: Lightning would not let ReduceLROnPlateau step
        loop._restarting = False
        _count_as_loader(trainer)
        if loaded.get("is_cut") and steps._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
            steps._batches_that_stepped -= 1  # Lightning is about to pass by this validation, and counts it
    else:  # nothing of the last epoch is left to do
        if is_lightnings:
            total.completed = total.processed
            steps.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        for each in (loop, steps):
            each.restarting = False
            each.on_iteration_done()
    if every := trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        # Lightning counts from this start; loaders are to be made anew where the run would have made them.
        loop._last_train_dl_reload_epoch = (trainer.current_epoch - (not is_in_epoch)) // every * every
    if restart := _describe_restart(trainer) if is_in_epoch else "":
        warn(trainer, restart)
    if loaded.get("in_step"):
        warn(trainer, "an exception had ended the run within a step, which it repeats with other random numbers")
    processes = loaded.get("processes") or []
    if len(processes) != trainer.world_size:
        was = f"trainer.devices, num_nodes: the run had {len(processes) or 'an unknown number of'} processes"
        warn(trainer, f"{was}, now {trainer.world_size}: each draws random numbers of its own")
        return {}
    own = processes[trainer.global_rank]

    def set_back() -> None:
        if not is_lightnings:  # those of the last epoch, which Lightning was about to reset
            restore_metrics(trainer.lightning_module, own["metrics"])
        _set_random_states(own["random_states"])

    _call_after_start(trainer, set_back)
    if is_in_epoch and own.get("fetched"):
        _refetch(trainer, own["fetched"], loaded["loader_states"])
    elif is_in_epoch and trainer.num_training_batches == float("inf") and not restart:
        warn(trainer, "the batch that was fetched ahead is not plain tensors, so it is left out")
    if (before := len(own["random_states"]["torch.cuda"])) != (now := torch.cuda.device_count()):
        warn(trainer, f"GPUs in sight: the run had {before}, now {now}: they draw other random numbers")
    return own["means"] if is_in_epoch else {}


def _set_random_states(states: dict[str, Any]) -> None:
    name, keys, *rest = states["numpy"]
    states = {**states, "numpy": (name, np.array(keys, np.uint32), *rest)}
    if len(states["torch.cuda"]) != torch.cuda.device_count():  # another machine's
        del states["torch.cuda"]
    _set_rng_states(states)


def _call_after_start(trainer: Trainer, function: Callable[[], None]) -> None:
    """Call a function once, after the module's own ``on_train_start``, which may reset metrics and draw numbers."""
    loop = trainer.fit_loop

    def start_epoch() -> None:
        del loop.on_advance_start
        function()
        loop.on_advance_start()

    loop.on_advance_start = start_epoch  # type: ignore[method-assign]


def undo_fetch(trainer: Trainer) -> bool:
    """Count the batch whose step has failed as not yet seen; whether that can be.

    A loader with a state must be able to step back, by a method ``rewind(num_batches)``: to after so many of its epoch.
    """
    loader: Any = trainer.train_dataloader
    if hasattr(loader, "state_dict") and not hasattr(loader, "rewind"):
        return False
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    for part in (progress.current, progress.total):
        part.ready = part.started = part.processed = part.completed
    if hasattr(loader, "rewind"):
        loader.rewind(progress.current.completed)
    return True


def _refetch(trainer: Trainer, batches: list[Any], states: list[dict[str, Any]]) -> None:
    """Put batches that were fetched ahead in their place: those after them are drawn by random numbers of later."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    fetcher.combined_loader._load_state_dicts(states)
    ahead, fetcher.prefetch_batches = fetcher.prefetch_batches, 0
    iter(fetcher)
    fetcher.prefetch_batches, fetcher.batches = ahead, [(batch, 0, 0) for batch in batches]


def _count_as_loader(trainer: Trainer) -> None:
    """Begin at the batch at which the loader resumes: with another batch size than before, that is another one.

    Otherwise Lightning would end the epoch too early, or miss its validation. A loader says so by an attribute
    ``batches_done``: batches of its epoch, those before the resume included.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    shift = getattr(trainer.train_dataloader, "batches_done", progress.ready) - progress.ready
    for name in ("ready", "started", "processed", "completed"):
        setattr(progress, name, getattr(progress, name) + shift)


def _describe_restart(trainer: Trainer) -> str:
    """What comes of train loaders without a state, which start anew within an epoch; empty if all have one."""
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    without = [loader for loader in loaders if not all(hasattr(loader, name) for name in STATEFUL)]
    if not without:
        return ""
    done, total = trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer.num_training_batches
    sizes = [getattr(loader, "batch_size", None) or 0 for loader in without]
    samples = f" ({done * trainer.world_size * sum(sizes):,} samples)" if all(sizes) else ""
    whole = f" of the epoch's {total:,}" if isinstance(total, int) else ""
    said = f"the train loader has no state_dict: after {done:,} batches{samples}{whole} it starts anew"
    return f"{said}, so it may repeat some and leave out others; torchdata's StatefulDataLoader has one"


def warn(trainer: Trainer, reason: str) -> None:
    """Say, once for all processes, what makes a continuation inexact."""
    if trainer.is_global_zero:
        log.warning(f"not an exact continuation: {reason}")
