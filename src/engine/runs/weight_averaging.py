"""Averaged weights."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import callbacks
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.model_helpers import is_overridden


class EMAWeightAveraging(callbacks.EMAWeightAveraging):
    """Lightning's exponential moving average of the weights, which also tests with a checkpoint's average.

    When Lightning's own loads a checkpoint for a test after the training, it puts the last weights of the training into
    the module. Layers that a module makes in its ``setup`` are averaged, too: Lightning's own copies it before that.
    A resumed run is exact if it counts by steps; ``update_starting_at_epoch`` may average an epoch twice.
    """

    _is_waiting = False  # for the module's own setup

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the module, unless its own ``setup``, which comes after this, may make layers."""
        self._is_waiting = stage == "fit" and is_overridden("setup", pl_module)
        if not self._is_waiting:
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the module, if that has waited."""
        if self._is_waiting:
            self._is_waiting = False
            super().setup(trainer, pl_module, "fit")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue with the average in a resumed run; elsewhere it is in the module already."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.on_fit_start(trainer, pl_module)
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
