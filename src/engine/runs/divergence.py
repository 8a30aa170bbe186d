"""An end to runs that can no longer learn."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from src.engine.errors import DivergenceError


class Divergence(Callback):
    """Ends a run whose loss is no longer finite; without it the run would go on to its end and seem to have succeeded.

    It looks at the loss of a training step as often as losses are logged, since a look makes a GPU wait, and at each
    logged metric with "loss" in its name after a validation.

    Raises:
        DivergenceError: In all processes at once.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the step's loss."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.is_last_batch or (every and (batch_idx + 1) % every == 0):
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            self._require_finite(trainer, {"the training loss": loss} if isinstance(loss, Tensor) else {})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the validation's losses."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            losses = {name: value for name, value in trainer.callback_metrics.items() if "loss" in name}
            self._require_finite(trainer, losses)

    def _require_finite(self, trainer: pl.Trainer, losses: Mapping[str, Tensor]) -> None:
        bad = {name: loss for name, loss in losses.items() if not torch.as_tensor(loss).isfinite().all()}
        if trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            name, loss = next(iter(bad.items()), ("the loss of another process", "not finite"))
            raise DivergenceError(
                f"{name} is {loss} in epoch {trainer.current_epoch + 1}, by step {trainer.global_step}: "
                "try a lower optimizer.lr, or trainer.gradient_clip_val=1"
            )
