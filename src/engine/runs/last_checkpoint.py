"""The checkpoint that a run goes on from, and the signals that stop a run."""

import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import CombinedLoader

from src.engine.runs.checkpoint_io import is_plain
from src.engine.runs.processes import SIGNALS, is_child
from src.engine.runs.running_metrics import collect_means, collect_metrics, restore_means, restore_metrics

log = logging.getLogger(__name__)

STATEFUL = ("state_dict", "load_state_dict")


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt``, from which a run goes on as if it had not stopped, to the bit.

    It is written when a step or an epoch is over with all that belongs to it. Lightning's hooks come earlier: what is
    logged behind them would be missing from the curves, and ReduceLROnPlateau would miss a step. So it is written

    - at the end of every epoch, behind its validation,
    - every ``every_n_steps`` optimizer steps,
    - by a signal, as Ctrl-C, SIGTERM or a terminal that is closed, after the current step (in an epoch's last step and
      in validation: after the epoch). The process then ends with 128 + signal; a second signal ends it at once,
    - by an exception in a training step, as of the step before.

    Beside Lightning's own, it holds every process's random states and running metrics, the latest metrics, and whether
    the run is to stop.

    Args:
        dirpath: Folder of ``last.ckpt``.
        every_n_steps: Optimizer steps between two of them within an epoch, 1 or more; None: at epochs' ends alone.
    """

    def __init__(self, dirpath: str, every_n_steps: int | None = None) -> None:
        self.path = Path(dirpath) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._loaded: dict[str, Any] = {}
        self._signum = 0  # the signal that has asked to stop
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}  # those that ours stand in for
        self._last_step = -1  # the optimizer steps of the last whole step
        self._in_step = False
        self._is_due = False  # a save that had to wait, since its step was validated
        self._cut: dict[str, Any] | None = None  # of a run that ends within an epoch: how that stood
        self._means: dict[str, list[torch.Tensor]] = {}  # to be added where each is logged again

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning leaves out; what each process has of its own in the order of the ranks."""
        own = self._cut or self._collect(trainer)
        processes = [own] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(processes, own)
        checkpoint["processes"] = processes
        checkpoint["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoint["should_stop"] = bool(trainer.should_stop)  # a callback may have set NumPy's
        checkpoint["in_step"] = self._in_step
        checkpoint["is_cut"] = self._cut is not None

    def _collect(self, trainer: pl.Trainer) -> dict[str, Any]:
        return {
            "random_states": _plain(_collect_rng_states()),
            "metrics": collect_metrics(trainer.lightning_module),
            "means": {**collect_means(trainer), **self._means},
            "fetched": [] if self._in_step else _collect_fetched(trainer),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep it all until training starts: what is set up meanwhile draws random numbers, too."""
        names = ("processes", "metrics", "in_step", "is_cut")
        self._loaded = {name: checkpoint[name] for name in names if name in checkpoint}
        self._loaded["loader_states"] = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        if trainer.state.fn == TrainerFn.FITTING and checkpoint.get("is_cut") and _is_longer(trainer, checkpoint):
            for progress in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():  # its epoch is not over
                progress["processed"] = progress["completed"] = progress["started"] - 1
        if trainer.state.fn == TrainerFn.FITTING and checkpoint.get("should_stop"):  # by early stopping, or pruned
            trainer.should_stop = not _is_longer(trainer, checkpoint)
            if not trainer.should_stop:
                for state in checkpoint["callbacks"].values():
                    if "wait_count" in state:
                        state["wait_count"] = 0
                _warn(trainer, "it had been stopped early; now it is to train longer, and early stopping waits anew")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over where the checkpoint was written, and stand by for signals."""
        _hook_in(trainer, self._end_step, self._end_epoch)
        self._last_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if callable(handler := signal.getsignal(signum)):  # the command's, or submitit's, which requeues a job
                    self._handlers[signum] = handler
                    signal.signal(signum, self._note)
        if trainer.fit_loop.is_resuming:
            self._continue(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the signals to those who had them."""
        self._give_signals_back()
        if self._signum:  # it came behind the last step
            signal.raise_signal(self._signum)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save what was learned up to the step that has failed; another process may be gone, and a save needs all."""
        self._give_signals_back()
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        is_within_step = trainer.training and progress.current.processed < progress.current.ready
        # Weights that the failed step has changed may not be worth it; of gradients, a checkpoint holds none.
        is_unchanged = trainer.global_step == self._last_step and trainer.accumulate_grad_batches == 1
        is_alone = trainer.world_size == 1 and isinstance(exception, Exception)
        if is_alone and is_within_step and is_unchanged and _undo_fetch(trainer):
            self._in_step = True
            self._save(trainer)

    def _end_step(self, trainer: pl.Trainer, is_validated: bool) -> None:
        """Behind each training step: save where it is due, stop where a signal has asked for it."""
        loop = trainer.fit_loop.epoch_loop
        last_step, self._last_step = self._last_step, trainer.global_step
        if self._means:
            self._means = restore_means(trainer, self._means)
        signum = self._agree(trainer)
        is_cut = loop.done and not loop.batch_progress.is_last_batch  # by max_steps, or by early stopping
        self._cut = self._collect(trainer) if is_cut else None
        # Of several steps a batch, as in manual optimization, the due one may have been among the first.
        every = self.every_n_steps or sys.maxsize
        self._is_due |= trainer.global_step // every > last_step // every
        # With gradients half gathered, or just validated, Lightning would not resume from here exactly.
        if loop.done or trainer.global_step == last_step or is_validated:
            return
        if signum or self._is_due:
            self._save(trainer)
        if signum:
            self._stop(signum)

    def _end_epoch(self, trainer: pl.Trainer) -> None:
        signum = self._agree(trainer)
        if self._means:
            _warn(trainer, f"{', '.join(self._means)}: not logged since: the epoch's figure is missing")
            self._means = {}
        self._save(trainer)
        if signum:
            self._stop(signum)

    def _save(self, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # first, so that the curves never lack what the checkpoint holds
        trainer.save_checkpoint(self.path, weights_only=False)  # all of it, not the weights alone
        self._is_due = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum:
            self._handlers[signum](signum, frame)
        self._signum = signum

    def _agree(self, trainer: pl.Trainer) -> int:
        """The signal that any of the processes has been sent, for all of them: they stop behind the same step."""
        if trainer.world_size == 1:
            return self._signum
        signum = torch.tensor(self._signum, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX)
        return int(signum)

    def _stop(self, signum: int) -> None:
        """End the process the way that the signal's own handler does."""
        self._signum = 0
        self._handlers[signum](signum, None)
        if is_child():  # its handler leaves it to the parent
            sys.exit(128 + signum)

    def _give_signals_back(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def _continue(self, trainer: pl.Trainer) -> None:
        loop = trainer.fit_loop
        total: Any = loop.epoch_progress.total
        processes = self._loaded.get("processes", [])
        is_in_epoch = total.processed < total.ready
        if loop._combined_loader_states_to_load:  # a schedule has asked for the run's steps too early (Lightning#20550)
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)  # type: ignore[arg-type]
        for name, value in self._loaded.get("metrics", {}).items():
            trainer._logger_connector._callback_metrics.setdefault(name, torch.tensor(value))
        is_lightnings = total.completed < total.processed  # written by a hook at an epoch's end, as best.ckpt
        if is_in_epoch:  # its end is to be as ever: Lightning would not let ReduceLROnPlateau step
            loop._restarting = False
            _count_as_loader(trainer)
            if self._loaded.get("is_cut") and loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
                loop.epoch_loop._batches_that_stepped -= (
                    1  # Lightning is about to pass by this validation, and counts it
                )
            if reason := _describe_restart(trainer):
                _warn(trainer, reason)
        else:  # nothing of the last epoch is left to do
            if is_lightnings:
                total.completed = total.processed
                loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            for each in (loop, loop.epoch_loop):
                each.restarting = False
                each.on_iteration_done()
        if self._loaded.get("in_step"):
            _warn(trainer, "an exception had ended the run within a step, which it repeats with other random numbers")
        if len(processes) == trainer.world_size:
            own = processes[trainer.global_rank]

            def set_back() -> None:
                if not is_lightnings:  # those of the last epoch, which Lightning was about to reset
                    restore_metrics(trainer.lightning_module, own["metrics"])
                _set_rng_states(_restorable(own["random_states"]))

            _call_after_start(trainer, set_back)
            if is_in_epoch:
                self._means = own["means"]
                if own.get("fetched"):
                    _refetch(trainer, own["fetched"], self._loaded["loader_states"])
                elif trainer.num_training_batches == float("inf") and not _describe_restart(trainer):
                    _warn(trainer, "the batch that was fetched ahead is not plain tensors, so it is left out")
            if (num_gpus := len(own["random_states"]["torch.cuda"])) != torch.cuda.device_count():
                _warn(
                    trainer,
                    f"GPUs in sight: the run had {num_gpus}, now {torch.cuda.device_count()}: "
                    "what draws random numbers on a GPU draws others",
                )
        else:
            _warn(
                trainer,
                f"trainer.devices, num_nodes: the run had {len(processes) or 'an unknown number of'} processes, now "
                f"{trainer.world_size}: each draws random numbers of its own",
            )
        self._loaded = {}


def _hook_in(
    trainer: pl.Trainer, end_step: Callable[[pl.Trainer, bool], None], end_epoch: Callable[[pl.Trainer], None]
) -> None:
    """Call functions behind each step and each epoch, where Lightning has no hook of its own."""
    epochs, steps = trainer.fit_loop, trainer.fit_loop.epoch_loop
    theirs_of_step, theirs_of_epoch = type(steps).on_advance_end, type(epochs).on_advance_end

    def after_step(data_fetcher: Any) -> None:
        is_validated = steps._should_check_val_fx(data_fetcher)
        theirs_of_step(steps, data_fetcher)
        end_step(trainer, is_validated)

    def after_epoch() -> None:
        theirs_of_epoch(epochs)
        end_epoch(trainer)

    steps.on_advance_end = after_step  # type: ignore[method-assign]
    epochs.on_advance_end = after_epoch  # type: ignore[method-assign]
    steps._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]  # the same by _agree


def _call_after_start(trainer: pl.Trainer, function: Callable[[], None]) -> None:
    """Call a function once, after the module's own ``on_train_start``, which may reset metrics and draw numbers."""
    loop = trainer.fit_loop

    def start_epoch() -> None:
        del loop.on_advance_start
        function()
        loop.on_advance_start()

    loop.on_advance_start = start_epoch  # type: ignore[method-assign]


def _is_longer(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> bool:
    """Whether the run is to have more epochs or steps than it was to have when it wrote the checkpoint."""
    before = checkpoint.get("config", {}).get("trainer", {})
    lengths = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
    return any(value != before[name] for name, value in lengths.items() if before.get(name) is not None)


def _undo_fetch(trainer: pl.Trainer) -> bool:
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


def _collect_fetched(trainer: pl.Trainer) -> list[Any]:
    """The batches that Lightning has fetched ahead of a loader without a length, whose state is after them."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    batches = [batch for batch, *_ in getattr(fetcher, "batches", [])]  # the rest counts from where a run resumes
    has_state = batches and all(hasattr(each, STATEFUL[0]) for each in fetcher.combined_loader.flattened)
    return batches if has_state and is_plain(batches) else []


def _refetch(trainer: pl.Trainer, batches: list[Any], states: list[dict[str, Any]]) -> None:
    """Put batches that were fetched ahead in their place: those after them are drawn by random numbers of later."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    fetcher.combined_loader._load_state_dicts(states)
    ahead, fetcher.prefetch_batches = fetcher.prefetch_batches, 0
    iter(fetcher)
    fetcher.prefetch_batches, fetcher.batches = ahead, [(batch, 0, 0) for batch in batches]


def _count_as_loader(trainer: pl.Trainer) -> None:
    """Begin at the batch at which the loader resumes: with another batch size than before, that is another one.

    Otherwise Lightning would end the epoch too early, or miss its validation. A loader says so by an attribute
    ``batches_done``: batches of its epoch, those before the resume included.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    shift = getattr(trainer.train_dataloader, "batches_done", progress.ready) - progress.ready
    for name in ("ready", "started", "processed", "completed"):
        setattr(progress, name, getattr(progress, name) + shift)


def _describe_restart(trainer: pl.Trainer) -> str:
    """What comes of train loaders without a state, which start anew within an epoch; empty if all have one."""
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    without = [loader for loader in loaders if not all(hasattr(loader, name) for name in STATEFUL)]
    if not without:
        return ""
    done, total = trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer.num_training_batches
    sizes = [getattr(loader, "batch_size", None) or 0 for loader in without]
    samples = f" ({done * trainer.world_size * sum(sizes):,} samples)" if all(sizes) else ""
    return (
        f"the train loader has no state_dict: after {done:,} batches{samples}"
        + (f" of the epoch's {total:,}" if isinstance(total, int) else "")
        + " it starts anew, and may give these once more and leave out others; one with state_dict and load_state_dict "
        "resumes where it was (torchdata's StatefulDataLoader has both)"
    )


def _warn(trainer: pl.Trainer, reason: str) -> None:
    if trainer.is_global_zero:
        log.warning(f"not an exact continuation: {reason}")


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Without NumPy's array, which a checkpoint under weights_only must not hold."""
    name, keys, *rest = state["numpy"]
    return {**state, "numpy": (name, keys.tolist(), *rest)}


def _restorable(state: dict[str, Any]) -> dict[str, Any]:
    name, keys, *rest = state["numpy"]
    state = {**state, "numpy": (name, np.array(keys, np.uint32), *rest)}
    if len(state["torch.cuda"]) != torch.cuda.device_count():  # another machine's
        del state["torch.cuda"]
    return state
