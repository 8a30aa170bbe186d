"""The images that the model gets wrong most clearly."""

import math

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.layers import to_pixels
from src.callbacks.pictures import Pictures

SIDE = 64  # pixels of an image as it is drawn
GAP = 6
COLUMNS = 5  # 350 pixels, as wide as TensorBoard shows a picture
CAPTION = 14


class HardestImages(Pictures):
    """Draws the images of each validation with the highest cross-entropy, the highest first.

    Below each are its label, the class that it was taken for and the probability that the model gave to that. For
    modules that return logits from ``validation_step``, as ``Pictures`` describes it.

    Args:
        num_images: How many, 1 or more.
    """

    def __init__(self, num_images: int = 25) -> None:
        super().__init__()
        self.num_images = num_images

    def look(self, pl_module: pl.LightningModule, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Keep the hardest of this batch and those before."""
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        parts = self._take_hardest((losses, images, labels, logits.float()))
        if self.seen:
            parts = self._take_hardest(tuple(torch.cat(pair) for pair in zip(self.seen[0], parts, strict=True)))
        self.seen = [parts]

    def _take_hardest(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        order = parts[0].topk(min(self.num_images, len(parts[0]))).indices
        return tuple(part[order] for part in parts)

    def draw(self, pl_module: pl.LightningModule, writer: SummaryWriter, step: int) -> None:
        """Draw them."""
        for _, images, labels, logits in self.seen:
            picture = draw_predictions(images, labels, logits)
            writer.add_image("val/hardest_images", picture, step, dataformats="HWC")


def draw_predictions(images: Tensor, labels: Tensor, logits: Tensor) -> NDArray[np.uint8]:
    """Images with their labels and predictions, COLUMNS a row.

    Args:
        images: Of any range, (N, C, H, W).
        labels: (N,).
        logits: (N, num_classes).

    Returns:
        (H, W, 3).
    """
    confidences, predictions = logits.softmax(dim=1).max(dim=1)
    width, height = SIDE + GAP, SIDE + CAPTION + GAP
    page = Image.new("RGB", (COLUMNS * width, math.ceil(len(images) / COLUMNS) * height + CAPTION), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    draw.text((GAP // 2, CAPTION - 3), "label > taken for, probability", "black", anchor="ls", font=font)
    rows = zip(to_pixels(images), labels.tolist(), predictions.tolist(), confidences.tolist(), strict=True)
    for index, (pixels, label, prediction, confidence) in enumerate(rows):
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
