"""Precision and recall of each class, at any threshold."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.writers import find_predictions, find_writers, get_step

MAX_CLASSES = 20  # nobody looks at more


class PrecisionRecall(Callback):
    """Draws the precision-recall curve of each class against the others after each validation, to TensorBoard.

    Of several processes, the first one's share of the images is looked at. For modules whose ``validation_step``
    returns logits, (B, num_classes), of batches (images, labels); the first MAX_CLASSES classes.
    """

    def __init__(self) -> None:
        self._writers: list[SummaryWriter] = []
        self._probabilities: list[Tensor] = []
        self._labels: list[Tensor] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew."""
        self._writers = find_writers(trainer)
        self._probabilities, self._labels = [], []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch's probabilities and labels."""
        if self._writers and (said := find_predictions(outputs, batch)) is not None:
            _, labels, logits = said
            self._probabilities.append(logits.float().softmax(dim=1)[:, :MAX_CLASSES])
            self._labels.append(labels)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the curves."""
        if not self._labels:
            return
        probabilities, labels = torch.cat(self._probabilities).cpu(), torch.cat(self._labels).cpu()
        self._probabilities, self._labels = [], []
        for label, of_class in enumerate(probabilities.unbind(dim=1)):
            for writer in self._writers:
                writer.add_pr_curve(f"pr/{label}", labels == label, of_class, get_step(trainer))
