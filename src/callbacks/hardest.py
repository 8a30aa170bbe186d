"""The images that the model gets wrong most clearly."""

import math
from collections.abc import Callable

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
            picture = draw_predictions(images, labels, logits, self.name)
            writer.add_image("val/hardest_images", picture, step, dataformats="HWC")


def draw_predictions(
    images: Tensor, labels: Tensor, logits: Tensor, name: Callable[[int], str] = str
) -> NDArray[np.uint8]:
    """Images with their labels and predictions, COLUMNS a row.

    Args:
        images: Of any range, (N, C, H, W).
        labels: (N,).
        logits: (N, num_classes).
        name: Of a class. Where names are long, a caption has two lines.

    Returns:
        (H, W, 3).
    """
    confidences, predictions = logits.softmax(dim=1).max(dim=1)
    captions = [(name(label), name(taken)) for label, taken in zip(labels.tolist(), predictions.tolist(), strict=True)]
    is_long = max(len(text) for pair in captions for text in pair) > 2
    width, height = SIDE + GAP, SIDE + CAPTION * (1 + is_long) + GAP
    page = Image.new("RGB", (COLUMNS * width, math.ceil(len(images) / COLUMNS) * height + CAPTION), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    draw.text((GAP // 2, CAPTION - 3), "label > taken for, probability", "black", anchor="ls", font=font)
    rows = zip(to_pixels(images), captions, confidences.tolist(), (labels == predictions).tolist(), strict=True)
    for index, (pixels, (label, taken), confidence, is_right) in enumerate(rows):
        left, top = index % COLUMNS * width, CAPTION + index // COLUMNS * height
        image = Image.fromarray(pixels)
        image.thumbnail((SIDE, SIDE))
        scale = SIDE / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)
        page.paste(image, (left + GAP // 2, top + GAP // 2))
        percent = f"{100 * confidence:.0f}"
        lines = [label[:11], f"> {taken[:8]} {percent}"] if is_long else [f"{label} > {taken}, {percent} %"]
        for number, line in enumerate(lines, 1):
            place = (left + width // 2, top + SIDE + CAPTION * number)
            draw.text(place, line, "black" if is_right else "#cf222e", anchor="ms", font=font)
    return np.asarray(page)
