"""The pictures of each validation, for all loggers, and what only TensorBoard shows beside them."""

import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from src.callbacks.layers import Layer, draw_layers, find_filters, to_pixels, trace
from src.callbacks.pictures import Pictures, find_loggers, find_writers, logged_step, show

log = logging.getLogger(__name__)

CELL = 29  # pixels of the confusion matrix: ten and the margins are 350 wide, as TensorBoard shows a picture
MARGIN = 30
MAX_NAME = 14  # letters
MAX_NUMBERED = 30  # more classes are only coloured
MAX_CURVES = 20  # more classes have no curves of their own
RIGHT, WRONG = (9, 105, 218), (207, 34, 46)  # the colours of a whole row on and off the diagonal
SIDE = 64  # pixels of a hard image as it is drawn
GAP = 6
COLUMNS = 5  # 350 pixels, too
CAPTION = 14
MAX_VALUES = 10_000  # of a parameter that go into its histogram
NUM_BINS = 64
SPRITE = 24  # pixels of an image in the projector; add_embedding's copies of all of them are memory's peak


class Confusion(Pictures):
    """Draws the confusion matrix of validation, and logs the accuracy of each class where they are few.

    For modules with the matrix in ``confusion``, as ``Pictures`` describes it.
    """

    def draw(self, pl_module: pl.LightningModule, step: int) -> None:
        """Draw the matrix; log the accuracy of each class that has images."""
        confusion = getattr(pl_module, "confusion", None)
        if not isinstance(confusion, Tensor) or confusion.dim() != 2 or len(confusion) != confusion.shape[1]:
            return
        names = [self.name(label) for label in range(len(confusion))]
        show(self.loggers, "val/confusion", draw_confusion(confusion, names), step)
        accuracies = (confusion.diag() / confusion.sum(dim=1)).tolist() if len(confusion) <= MAX_CURVES else []
        curves = {
            f"val_class_acc/{names[label]}": share for label, share in enumerate(accuracies) if not math.isnan(share)
        }
        for logger in self.loggers if curves else []:
            logger.log_metrics(curves, step)


class HardestImages(Pictures):
    """Draws the images of a validation with the highest cross-entropy, the highest first.

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

    def draw(self, pl_module: pl.LightningModule, step: int) -> None:
        """Draw them."""
        for _, images, labels, logits in self.seen:
            show(self.loggers, "val/hardest_images", draw_predictions(images, labels, logits, self.name), step)


class Layers(Pictures):
    """Looks into the module's ``net``."""

    _can_trace = True

    def trace(self, pl_module: pl.LightningModule, images: Tensor) -> list[Layer]:
        """What each layer of ``net`` makes of images; nothing without one, or if it does not take images only."""
        net = getattr(pl_module, "net", None)
        if not isinstance(net, nn.Module) or not self._can_trace:
            return []
        try:
            return trace(net, images)[0]
        except Exception as error:  # whatever your net raises
            self._can_trace = False
            log.warning("no pictures of the net's layers: %s", str(error).strip().split("\n")[0])
            return []


class FeatureMaps(Layers):
    """Draws the first convolution's filters and the feature maps of the first validation image.

    So that you can watch them form. For modules with a ``net`` of images, as ``Pictures`` describes it; a net without
    convolutions has no such pictures.
    """

    def draw(self, pl_module: pl.LightningModule, step: int) -> None:
        """Draw."""
        net = getattr(pl_module, "net", None)
        if self.image is None or not isinstance(net, nn.Module):
            return
        if not any(isinstance(part, nn.Conv2d) for part in net.modules()):
            return
        if layers := self.trace(pl_module, self.image):
            show(self.loggers, "net/feature_maps", draw_layers([Layer("input", self.image), *layers]), step)
        if (filters := find_filters(net)) is not None:
            show(self.loggers, "net/filters", draw_layers([filters]), step)


