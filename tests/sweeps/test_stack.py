"""Nets computed as one, compared with the same nets computed alone."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from src.models.lenet5 import ACTIVATIONS, POOLINGS, LeNet5
from src.models.lenet5_1998 import OriginalLeNet5
from src.sweeps.stack import Stack, StackError, are_alike

NUM_NETS, SIZE = 3, 8


class BatchNormNet(nn.Module):
    """Strided, dilated and grouped convolutions, with a bias or none, residuals and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 5, stride=2, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.first(images)).relu()
        x = self.pool(x + self.second(x))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class DropoutNet(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(1024, 2000), nn.Dropout(dropout))

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.layers(images)
        return outputs


class BranchingNet(nn.Module):
    """Its way depends on its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1024, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits if logits.sum() > 0 else -logits


def make_nets(make: Callable[[], nn.Module]) -> list[nn.Module]:
    nets = []
    for seed in range(NUM_NETS):
        torch.manual_seed(seed)
        nets.append(make().to(memory_format=torch.channels_last))
    return nets


def make_inputs(is_shared: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(SIZE, 1, 32, 32, generator=generator) for _ in range(NUM_NETS)]
    return inputs[:1] * NUM_NETS if is_shared else inputs


def losses_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [(output.square() * torch.arange(1, output.shape[1] + 1)).mean() for output in outputs]


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        *(lambda a=a, p=p: LeNet5(activation=a, pooling=p) for a in ACTIVATIONS for p in POOLINGS),
        lambda: LeNet5(in_channels=1, num_classes=3),
        OriginalLeNet5,
        BatchNormNet,
    ],
)
def test_outputs_gradients_and_statistics_are_those_of_the_nets_alone(
    make: Callable[[], nn.Module], is_shared: bool
) -> None:
    nets = make_nets(make)
    alone = copy.deepcopy(nets)
    inputs = make_inputs(is_shared)
    stack = Stack(nets[0])
    for _ in range(2):  # running statistics of two steps
        outputs = stack(nets, inputs)
        torch.autograd.backward(losses_of(outputs))
        expected = [net(images) for net, images in zip(alone, inputs, strict=True)]
        torch.autograd.backward(losses_of(expected))
        torch.testing.assert_close(list(outputs), expected, rtol=1e-4, atol=1e-5)
    for net, other in zip(nets, alone, strict=True):
        for (name, parameter), same in zip(net.named_parameters(), other.parameters(), strict=True):
            if same.grad is None:
                assert not parameter.requires_grad
                continue
            torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-3, atol=1e-5, msg=name)
        torch.testing.assert_close(dict(net.named_buffers()), dict(other.named_buffers()))


def test_a_part_of_the_nets_may_be_asked_for() -> None:
    nets, inputs = make_nets(LeNet5), make_inputs(is_shared=False)
    stack = Stack(nets[0])
    stack(nets, inputs)
    (output,) = stack(nets[2:], inputs[2:])
    torch.testing.assert_close(output, nets[2](inputs[2]))


def test_a_net_whose_loss_is_not_finite_leaves_the_others_alone() -> None:
    nets, inputs = make_nets(LeNet5), make_inputs(is_shared=True)
    with torch.no_grad():
        nets[1].get_parameter("c1.weight").fill_(float("nan"))
    torch.autograd.backward(losses_of(Stack(nets[0])._call(nets, inputs)))
    for net, is_sound in zip(nets, (True, False, True), strict=True):
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) is is_sound for p in [*net.parameters()][:2])


def test_each_net_drops_at_its_own_rate() -> None:
    rates = [0.0, 0.25, 0.75]
    nets: list[nn.Module] = [DropoutNet(rate) for rate in rates]
    assert are_alike(nets[0], nets[1])
    inputs = make_inputs(is_shared=True)
    stack = Stack(nets[0])
    outputs = stack(nets, inputs)
    for net, rate, output in zip(nets, rates, outputs, strict=True):
        assert (output == 0).float().mean().item() == pytest.approx(rate, abs=0.02)
        whole = net.eval()(inputs[0])
        kept = output != 0
        torch.testing.assert_close(output[kept], whole[kept] / (1 - rate), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stack(nets, inputs)[2], nets[2](inputs[2]))


def test_nets_that_differ_in_more_than_weights_are_not_alike() -> None:
    net = LeNet5()
    assert are_alike(net, LeNet5())
    assert not are_alike(net, LeNet5(activation="relu"))
    assert not are_alike(net, LeNet5(num_classes=11))
    pools = [nn.Sequential(nn.AvgPool2d(2)), nn.Sequential(nn.AvgPool2d(3))]
    assert not are_alike(*pools)


def test_a_net_that_vmap_does_not_take_is_named() -> None:
    nets, inputs = make_nets(BranchingNet), make_inputs(is_shared=True)
    with pytest.raises(StackError, match=r"^torch.vmap does not take BranchingNet: .*control flow"):
        Stack(nets[0])(nets, inputs)


def test_a_net_that_computes_something_else_is_found() -> None:
    class Scaled(nn.Module):
        """What no attribute of a layer shows."""

        def __init__(self, scale: float) -> None:
            super().__init__()
            self.layer = nn.Linear(1024, 10)
            self._scale = scale

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.layer(images.flatten(1)) * self._scale
            return logits

    nets: list[nn.Module] = [Scaled(1.0), Scaled(2.0), Scaled(3.0)]
    with pytest.raises(StackError, match=r"^Scaled computes something else under torch\.vmap"):
        Stack(nets[0])(nets, make_inputs(is_shared=True))
