"""What each layer of a net makes of an image, as numbers and as pictures."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import make_grid

MAX_MAPS = 32  # of a layer that are drawn
COLUMNS = 8  # maps side by side
UNITS_A_ROW = 42  # units of a fully connected layer side by side
MAX_UNITS = 8 * UNITS_A_ROW
TILE = 32  # pixels of a map at most
GAP = 3
MARGIN = 70  # pixels for the layers' names: with the maps 350 in all, as wide as TensorBoard shows a picture
FONT_SIZE = 11
BETWEEN = 255  # the grey between maps, which no value has
PAPER = 236


class Layer(NamedTuple):
    """A layer's name in the net, and what it made of a batch, (B, ...)."""

    name: str
    values: Tensor


def trace(net: nn.Module, images: Tensor) -> tuple[list[Layer], Tensor]:
    """Run a net in evaluation mode, and record each of its layers in the order in which they run.

    A convolution or a linear layer begins a new one, and so does what changes the number of values, as pooling does.
    What follows in the same shape (an activation, a normalisation) belongs to the layer before. Functions of torch,
    unlike modules, are not seen. A compiled net runs as it was written: it would be compiled anew for this batch.

    Args:
        net: Maps images to logits. Its mode stays as it was.
        images: Its input, (B, C, H, W), on its device.

    Returns:
        Its layers, and its logits, (B, num_classes).
    """
    inner = net
    while len(parts := list(inner.children())) == 1 and list(parts[0].children()):
        inner = parts[0]  # of a wrapper, as torch.compile's
    names = {module: name for name, module in inner.named_modules()}
    layers: list[Layer] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.dim() < 2:
            return
        has_weights = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        if not layers or has_weights or output.numel() != layers[-1].values.numel():
            layers.append(Layer(names[module], output.detach()))
        elif output.shape == layers[-1].values.shape:
            layers[-1] = Layer(layers[-1].name, output.detach())

    modes = [(module, module.training) for module in net.modules()]
    hooks = [module.register_forward_hook(note) for module in net.modules() if not list(module.children())]
    try:
        net.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits: Tensor = net.forward(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, is_training in modes:
            module.training = is_training
    return layers, logits


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Images from their own darkest to their own lightest value.

    Args:
        images: Of any range, (N, C, H, W); channels other than one (grey) or three (colour) are averaged.

    Returns:
        (N, H, W, 3).
    """
    images = images.detach().float().cpu()
    if images.shape[1] != 3:
        images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    pixels = ((images - low) / (high - low).clamp(min=1e-12)).nan_to_num() * 255
    return pixels.byte().permute(0, 2, 3, 1).numpy()


def draw_values(values: Tensor, tile: int = TILE) -> NDArray[np.uint8]:
    """What a layer made of one image, from its lowest value (black) to its highest (white).

    Args:
        values: Feature maps (C, H, W), a sequence (T, D), which is drawn as one map, or units (F,).
        tile: Pixels of a map at most; a smaller one is enlarged by a whole number. A unit is a square of a fifth.

    Returns:
        The maps or units beside each other, grey, (H, W), with BETWEEN between them; at most COLUMNS maps or
        UNITS_A_ROW units wide, no more than MAX_MAPS or MAX_UNITS.
    """
    values = values.detach().float().cpu().nan_to_num()
    low, high = values.min(), values.max()
    values = ((values - low) / (high - low).clamp(min=1e-12) * (BETWEEN - 1)).byte()
    is_units = values.dim() == 1
    maps = values[:MAX_UNITS].view(-1, 1, 1) if is_units else values.reshape(-1, *values.shape[-2:])[:MAX_MAPS]
    longest = max(maps.shape[1:])
    scale = tile // 5 if is_units else tile // longest or tile / longest
    size = [max(1, int(scale * side)) for side in maps.shape[1:]]
    maps = F.interpolate(maps.unsqueeze(1), size, mode="nearest")  # (N, 1, H, W)
    columns, gap = (UNITS_A_ROW, 0) if is_units else (COLUMNS, GAP)
    grid = make_grid(F.pad(maps, (0, gap, 0, gap), value=BETWEEN), columns, padding=0, pad_value=BETWEEN)
    picture: NDArray[np.uint8] = grid[0, : grid.shape[1] - gap, : grid.shape[2] - gap].numpy()
    return picture


def draw_layers(layers: list[Layer]) -> NDArray[np.uint8]:
    """The layers of the first image of a batch, one below the other as in LeCun's figures, with names and shapes.

    Returns:
        Grey, (H, W).
    """
    parts = [(layer.name, layer.values[0], draw_values(layer.values[0])) for layer in layers if layer.values.dim() < 5]
    width = MARGIN + COLUMNS * (TILE + GAP)
    height = sum(max(picture.shape[0], 2 * FONT_SIZE) + 3 * GAP for _, _, picture in parts)
    page = Image.new("L", (width, height), BETWEEN)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    top = 2 * GAP
    for name, values, picture in parts:
        text = f"{name}\n{describe_shape(values)}"
        draw.multiline_text((GAP, top - GAP // 2), text, fill=0, font=font, spacing=2)
        page.paste(Image.fromarray(picture), (MARGIN, top))
        top += max(picture.shape[0], 2 * FONT_SIZE) + 3 * GAP
    pixels = np.array(page)
    pixels[pixels == BETWEEN] = PAPER
    return pixels


def describe_shape(values: Tensor) -> str:
    """The shape of what a layer made of one image, as in ``6 x 28 x 28`` or ``84``."""
    return " x ".join(map(str, values.shape))


def find_filters(net: nn.Module) -> Layer | None:
    """The first convolution whose kernels are worth a look, as a batch of one, (1, C, H, W); None without one.

    A kernel is the mean over the channels that it sees.
    """
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and min(module.kernel_size) > 1:
            return Layer(name, module.weight.detach().mean(dim=1).unsqueeze(0))
    return None