class Weights(Pictures):
    """Writes a histogram of each parameter to TensorBoard, and logs the norm of all gradients.

    Values that are not finite are left out. ``weights/grad_norm`` is logged every ``trainer.log_every_n_steps`` steps,
    before clipping.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Log the gradients' norm."""
        step = logged_step(trainer)
        if step is None or not (loggers := find_loggers(trainer)):
            return
        norm = torch.nn.utils.get_total_norm(p.grad for p in pl_module.parameters() if p.grad is not None)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and optimizer.defaults.get("fused"):
            norm /= scaler.get_scale()  # a fused optimizer unscales by itself, later
        for logger in loggers:
            logger.log_metrics({"weights/grad_norm": float(norm)}, step)

    def draw(self, pl_module: pl.LightningModule, step: int) -> None:
        """Write the histograms."""
        writers = find_writers(self.loggers)
        for name, parameter in pl_module.named_parameters() if writers else []:
            values = parameter.detach().float().flatten()
            values = values[:: max(1, -(-len(values) // MAX_VALUES))]  # spread over all of them
            values = values[values.isfinite()]  # a histogram of others raises, and would end the training
            for writer in writers if len(values) else []:
                writer.add_histogram(f"weights/{name}", values, step, bins=NUM_BINS)


class Embedding(Layers):
    """Puts what the last hidden layer (LeNet-5's F6) makes of validation images into TensorBoard's projector.

    At the end of the training, with the images, their labels and the classes that they were taken for in the last
    validation; grey images are tinted by their label. For modules with a ``net`` of images that return logits from
    ``validation_step``, as ``Pictures`` describes it.

    Args:
        num_images: How many, spread over the whole validation, 1 or more.
    """

    def __init__(self, num_images: int = 256) -> None:
        super().__init__()
        self.num_images = num_images
        self._last: tuple[int, list[tuple[Tensor, ...]]] = 0, []  # the last validation's step and images

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Each validation may be the last."""
        return True

    def look(self, pl_module: pl.LightningModule, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Keep this batch's share of the images: a split may be sorted by class."""
        num_batches = pl_module.trainer.num_val_batches[0]
        due = math.ceil(self.num_images * (1 if math.isinf(num_batches) else (len(self.seen) + 1) / num_batches))
        share = due - sum(len(parts[0]) for parts in self.seen)
        chosen = torch.linspace(0, len(images) - 1, min(share, len(images))).long().to(images.device)
        self.seen.append(tuple(part[chosen].cpu() for part in (images, labels, logits.argmax(dim=1))))

    def draw(self, pl_module: pl.LightningModule, step: int) -> None:
        """Draw nothing yet: it takes a tenth of a second."""
        self._last = step, self.seen

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what the net makes of what the last validation has left."""
        step, seen = self._last
        writers, self._last = find_writers(find_loggers(trainer)), (0, [])
        if not seen or not writers:
            return
        images, labels, predictions = (torch.cat(parts) for parts in zip(*seen, strict=True))
        layers = self.trace(pl_module, images.to(pl_module.device))
        if len(layers) < 2:
            return
        sprites = F.interpolate(images.float(), (SPRITE, SPRITE), mode="bilinear", antialias=True)
        sprites = torch.from_numpy(to_pixels(sprites)).permute(0, 3, 1, 2) / 255
        if images.shape[1] != 3:
            sprites *= torch.from_numpy(colormaps["tab10"](labels.numpy() % 10)[:, :3, None, None]).float()
        names = [list(map(self.name, pair)) for pair in torch.stack([labels, predictions], dim=1).tolist()]
        for writer in writers:
            vectors = layers[-2].values.flatten(1).float()
            writer.add_embedding(vectors, names, sprites, step, "last_hidden_layer", ["label", "taken for"])


def draw_confusion(confusion: Tensor, names: Sequence[str] | None = None) -> NDArray[np.uint8]:
    """A confusion matrix as a picture: the stronger a cell's colour, the larger its share of its row.

    Args:
        confusion: Images of class i that were taken for class j, (num_classes, num_classes).
        names: Of the classes; None for their numbers. Over the columns stands the beginning of a long one.

    Returns:
        (H, W, 3).
    """
    counts = confusion.cpu()
    names = [name[:MAX_NAME] for name in names or map(str, range(len(counts)))]
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    is_right = torch.eye(len(counts), dtype=torch.bool).unsqueeze(2)
    full = torch.where(is_right, torch.tensor(RIGHT), torch.tensor(WRONG))
    inks = shares.sqrt().unsqueeze(2) * (255 - full)  # the root: a few errors must be visible, too
    cell = CELL if len(counts) <= MAX_NUMBERED else 1
    if cell == 1:  # as large a file as that of ten; the strongest of those that share a pixel
        inks = F.adaptive_max_pool2d(inks.permute(2, 0, 1), 5 * CELL).permute(1, 2, 0)
    cells = (255 - inks).byte().numpy().repeat(cell, axis=0).repeat(cell, axis=1)
    font, small = ImageFont.load_default(13), ImageFont.load_default(10)
    left, top = MARGIN + max(MARGIN, *(round(font.getlength(name)) + 12 for name in names)), MARGIN
    page = Image.new("RGB", (left + cells.shape[1], top + cells.shape[0] + MARGIN), "white")
    page.paste(Image.fromarray(cells), (left, top))
    draw = ImageDraw.Draw(page)
    draw.text((left + cells.shape[1] // 2, page.height - 8), "taken for", "black", anchor="ms", font=font)
    draw.text((MARGIN // 2, top + cells.shape[0] // 2), "is", "black", anchor="mm", font=font)
    for row, name in enumerate(names if cell == CELL else ()):
        x, y = (start + row * CELL + CELL // 2 for start in (left, top))
        draw.text((left - 8, y), name, "black", anchor="rm", font=font)
        draw.text((x, top - 8), name[:4], "black", anchor="ms", font=font if len(name) <= 2 else small)
        for column in counts[row].nonzero().flatten().tolist():
            count, color = int(counts[row, column]), "white" if shares[row, column] > 0.3 else "black"
            place = left + column * CELL + CELL // 2, y
            draw.text(place, str(count), color, anchor="mm", font=font if count < 1000 else small)
    return np.asarray(page)


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
        image = ImageOps.contain(Image.fromarray(pixels), (SIDE, SIDE), Image.Resampling.BOX)
        page.paste(image, (left + GAP // 2, top + GAP // 2))
        percent = f"{100 * confidence:.0f}"
        lines = [label[:11], f"> {taken[:8]} {percent}"] if is_long else [f"{label} > {taken}, {percent} %"]
        for number, line in enumerate(lines, 1):
            place = (left + width // 2, top + SIDE + CAPTION * number)
            draw.text(place, line, "black" if is_right else "#cf222e", anchor="ms", font=font)
    return np.asarray(page)
