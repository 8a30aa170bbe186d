"""What each layer makes of an image, compared with the net's own calls one by one; and its pictures, pixel by pixel."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from torch import Tensor, nn

from src.callbacks.layers import BETWEEN, PAPER, TILE, Layer, draw_layers, draw_values, find_filters, to_pixels, trace


class Ours(nn.Module):
    """A user's net: shared layers, a normalisation, an activation in place, dropout, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.same = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 2 * 3, 5), nn.LogSoftmax(dim=1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.stem(images))
        x = self.drop(self.pool(self.same(x)))
        logits: Tensor = self.head(x)
        return logits


def test_any_net_is_traced_and_left_as_it_was() -> None:
    net = Ours()
    net.stem.eval()  # a frozen part
    images = torch.randn(2, 3, 8, 12)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    layers, logits = trace(net, images)
    assert [(layer.name, tuple(layer.values.shape[1:])) for layer in layers] == [
        ("stem.0", (4, 8, 12)), ("pool", (4, 4, 6)), ("same", (4, 4, 6)), ("pool", (4, 2, 3)), ("head.1", (5,)),
    ]  # fmt: skip
    assert layers[0].values.min() == 0  # behind the activation
    torch.testing.assert_close(logits, net.eval()(images))  # without dropout
    torch.testing.assert_close(layers[-1].values, logits)  # behind the normalisation
    net.train()
    net.stem.eval()
    trace(net, images)
    assert net.training
    assert net.drop.training
    assert not any(module.training for module in net.stem.modules())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module._forward_hooks for module in net.modules())


def test_a_net_that_fails_is_left_as_it_was() -> None:
    net = Ours()
    with pytest.raises(RuntimeError):
        trace(net, torch.randn(2, 3, 5, 5))
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_compiled_net_is_traced_without_compiling_it() -> None:
    net = Ours()
    calls = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal calls
        calls += 1
        return graph.forward

    layers, _ = trace(torch.compile(net, backend=backend), torch.zeros(1, 3, 8, 12))  # type: ignore[arg-type]
    assert len(layers) == 5
    assert calls == 0


def test_maps_are_drawn_from_black_to_white_side_by_side() -> None:
    values = torch.zeros(9, 5, 5)
    values[0, 0, 0], values[8, 4, 4] = -3, 5
    picture = draw_values(values)
    side, step = 30, 33  # six pixels a value
    assert picture.shape == (step + side, 7 * step + side)  # eight a row
    assert (picture[:6, :6] == 0).all()
    assert (picture[:6, 6:side] == int(3 / 8 * 254)).all()
    assert (picture[-6:, side - 6 : side] == 254).all()
    assert (picture[:, side:step] == BETWEEN).all()
    assert (picture[side:step] == BETWEEN).all()
    assert (picture[step:, step:] == BETWEEN).all()  # the second row has one map


def test_units_are_drawn_in_rows_of_squares() -> None:
    picture = draw_values(torch.arange(84.0), tile=40)
    assert_array_equal(picture[::8, ::8], (np.arange(84) / 83 * 254).astype(np.uint8).reshape(2, 42))
    assert picture.shape == (16, 336)


@pytest.mark.parametrize("values", [torch.zeros(3, 4, 4), torch.full((5,), torch.nan), torch.zeros(1, 1, 1)])
def test_values_without_a_range_are_drawn_all_the_same(values: Tensor) -> None:
    assert set(np.unique(draw_values(values))) <= {0, BETWEEN}


def test_many_maps_large_ones_and_sequences_make_no_large_picture() -> None:
    for shape in ((512, 56, 56), (3, 224, 224), (197, 768), (4096,), (1000, 1, 1)):
        height, width = draw_values(torch.randn(shape)).shape
        assert height <= 4 * (TILE + 3)
        assert width <= 8 * (TILE + 3)


def test_layers_are_drawn_one_below_the_other() -> None:
    maps, units = torch.rand(2, 6, 5, 5), torch.rand(2, 10)
    page = draw_layers([Layer("c1", maps), Layer("f6", units)])
    assert page.shape[1] == 350  # as wide as TensorBoard shows it
    for picture in (draw_values(maps[0]), draw_values(units[0])):
        shown = np.where(picture == BETWEEN, PAPER, picture)
        height, width = shown.shape
        windows = np.lib.stride_tricks.sliding_window_view(page[:, 70 : 70 + width], (height, width))[:, 0]
        assert (windows == shown).all(axis=(1, 2)).sum() == 1
    assert (page[:, :70] < 100).any()  # the names


def test_filters_are_those_of_the_first_convolution() -> None:
    net = Ours()
    filters = find_filters(net)
    assert filters is not None
    assert filters.name == "stem.0"
    torch.testing.assert_close(filters.values[0], net.stem[0].weight.mean(dim=1))  # type: ignore[operator]
    assert find_filters(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Linear(2, 2))) is None


@pytest.mark.parametrize("channels", [1, 2, 3, 7])
def test_images_of_any_range_and_number_of_channels_become_pixels(channels: int) -> None:
    images = torch.rand(3, channels, 4, 6) * torch.tensor([1.0, 100.0, 1e-3]).view(3, 1, 1, 1) - 5
    pixels = to_pixels(images)
    assert pixels.shape == (3, 4, 6, 3)
    assert_array_equal(pixels.min(axis=(1, 2, 3)), 0)
    assert (pixels.max(axis=(1, 2, 3)) >= 254).all()
    if channels == 3:
        assert_array_equal(pixels[1].reshape(-1).argmax(), images[1].permute(1, 2, 0).reshape(-1).argmax())
    else:
        assert_array_equal(pixels[..., 0], pixels[..., 2])
