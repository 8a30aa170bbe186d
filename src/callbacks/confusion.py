"""Which classes are taken for which."""

import math
from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.pictures import Pictures

CELL = 29  # pixels: ten and the margins are 350 wide, as TensorBoard shows a picture
MARGIN = 30
MAX_NAME = 14  # letters
MAX_NUMBERED = 30  # more classes are only coloured
RIGHT, WRONG = (9, 105, 218), (207, 34, 46)  # the colours of a whole row on and off the diagonal


class Confusion(Pictures):
    """Draws the confusion matrix of each validation, and logs the accuracy of each class.

    For modules with the matrix in ``confusion``, as ``Pictures`` describes it.
    """

    def draw(self, pl_module: pl.LightningModule, writer: SummaryWriter, step: int) -> None:
        """Draw the matrix; log the accuracy of each class that has images."""
        confusion = getattr(pl_module, "confusion", None)
        if not isinstance(confusion, Tensor) or confusion.dim() != 2 or len(confusion) != confusion.shape[1]:
            return
        names = [self.name(label) for label in range(len(confusion))]
        writer.add_image("val/confusion", draw_confusion(confusion, names), step, dataformats="HWC")
        for label, accuracy in enumerate((confusion.diag() / confusion.sum(dim=1)).tolist()):
            if not math.isnan(accuracy):
                writer.add_scalar(f"val_class_acc/{names[label]}", accuracy, step)


def draw_confusion(confusion: Tensor, names: Sequence[str] | None = None) -> NDArray[np.uint8]:
    """A confusion matrix as a picture: the stronger a cell's colour, the larger its share of its row.

    Args:
        confusion: Images of class i that were taken for class j, (num_classes, num_classes).
        names: Of the classes; None for their numbers. Over the columns stands the beginning of a long one.

    Returns:
        (H, W, 3).
    """
    counts = confusion.cpu()
    num_classes = len(counts)
    cell = CELL if num_classes <= MAX_NUMBERED else max(1, CELL * MAX_NUMBERED // num_classes)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    strength = shares.sqrt().unsqueeze(2)  # the root: a few errors must be visible, too
    is_right = torch.eye(num_classes, dtype=torch.bool).unsqueeze(2)
    full = torch.where(is_right, torch.tensor(RIGHT), torch.tensor(WRONG))
    cells = (255 - strength * (255 - full)).byte().numpy().repeat(cell, axis=0).repeat(cell, axis=1)
    names = [str(label) for label in range(num_classes)] if names is None else [name[:MAX_NAME] for name in names]
    font, small = ImageFont.load_default(13), ImageFont.load_default(10)
    left, top = MARGIN + max(MARGIN, *(round(font.getlength(name)) + 12 for name in names)), MARGIN
    page = Image.new("RGB", (left + cells.shape[1], top + cells.shape[0] + MARGIN), "white")
    page.paste(Image.fromarray(cells), (left, top))
    draw = ImageDraw.Draw(page)
    draw.text((left + cells.shape[1] // 2, page.height - 8), "taken for", "black", anchor="ms", font=font)
    draw.text((MARGIN // 2, top + cells.shape[0] // 2), "is", "black", anchor="mm", font=font)
    if num_classes > MAX_NUMBERED:
        return np.asarray(page)
    for row in range(num_classes):
        x, y = (start + row * cell + cell // 2 for start in (left, top))
        draw.text((left - 8, y), names[row], "black", anchor="rm", font=font)
        fits = len(names[row]) <= 2
        draw.text((x, top - 8), names[row][:4], "black", anchor="ms", font=font if fits else small)
        for column, count in enumerate(counts[row].tolist()):
            if count:
                place = left + column * cell + cell // 2, y
                color = "white" if shares[row, column] > 0.3 else "black"
                draw.text(place, str(count), color, anchor="mm", font=font if count < 1000 else small)
    return np.asarray(page)
