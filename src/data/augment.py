"""Random changes of a batch of images, made on the device that it is on."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# A digit must stay the digit that it is, and inside the frame.
MAX_DEGREES = 10.0
MAX_SHIFT = 2.0  # pixels, of an image that is not bent
MAX_BENT_SHIFT = 1.0  # pixels, of one that is
MAX_SCALE = 0.1
MAX_SHEAR = 0.1
BEND = 0.7  # pixels, standard deviation of an elastic displacement
SMOOTHNESS = 4.0  # pixels, standard deviation of the Gaussian that smooths the displacements


def random_affine(images: Tensor, background: float) -> Tensor:
    """Rotate, scale, shear and shift each image by small amounts of its own, drawn evenly.

    Up to 10 degrees, 10 %, 0.1 and 2 pixels; bilinear interpolation.

    Args:
        images: Images of any float type, (B, C, H, W).
        background: Value of the pixels that come in from outside.

    Returns:
        Changed images, (B, C, H, W).
    """
    return _resample(images, _affine_grid(images, MAX_SHIFT), background)


def random_elastic(images: Tensor, background: float) -> Tensor:
    """As ``random_affine``, with shifts up to 1 pixel, and bend each image by a smooth random field of its own.

    The field is Gaussian noise, smoothed by a Gaussian of 4 pixels; it moves pixels by 0.7 pixels (root mean square) in
    x and as much in y, which small nets learn better from than from more. After Simard, Steinkraus, Platt: Best
    Practices for Convolutional Neural Networks Applied to Visual Document Analysis, ICDAR 2003, section 2, where the
    noise is uniform and pixels move by about 1.4 pixels.

    Args:
        images: Images of any float type, (B, C, H, W).
        background: Value of the pixels that come in from outside.

    Returns:
        Changed images, (B, C, H, W).
    """
    batch, _, height, width = images.shape
    noise = torch.randn(batch, 2, height, width, device=images.device)  # float32, whatever the images are
    field = _smoother(height, images.device) @ noise @ _smoother(width, images.device).T  # (B, 2, H, W), in x and y
    pixel = torch.tensor([2 / width, 2 / height], device=images.device)  # the grid runs from -1 to 1
    grid = _affine_grid(images, MAX_BENT_SHIFT) + BEND * pixel * field.permute(0, 2, 3, 1)
    return _resample(images, grid, background)


def _affine_grid(images: Tensor, max_shift: float) -> Tensor:
    """Where each output pixel is read, in coordinates of -1..1, (B, H, W, 2)."""
    batch, _, height, width = images.shape

    def uniform(limit: float) -> Tensor:
        return torch.empty(batch, device=images.device).uniform_(-limit, limit)

    angle, scale, shear = uniform(math.radians(MAX_DEGREES)), 1 + uniform(MAX_SCALE), uniform(MAX_SHEAR)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    x, y = uniform(2 * max_shift / width), uniform(2 * max_shift / height)
    # The grid runs from -1 to 1 along either side: without the sides' ratio a rotation would be one of squares only.
    along_y, along_x = (shear * cos - sin) * (height / width), sin * (width / height)
    theta = torch.stack([cos, along_y, x, along_x, shear * sin + cos, y], dim=1).view(batch, 2, 3)
    return F.affine_grid(theta, list(images.shape), align_corners=False)


def _smoother(size: int, device: torch.device) -> Tensor:
    """A matrix that smooths along an axis of this size and leaves independent noise at variance 1, (size, size)."""
    pixels = torch.arange(size, device=device)
    weights = torch.exp(-0.5 * ((pixels - pixels.unsqueeze(1)) / SMOOTHNESS) ** 2)
    return weights / weights.square().sum(dim=1, keepdim=True).sqrt()


def _resample(images: Tensor, grid: Tensor, background: float) -> Tensor:
    moved = F.grid_sample((images - background).to(grid.dtype), grid, align_corners=False)
    return moved.to(images.dtype) + background
