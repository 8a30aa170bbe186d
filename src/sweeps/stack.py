"""Several nets of the same layers as one: their weights with a leading axis, (members, ...), by torch.func."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F


class StackError(RuntimeError):
    """Nets that cannot be computed as one; the message says why."""


class Stack:
    """Computes nets that differ in their weights and dropout rates alone, as one.

    What it computes is what each net would: gradients flow to each one's own parameters, and running statistics are
    written back to each one's own buffers. Dropout draws other numbers than the net alone.

    Args:
        net: One of the nets.
    """

    def __init__(self, net: nn.Module) -> None:
        self._template = copy.deepcopy(net).to("meta")
        vars(self._template).pop("forward", None)  # what stands in for it on the net
        self._dropouts = [name for name, layer in net.named_modules() if type(layer) is nn.Dropout]
        for name, layer in list(self._template.named_modules()):
            if type(layer) in (nn.AvgPool2d, nn.MaxPool2d):
                _replace(self._template, name, _Pool(layer))
            elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
                _replace(self._template, name, _Conv(layer))
            elif name in self._dropouts:
                _replace(self._template, name, _Dropout())
        self._is_checked = False

    def __call__(self, nets: Sequence[nn.Module], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each net's output for its own input, in training or evaluation mode as the first net is.

        Args:
            nets: The nets.
            inputs: An input for each, all of one shape; the same tensor for all is passed on once.

        Raises:
            StackError: If torch.vmap does not take the net, or it computes something else than the nets do.
        """
        if not self._is_checked:
            self._check(nets, inputs)
            self._is_checked = True
        return self._call(nets, inputs)

    def _call(self, nets: Sequence[nn.Module], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        tensors: dict[str, Tensor] = {}
        for name, _ in nets[0].named_parameters():
            tensors[name] = _stack([net.get_parameter(name) for net in nets])
        for name, _ in nets[0].named_buffers():
            tensors[name] = _stack([net.get_buffer(name) for net in nets])
        for name in self._dropouts:
            rates = [net.get_submodule(name).p for net in nets]
            tensors[f"{name}.p"] = torch.tensor(rates, device=inputs[0].device)
        is_shared = all(images is inputs[0] for images in inputs)
        self._template.train(nets[0].training)
        compute = vmap(
            lambda weights, images: functional_call(self._template, weights, (images,)),
            in_dims=(0, None if is_shared else 0),
            randomness="different",
        )
        outputs: Tensor = compute(tensors, _channels_last(inputs[0]) if is_shared else _stack(inputs))
        with torch.no_grad():
            for name, _ in nets[0].named_buffers():
                for net, value in zip(nets, tensors[name].unbind(), strict=True):
                    net.get_buffer(name).copy_(value)
        return outputs.unbind()

    def _check(self, nets: Sequence[nn.Module], inputs: Sequence[Tensor]) -> None:
        """Compare with the nets themselves, in evaluation mode."""
        name = type(nets[0]).__name__
        modes = [net.training for net in nets]
        for net in nets:
            net.eval()
        try:
            with torch.no_grad():
                together = self._call(nets, inputs)
                alone = [type(net).forward(net, images) for net, images in zip(nets, inputs, strict=True)]
        except Exception as error:  # whatever the net raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise StackError(f"torch.vmap does not take {name}: {reason}") from error
        finally:
            for net, mode in zip(nets, modes, strict=True):
                net.train(mode)
        difference = max((a - b).abs().max().item() for a, b in zip(together, alone, strict=True))
        if not difference <= 1e-4 * max(1.0, *(output.abs().max().item() for output in alone)):
            raise StackError(f"{name} computes something else under torch.vmap than alone, by up to {difference:.2g}")


def are_alike(first: nn.Module, other: nn.Module) -> bool:
    """Whether two nets differ in their weights and dropout rates alone, as far as their attributes tell."""
    pairs = zip(first.named_modules(), other.named_modules(), strict=False)
    same_layers = len(list(first.modules())) == len(list(other.modules())) and all(
        a == b and type(x) is type(y) and _attributes(x) == _attributes(y) for (a, x), (b, y) in pairs
    )
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (first, other)]
    return same_layers and shapes[0] == shapes[1]


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in ("training", "forward")
        and not (type(module) is nn.Dropout and name == "p")
    }


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """With a leading axis; images and the weights of convolutions with the channels last in memory."""
    if tensors[0].ndim == 4:
        return torch.stack([tensor.permute(0, 2, 3, 1) for tensor in tensors]).permute(0, 1, 4, 2, 3)
    return torch.stack(list(tensors))


def _channels_last(images: Tensor) -> Tensor:
    if images.ndim == 4 and images.shape[1] == 1:  # one channel can be either; the strides decide for what follows
        _, _, height, width = images.shape
        return images.contiguous().as_strided(images.shape, (height * width, 1, width, 1))
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def _replace(net: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(net.get_submodule(parent), own, layer)


class _Dropout(nn.Module):
    """Dropout with a rate for each member."""

    p: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("p", torch.zeros((), device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return torch.where(torch.rand_like(x) >= self.p, x / (1 - self.p).clamp(min=1e-7), 0.0)


# What follows computes the same as the layers that it takes the place of. vmap would copy the activations, of which
# the members' axis comes first, from and to the layout of a convolution by groups, where it is among the channels.


class _Pool(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return _FoldedPool.apply(x, self.layer)


class _FoldedPool(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, layer: nn.Module) -> Any:
        return layer(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, layer: nn.Module) -> tuple[Tensor, int]:
        outputs = layer(x.movedim(in_dims[0], 1).flatten(1, 2))  # (B, members * C, H, W)
        return outputs.unflatten(1, (info.batch_size, -1)), 1


class _Conv(nn.Module):
    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.groups = layer.weight, layer.bias, layer.groups
        sizes: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.convolve = partial(F.conv2d, **sizes)

    def forward(self, x: Tensor) -> Any:
        return _FoldedConv.apply(x, self.weight, self.bias, self.convolve, self.groups)


class _FoldedConv(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, convolve: Any, groups: int) -> Any:
        return convolve(x, weight, bias, groups=groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor | None, convolve: Any, groups: int
    ) -> tuple[Tensor, int]:
        n, axis = info.batch_size, in_dims[0]
        biases = [None] * n if bias is None else bias
        weights, all_biases = weight.flatten(0, 1), None if bias is None else bias.flatten()
        if axis is None and groups > 1:
            x, axis = x.expand(n, *x.shape), 0
        if axis is None:  # the same images for all: more channels come out
            outputs = convolve(x, weights, all_biases)
        elif groups == 1 and weight.shape[2] < 4:  # groups of few channels are slow
            parts = [convolve(*each) for each in zip(x.unbind(axis), weight, biases, strict=True)]
            outputs = torch.cat(parts, dim=1)
        else:
            outputs = convolve(x.movedim(axis, 1).flatten(1, 2), weights, all_biases, groups=n * groups)
        return outputs.unflatten(1, (n, -1)), 1  # (B, members, C, H, W)
