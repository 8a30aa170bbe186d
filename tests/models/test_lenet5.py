from typing import Any

import pytest
import torch
from torch import nn

from src.models.lenet5 import LeNet5


def test_has_the_papers_layer_shapes() -> None:
    net = LeNet5()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in net.named_children():
        if name != "act":
            layer.register_forward_hook(
                lambda _m, _i, output, name=name: shapes.update({name: tuple(output.shape[1:])})
            )
    net(torch.zeros(3, 1, 32, 32))
    assert shapes == {
        "c1": (6, 28, 28),
        "s2": (6, 14, 14),
        "c3": (16, 10, 10),
        "s4": (16, 5, 5),
        "c5": (120,),
        "f6": (84,),
        "output": (10,),
    }


def test_has_61706_parameters() -> None:
    by_layer = {name: sum(p.numel() for p in layer.parameters()) for name, layer in LeNet5().named_children()}
    assert {name: count for name, count in by_layer.items() if count} == {
        "c1": 6 * (25 + 1),
        "c3": 16 * (6 * 25 + 1),
        "c5": 120 * (16 * 25 + 1),
        "f6": 84 * (120 + 1),
        "output": 10 * (84 + 1),
    }
    assert sum(by_layer.values()) == 61_706


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_equals_the_textbook_form_with_c5_as_a_convolution(activation: str, pooling: str) -> None:
    net = LeNet5(num_classes=7, in_channels=2, activation=activation, pooling=pooling)
    act = {"tanh": nn.Tanh, "relu": nn.ReLU}[activation]
    pool = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}[pooling]
    textbook = nn.Sequential(
        nn.Conv2d(2, 6, 5), act(), pool(2),
        nn.Conv2d(6, 16, 5), act(), pool(2),
        nn.Conv2d(16, 120, 5), act(), nn.Flatten(),
        nn.Linear(120, 84), act(), nn.Linear(84, 7),
    )  # fmt: skip
    for ours, theirs in zip(net.parameters(), textbook.parameters(), strict=True):
        theirs.data.copy_(ours.reshape(theirs.shape))
    images = torch.randn(5, 2, 32, 32)
    torch.testing.assert_close(net(images), textbook(images))


def test_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="activation=sigmoid: expected one of tanh, relu"):
        LeNet5(activation="sigmoid")
    with pytest.raises(ValueError, match="pooling=median: expected one of avg, max"):
        LeNet5(pooling="median")


@pytest.mark.parametrize("name", ["num_classes", "in_channels"])
@pytest.mark.parametrize("value", [0, -1, 10.0, True, "10", None])
def test_refuses_sizes_that_are_no_whole_numbers_of_1_or_more(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: expected a whole number of 1 or more"):
        LeNet5(**{name: value})
