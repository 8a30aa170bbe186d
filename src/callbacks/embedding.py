"""Where the last hidden layer puts the images."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.layers import to_pixels
from src.callbacks.writers import find_predictions, find_writers, get_step, trace_layers

SPRITE = 24  # pixels of an image in the projector; add_embedding's copies of all of them are memory's peak


class Embedding(Callback):
    """Puts what the last hidden layer (LeNet-5's F6) makes of validation images into TensorBoard's projector.

    With the images, their labels and the classes that they were taken for, as of the last validation. For modules with
    the net in ``net``, whose ``validation_step`` returns logits, (B, num_classes), of batches (images, labels).

    Args:
        num_images: How many, the first ones of the validation, 1 or more.
    """

    def __init__(self, num_images: int = 256) -> None:
        self.num_images = num_images
        self._writers: list[SummaryWriter] = []
        self._parts: list[tuple[Tensor, ...]] = []  # of each batch: vectors, images, labels, predictions
        self._missing = 0  # images

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew."""
        self._writers = find_writers(trainer) if isinstance(getattr(pl_module, "net", None), nn.Module) else []
        self._parts, self._missing = [], self.num_images

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what the layer makes of the batch; the net runs once more, since a compiled one calls no hooks."""
        if not self._writers or self._missing <= 0 or (said := find_predictions(outputs, batch)) is None:
            return
        images, labels, logits = (part[: self._missing] for part in said)
        layers = trace_layers(pl_module.net, images)  # type: ignore[arg-type]
        if len(layers) < 2:
            return
        parts = (layers[-2].values.flatten(1), images, labels, logits.argmax(dim=1))
        self._parts.append(tuple(part.cpu() for part in parts))
        self._missing -= len(labels)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what the last validation has left, once: it takes a tenth of a second."""
        if not self._parts:
            return
        vectors, images, labels, predictions = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        self._parts = []
        sprites = F.interpolate(images.float(), (SPRITE, SPRITE), mode="bilinear", antialias=True)
        sprites = torch.from_numpy(to_pixels(sprites)).permute(0, 3, 1, 2) / 255
        names = torch.stack([labels, predictions], dim=1).tolist()
        for writer in self._writers:
            writer.add_embedding(
                vectors.float(), names, sprites, get_step(trainer), "last_hidden_layer", ["label", "taken for"]
            )
