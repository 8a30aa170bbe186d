"""Averaged weights."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import callbacks
from pytorch_lightning.trainer.states import TrainerFn


class EMAWeightAveraging(callbacks.EMAWeightAveraging):
    """Lightning's exponential moving average of the weights, which tests, too, with what a checkpoint averages.

    Lightning's own, loading a checkpoint for a test behind the training, puts the last weights of the training into the
    module. It goes on exactly where it counts by steps; ``update_starting_at_epoch`` may average an epoch twice.
    """

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the average where a run goes on; elsewhere it is in the module already."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
