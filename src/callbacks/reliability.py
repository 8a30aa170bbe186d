"""Whether a classifier is right as often as it is sure, as a picture of each validation."""

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from src.callbacks.pictures import Pictures, show

NUM_BINS, BAR = 15, 20  # as torchmetrics.CalibrationError's, and their width in pixels


class Reliability(Pictures):
    """Draws the share of right answers over their probability: a model that is calibrated is on the diagonal.

    For modules that return logits from ``validation_step``, as ``Pictures`` describes it.
    """

    def look(self, pl_module: pl.LightningModule, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Keep the batch's probabilities, and which answers are right."""
        probabilities, answers = logits.float().softmax(dim=1).max(dim=1)
        self.seen.append((probabilities, answers == labels))

    def draw(self, pl_module: pl.LightningModule, step: int) -> None:
        """Draw."""
        if self.seen:
            probabilities, right = map(torch.cat, zip(*self.seen, strict=True))
            show(self.loggers, "val/reliability", draw_reliability(probabilities.cpu(), right.cpu()), step)


def draw_reliability(probabilities: Tensor, right: Tensor) -> NDArray[np.uint8]:
    """A bar a bin of probabilities (N,), as high as the share of its answers that are ``right`` (N,); (H, W, 3)."""
    bins = (probabilities * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    shares = torch.bincount(bins, right.float(), NUM_BINS) / torch.bincount(bins, minlength=NUM_BINS)
    side = NUM_BINS * BAR
    page = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(page)
    for number, share in enumerate(shares.tolist()):
        if share > 0:  # there are answers, of which one is right
            draw.rectangle([number * BAR, round(side * (1 - share)), (number + 1) * BAR - 2, side], "#0969da")
    draw.line([0, side, side, 0], "#59636e")
    return np.asarray(page)
