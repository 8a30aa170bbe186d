"""Averaged weights."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import callbacks
from pytorch_lightning.trainer.states import TrainerFn


class EMAWeightAveraging(callbacks.EMAWeightAveraging):
    """Lightning's exponential moving average of the weights, which also tests with a checkpoint's average.

    When Lightning's own loads a checkpoint for a test after the training, it puts the last weights of the training into
    the module. A resumed run is exact if it counts by steps; ``update_starting_at_epoch`` may average an epoch twice.
    """

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue with the average in a resumed run; elsewhere it is in the module already."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
