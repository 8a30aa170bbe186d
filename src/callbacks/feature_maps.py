"""What the net looks for, and what it makes of an image layer by layer."""

import pytorch_lightning as pl
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.layers import Layer, draw_layers, find_filters
from src.callbacks.pictures import Pictures


class FeatureMaps(Pictures):
    """Draws the first convolution's filters and the feature maps of the first validation image.

    After each validation, so that you can watch them form. For modules with a ``net`` of images, as ``Pictures``
    describes it; a net without convolutions has no such pictures.
    """

    def draw(self, pl_module: pl.LightningModule, writer: SummaryWriter, step: int) -> None:
        """Draw."""
        net = getattr(pl_module, "net", None)
        is_convolutional = isinstance(net, nn.Module) and any(isinstance(part, nn.Conv2d) for part in net.modules())
        if self.image is None or not isinstance(net, nn.Module) or not is_convolutional:
            return
        if layers := self.trace(pl_module, self.image):
            page = draw_layers([Layer("input", self.image), *layers])
            writer.add_image("net/feature_maps", page, step, dataformats="HW")
        if (filters := find_filters(net)) is not None:
            writer.add_image("net/filters", draw_layers([filters]), step, dataformats="HW")
