"""The checkpoint that a run resumes from, and the signals that stop a run."""

import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from src.engine.runs import continuation
from src.engine.runs.processes import SIGNALS, is_child
from src.engine.runs.running_metrics import restore_means

log = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt``, from which a run resumes as if it had not stopped, to the bit.

    It is written when a step or an epoch is over with all that belongs to it. Lightning's hooks come earlier: what is
    logged after them would be missing from the curves, and ReduceLROnPlateau would miss a step. So it is written

    - at the end of every epoch, after its validation,
    - every ``every_n_steps`` optimizer steps,
    - by a signal, as Ctrl-C, SIGTERM or a terminal that is closed, after the current step (in an epoch's last step and
      in validation: after the epoch). The process then ends with 128 + signal; a second signal ends it at once,
    - by an exception in a training step, as of the step before.

    Beside Lightning's own, it holds every process's random states and running metrics, the latest metrics, and whether
    the run is to stop.

    Args:
        dirpath: Folder of ``last.ckpt``.
        every_n_steps: Optimizer steps between two of them within an epoch, 1 or more; None: only at epochs' ends.
    """

    def __init__(self, dirpath: str, every_n_steps: int | None = None) -> None:
        self.path = Path(dirpath) / "last.ckpt"
        self.every_n_steps = every_n_steps or sys.maxsize
        self._loaded: dict[str, Any] = {}
        self._signum = 0  # the signal that has asked to stop
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}  # those that ours stand in for
        self._last_step = -1  # the optimizer steps of the last whole step
        self._in_step = False
        self._is_due = False  # a save that had to wait, since its step was validated
        self._cut: dict[str, Any] | None = None  # of a run that ends within an epoch: how that stood
        self._means: dict[str, list[Tensor]] = {}  # to be added where each is logged again

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out; what each process has of its own in the order of the ranks."""
        own = self._cut or continuation.collect(trainer, self._means, self._in_step)
        processes = [own] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(processes, own)
        checkpoint |= {
            "processes": processes,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "should_stop": bool(trainer.should_stop),  # a callback may have set NumPy's
            "in_step": self._in_step,
            "is_cut": self._cut is not None,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep it all until training starts: what is set up meanwhile draws random numbers, too."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._loaded = continuation.prepare(trainer, checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over where the checkpoint was written, and stand by for signals."""
        _hook_in(trainer, self._end_step, self._end_epoch)
        self._last_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if callable(handler := signal.getsignal(signum)):  # the command's, or submitit's, which requeues a job
                    self._handlers[signum] = handler
                    signal.signal(signum, self._note)
        if trainer.fit_loop.is_resuming:
            self._means = continuation.resume(trainer, self._loaded)
        self._loaded = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the signals to those who had them."""
        self._give_signals_back()
        if self._signum:  # it came after the last step
            signal.raise_signal(self._signum)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what was learned up to the step that has failed; another process may be gone, and a save needs all."""
        self._give_signals_back()
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        is_within_step = trainer.training and progress.current.processed < progress.current.ready
        # Weights that the failed step has changed may not be worth it; of gradients, a checkpoint holds none.
        is_unchanged = trainer.global_step == self._last_step and trainer.accumulate_grad_batches == 1
        is_alone = trainer.world_size == 1 and isinstance(exception, Exception)
        if is_alone and is_within_step and is_unchanged and continuation.undo_fetch(trainer):
            self._in_step = True
            self._save(trainer)

    def _end_step(self, trainer: Trainer, is_validated: bool) -> None:
        """After each training step: save where it is due, stop where a signal has asked for it."""
        loop = trainer.fit_loop.epoch_loop
        last_step, self._last_step = self._last_step, trainer.global_step
        if self._means:
            self._means = restore_means(trainer, self._means)
        signum = self._agree(trainer)
        is_cut = loop.done and not loop.batch_progress.is_last_batch  # by max_steps, or by early stopping
        self._cut = continuation.collect(trainer, self._means) if is_cut else None
        # Of several steps a batch, as in manual optimization, the due one may have been among the first.
        self._is_due |= trainer.global_step // self.every_n_steps > last_step // self.every_n_steps
        # With gradients half gathered, or just validated, Lightning would not resume from here exactly.
        if not (loop.done or trainer.global_step == last_step or is_validated) and (signum or self._is_due):
            self._save(trainer)
            self._stop(signum)

    def _end_epoch(self, trainer: Trainer) -> None:
        signum = self._agree(trainer)
        if self._means:
            continuation.warn(trainer, f"{', '.join(self._means)}: not logged since: the epoch's figure is missing")
            self._means = {}
        self._save(trainer)
        self._stop(signum)

    def _save(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # first, so that the curves never lack what the checkpoint holds
        trainer.save_checkpoint(self.path, weights_only=False)  # all of it, not only the weights
        self._is_due = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum:
            self._handlers[signum](signum, frame)
        self._signum = signum

    def _agree(self, trainer: Trainer) -> int:
        """The signal that any of the processes has been sent, for all of them: they stop after the same step."""
        if trainer.world_size == 1:
            return self._signum
        signum = torch.tensor(self._signum, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX)
        return int(signum)

    def _stop(self, signum: int) -> None:
        """End the process the way that the signal's own handler does; without a signal, nothing."""
        if signum:
            self._signum = 0
            self._handlers[signum](signum, None)
            if is_child():  # its handler leaves it to the parent
                sys.exit(128 + signum)

    def _give_signals_back(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}


def _hook_in(trainer: Trainer, end_step: Callable[[Trainer, bool], None], end_epoch: Callable[[Trainer], None]) -> None:
    """Call functions after each step and each epoch, where Lightning has no hook of its own."""
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
