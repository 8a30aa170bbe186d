"""Precision and recall of each class, at any threshold."""

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.pictures import Pictures

MAX_CLASSES = 20  # nobody looks at more


class PrecisionRecall(Pictures):
    """Draws the precision-recall curve of each class against the others, of the first MAX_CLASSES classes.

    For modules that return logits from ``validation_step``, as ``Pictures`` describes it.
    """

    def look(self, pl_module: pl.LightningModule, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Keep the batch's labels and probabilities."""
        self.seen.append((labels, logits.float().softmax(dim=1)[:, :MAX_CLASSES]))

    def draw(self, pl_module: pl.LightningModule, writer: SummaryWriter, step: int) -> None:
        """Draw the curves."""
        if self.seen:
            labels, probabilities = (torch.cat(parts).cpu() for parts in zip(*self.seen, strict=True))
            for label, of_class in enumerate(probabilities.unbind(dim=1)):
                writer.add_pr_curve(f"pr/{self.name(label)}", labels == label, of_class, step)
