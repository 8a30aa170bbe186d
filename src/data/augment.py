"""Random changes of a batch of images, made on the device that it is on."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# A digit must stay the digit that it is, and inside the frame.
MAX_DEGREES = 10.0
MAX_SHIFT = 2.0  # pixels
MAX_SCALE = 0.1
MAX_SHEAR = 0.1


def random_affine(images: Tensor, background: float) -> Tensor:
    """Rotate, scale, shear and shift each image by small amounts of its own, drawn evenly.

    Up to 10 degrees, 10 %, 0.1 and 2 pixels; bilinear interpolation.

    Args:
        images: Float images, (B, C, H, W).
        background: Value of the pixels that come in from outside.

    Returns:
        Changed images, (B, C, H, W).
    """
    batch, _, height, width = images.shape

    def uniform(limit: float) -> Tensor:
        return torch.empty(batch, device=images.device).uniform_(-limit, limit)

    angle, scale, shear = uniform(math.radians(MAX_DEGREES)), 1 + uniform(MAX_SCALE), uniform(MAX_SHEAR)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack(  # (B, 2, 3): where each output pixel is read, in coordinates of -1..1
        [
            torch.stack([cos, shear * cos - sin, uniform(2 * MAX_SHIFT / width)], dim=1),
            torch.stack([sin, shear * sin + cos, uniform(2 * MAX_SHIFT / height)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background
