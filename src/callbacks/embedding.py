"""Where the last hidden layer puts the images."""

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.layers import to_pixels
from src.callbacks.pictures import Pictures

SPRITE = 24  # pixels of an image in the projector; add_embedding's copies of all of them are memory's peak


class Embedding(Pictures):
    """Puts what the last hidden layer (LeNet-5's F6) makes of validation images into TensorBoard's projector.

    With the images, their labels and the classes that they were taken for, as of the last validation. For modules with
    a ``net`` of images that return logits from ``validation_step``, as ``Pictures`` describes it.

    Args:
        num_images: How many, the first ones of the validation, 1 or more.
    """

    def __init__(self, num_images: int = 256) -> None:
        super().__init__()
        self.num_images = num_images
        self._last: tuple[int, list[tuple[Tensor, ...]]] = 0, []  # the last validation's step and batches

    def look(self, pl_module: pl.LightningModule, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Keep what the layer makes of the batch; the net runs once more, since a compiled one calls no hooks."""
        num_missing = self.num_images - sum(len(parts[0]) for parts in self.seen)
        layers = self.trace(pl_module, images[:num_missing]) if num_missing else []
        if len(layers) > 1:
            parts = (layers[-2].values.flatten(1), images, labels, logits.argmax(dim=1))
            self.seen.append(tuple(part[:num_missing].cpu() for part in parts))

    def draw(self, pl_module: pl.LightningModule, writer: SummaryWriter, step: int) -> None:
        """Draw nothing yet: it takes a tenth of a second."""
        self._last = step, self.seen

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what the last validation has left."""
        step, seen = self._last
        self._last = 0, []
        if not seen:
            return
        vectors, images, labels, predictions = (torch.cat(parts) for parts in zip(*seen, strict=True))
        sprites = F.interpolate(images.float(), (SPRITE, SPRITE), mode="bilinear", antialias=True)
        sprites = torch.from_numpy(to_pixels(sprites)).permute(0, 3, 1, 2) / 255
        names = [list(map(self.name, pair)) for pair in torch.stack([labels, predictions], dim=1).tolist()]
        for writer in self.writers:
            writer.add_embedding(vectors.float(), names, sprites, step, "last_hidden_layer", ["label", "taken for"])
