"""What the engine adds to every training, whatever its module, data and callbacks are."""

import itertools
import logging
import random
import sys
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.types import LRSchedulerConfig
from torch import Tensor

from src.engine.runs.checkpoint_io import AtomicCheckpointIO
from src.engine.runs.rehearsal import OF_VALIDATION

log = logging.getLogger(__name__)

OF_STEP = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip


class Session(Callback):
    """Logs the config, tries a checkpoint out before the first step, and makes several processes agree.

    - Each logger gets the run's config as hyper-parameters.
    - Each process draws random numbers of its own once the module is built: dropout and augmentation would else draw
      the same ones for different images.
    - A checkpoint is written to memory and read back, so that a week of training cannot end with a file that nobody
      can open.
    - The loss is scaled where processes have unequal shares of a batch, since the plain mean of their gradients is
      taken: for train loaders with a method ``share(batch_idx)``. So it is in an epoch's last window of accumulated
      gradients, which Lightning divides by the batches of a whole one.
    - In a run that is counted in steps, a schedule that waits for a metric counts validations, not epochs.
    - It keeps when each metric was logged: Lightning's are those of all epochs.
    - Callbacks are called only for what they do in a step: Lightning would call all of them six times, and time each.

    Args:
        config: The run's config, plain; each checkpoint holds it.

    Attributes:
        logged: Of each metric that was logged, the last ``epoch``, counted from 1, and the ``step`` then.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.logged: dict[str, dict[str, int]] = {}
        self._plateaus: list[tuple[LRSchedulerConfig, int]] = []  # what is stepped here, every so many validations
        self._seen: dict[str, Tensor] = {}  # the metrics whose epochs are known
        self._loaded: dict[str, float] = {}  # a checkpoint's metrics
        self._since: list[str] = []  # those of them whose epochs are not yet known
        self._ended: dict[str, int] = {}  # the epoch that has ended, while no other has begun
        self._batch_idx = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the config."""
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed by process; take over a checkpoint's metrics; try a checkpoint out.

        Raises:
            CheckpointError: If a checkpoint could not be read back.
        """
        if trainer.global_rank:  # the first keeps the run's own seed
            seed = int(np.random.SeedSequence((self.config["seed"], trainer.global_rank)).generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback, name in itertools.product(callbacks, OF_STEP):
            if name not in vars(callback) and getattr(type(callback), name, None) is getattr(Callback, name):
                setattr(callback, name, None)  # which Lightning passes over
        for name, value in self._loaded.items():
            if trainer.enable_validation or not OF_VALIDATION.match(name):  # else they would rank what has none
                trainer.callback_metrics[name] = torch.tensor(value)  # Lightning's books, which it hands out
        self._seen = {name: value for name, value in trainer.callback_metrics.items() if name not in self._since}
        schedulers = trainer.lr_scheduler_configs if self.config.get("unit") == "step" else []
        plateaus = [each for each in schedulers if each.reduce_on_plateau and each.interval == "epoch"]
        self._plateaus = [(scheduler, scheduler.frequency) for scheduler in plateaus]
        for scheduler in plateaus:
            scheduler.frequency = sys.maxsize  # of epochs, which may have no end
        if trainer.accumulate_grad_batches > 1 and trainer.num_training_batches == float("inf"):
            key = f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}"
            log.warning(f"{key}: the train loader has no length, so an epoch's last gradient may be too short")
        is_lazy = any(map(torch.nn.parameter.is_lazy, pl_module.parameters()))  # its first batch makes the weights
        if isinstance(io := trainer.strategy.checkpoint_io, AtomicCheckpointIO) and not is_lazy:
            io.is_rehearsing = True
            trainer.save_checkpoint("rehearsal.ckpt", weights_only=False)
            io.is_rehearsing = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which batch it is."""
        self._batch_idx = batch_idx

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what the run so far has logged until its metrics are there again."""
        self._loaded = checkpoint.get("metrics", {})
        stored = checkpoint.get("logged", {"at": {}, "since": []})
        self.logged, self._since = stored["at"], stored["since"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add when the metrics were logged, and which since that was last looked at."""
        if self._ended:
            self._note_metrics(trainer)
        checkpoint["logged"] = {"at": self.logged, "since": list(self._find_new(trainer))}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metrics of the epoch before: its last ones come after all hooks of its end."""
        if self._ended:
            self._note_metrics(trainer)
            self._ended = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which epoch has ended."""
        self._ended = _place(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metrics of a validation, and step what waits for one."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._note_metrics(trainer)
            number = (trainer.fit_loop.total_batch_idx + 1) // (trainer.val_check_batch or 1)  # inf: at an epoch's end
            for config, frequency in self._plateaus:
                value = trainer.callback_metrics.get(str(config.monitor))
                if value is not None and number % frequency == 0:
                    pl_module.lr_scheduler_step(config.scheduler, value)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the last metrics."""
        self._note_metrics(trainer)

    def _note_metrics(self, trainer: Trainer) -> None:
        new = self._find_new(trainer)
        self.logged |= dict.fromkeys(new, self._ended or _place(trainer))
        self._seen |= new

    def _find_new(self, trainer: Trainer) -> dict[str, Tensor]:
        """Metrics that were logged since: Lightning replaces them."""
        return {name: value for name, value in trainer.callback_metrics.items() if value is not self._seen.get(name)}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Scale the loss by this process's share of the batch, and where a window of batches is cut short."""
        share = getattr(trainer.train_dataloader, "share", None)
        factor = share(self._batch_idx) if trainer.world_size > 1 and share is not None else 1.0
        every, total = trainer.accumulate_grad_batches, trainer.num_training_batches
        if every > 1 and total < float("inf") and self._batch_idx >= total - total % every:
            factor *= every / (total % every)
        if factor != 1.0:
            loss *= factor


def _place(trainer: Trainer) -> dict[str, int]:
    return {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
