"""What the net looks for, and what it makes of an image layer by layer."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.layers import Layer, draw_layers, find_filters
from src.callbacks.writers import find_images, find_writers, get_step, trace_layers


class FeatureMaps(Callback):
    """Draws the first convolution's filters and the feature maps of the first validation image to TensorBoard.

    After each validation, so that one can watch them form. For modules with the net in ``net`` and batches
    (images, labels); a net without convolutions has no such pictures.
    """

    def __init__(self) -> None:
        self._writers: list[SummaryWriter] = []
        self._image: Tensor | None = None  # (1, C, H, W)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out whether there is anything to draw."""
        net = getattr(pl_module, "net", None)
        has_maps = isinstance(net, nn.Module) and any(isinstance(module, nn.Conv2d) for module in net.modules())
        self._writers = find_writers(trainer) if has_maps else []
        self._image = None

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first image."""
        if self._writers and self._image is None:
            images = find_images(batch)
            self._image = None if images is None else images[:1]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw."""
        if self._image is None:
            return
        net: nn.Module = pl_module.net  # type: ignore[assignment]
        pictures = {}
        if layers := trace_layers(net, self._image):
            pictures["net/feature_maps"] = draw_layers([Layer("input", self._image), *layers])
        if (filters := find_filters(net)) is not None:
            pictures["net/filters"] = draw_layers([filters])
        for writer in self._writers:
            for name, picture in pictures.items():
                writer.add_image(name, picture, get_step(trainer), dataformats="HW")
        self._image = None
