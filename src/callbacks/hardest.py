"""The images that the model gets wrong most clearly."""

import math
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.layers import to_pixels
from src.callbacks.writers import find_predictions, find_writers, get_step

SIDE = 64  # pixels of an image as it is drawn
GAP = 6
COLUMNS = 5  # 350 pixels, as wide as TensorBoard shows a picture
CAPTION = 14


class HardestImages(Callback):
    """Draws the images of each validation with the highest loss, the highest first, to TensorBoard.

    Below each stand its label, the class that it was taken for and the probability that the model gave to that. The
    loss is the cross-entropy. Of several processes, the first one's share of the images is looked at. For modules whose
    ``validation_step`` returns logits, (B, num_classes), of batches (images, labels).

    Args:
        num_images: How many, 1 or more.
    """

    def __init__(self, num_images: int = 25) -> None:
        self.num_images = num_images
        self._writers: list[SummaryWriter] = []
        self._hardest: tuple[Tensor, ...] = ()  # of the batches so far: losses, images, labels, logits

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew."""
        self._writers = find_writers(trainer)
        self._hardest = ()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the hardest of this batch and those before."""
        if not self._writers or (said := find_predictions(outputs, batch)) is None:
            return
        images, labels, logits = said
        logits = logits.float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        order = losses.topk(min(self.num_images, len(losses))).indices
        found = tuple(part[order] for part in (losses, images, labels, logits))
        if self._hardest:
            found = tuple(torch.cat(pair) for pair in zip(self._hardest, found, strict=True))
        order = found[0].topk(min(self.num_images, len(found[0]))).indices
        self._hardest = tuple(part[order] for part in found)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw them."""
        if not self._hardest:
            return
        _, images, labels, logits = self._hardest
        self._hardest = ()
        picture = draw_predictions(images, labels, logits)
        for writer in self._writers:
            writer.add_image("val/hardest_images", picture, get_step(trainer), dataformats="HWC")


def draw_predictions(images: Tensor, labels: Tensor, logits: Tensor) -> NDArray[np.uint8]:
    """Images with their labels and predictions, COLUMNS a row.

    Args:
        images: Of any range, (N, C, H, W).
        labels: (N,).
        logits: (N, num_classes).

    Returns:
        (H, W, 3).
    """
    from PIL import Image, ImageDraw, ImageFont

    confidences, predictions = logits.softmax(dim=1).max(dim=1)
    width, height = SIDE + GAP, SIDE + CAPTION + GAP
    page = Image.new("RGB", (COLUMNS * width, math.ceil(len(images) / COLUMNS) * height + CAPTION), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    draw.text((GAP // 2, CAPTION - 3), "label > taken for, probability", "black", anchor="ls", font=font)
    said = zip(to_pixels(images), labels.tolist(), predictions.tolist(), confidences.tolist(), strict=True)
    for index, (pixels, label, prediction, confidence) in enumerate(said):
        left, top = index % COLUMNS * width, CAPTION + index // COLUMNS * height
        image = Image.fromarray(pixels)
        image.thumbnail((SIDE, SIDE))
        scale = SIDE / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)
        page.paste(image, (left + GAP // 2, top + GAP // 2))
        color = "black" if label == prediction else "#cf222e"
        caption = f"{label} > {prediction}, {100 * confidence:.0f} %"
        draw.text((left + width // 2, top + SIDE + CAPTION), caption, color, anchor="ms", font=font)
    return np.asarray(page)
