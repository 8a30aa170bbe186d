"""LeNet-5's layers as its pictures show them."""

import torch
from torch import nn

from src.callbacks.layers import trace
from src.models.lenet5 import LeNet5


def test_lenet5_has_the_papers_layers() -> None:
    net, images = LeNet5(activation="tanh"), torch.randn(2, 1, 32, 32)
    state = torch.get_rng_state()
    layers, logits = trace(net, images)
    assert torch.equal(state, torch.get_rng_state())  # a run goes on in the same way
    with torch.no_grad():
        c1 = net.c1(images).tanh()
        s2 = nn.functional.avg_pool2d(c1, 2)
        c3 = net.c3(s2).tanh()
        s4 = nn.functional.avg_pool2d(c3, 2)
        c5 = net.c5(s4.flatten(1)).tanh()
        f6 = net.f6(c5).tanh()
        output = net.output(f6)
    expected = {"c1": c1, "s2": s2, "c3": c3, "s4": s4, "c5": c5, "f6": f6, "output": output}
    assert [layer.name for layer in layers] == list(expected)
    for layer in layers:
        torch.testing.assert_close(layer.values, expected[layer.name])
    torch.testing.assert_close(logits, output)
