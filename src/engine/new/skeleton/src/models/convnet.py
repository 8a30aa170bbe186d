"""A small convolutional net: put yours here."""

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Maps images, float (B, in_channels, H, W), to logits, (B, num_classes).

    Args:
        num_classes: Number of classes.
        in_channels: Channels of an image.
        num_filters: Of the first layer; the second has twice as many.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, num_filters: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, num_filters, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(num_filters, 2 * num_filters, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),  # any image size will do
        )
        self.head = nn.Linear(8 * num_filters, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, num_classes), of images, (B, in_channels, H, W)."""
        logits: Tensor = self.head(torch.flatten(self.features(images), 1))
        return logits
