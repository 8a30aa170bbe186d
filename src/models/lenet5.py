"""LeNet-5, the convolutional network of LeCun et al. (1998), in today's layers."""

from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
POOLINGS: dict[str, type[nn.Module]] = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


class LeNet5(nn.Module):
    """LeNet-5: two convolutions with pooling, then three fully connected layers; 61,706 parameters by default.

    ======  ===========================  ===============  ==========
    layer   operation                    output shape     parameters
    ======  ===========================  ===============  ==========
    input                                (B, 1, 32, 32)
    C1      convolution 5x5, activation  (B, 6, 28, 28)          156
    S2      pooling 2x2                  (B, 6, 14, 14)            0
    C3      convolution 5x5, activation  (B, 16, 10, 10)       2,416
    S4      pooling 2x2                  (B, 16, 5, 5)             0
    C5      convolution 5x5, activation  (B, 120)             48,120
    F6      fully connected, activation  (B, 84)              10,164
    output  fully connected              (B, 10)                 850
    ======  ===========================  ===============  ==========

    C5 sees all of S4's 5x5 maps at once, so it is written as the fully connected layer that it equals.

    Args:
        num_classes: Number of classes, 1 or more.
        in_channels: Channels of the input images, 1 or more.
        activation: ``"tanh"`` as in the paper (without its scaling), or ``"relu"``.
        pooling: ``"avg"`` as in the paper (without its trainable coefficients), or ``"max"``.

    Raises:
        ValueError: If an argument is none of the above.

    Source:
        LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition, Proc. IEEE 86(11),
        1998, section II-B and figure 2. The paper's C3 connects to a part of S2's maps only (table I) and its output
        layer is radial basis functions; here C3 connects to all six maps and the output layer is linear.

    Example:
        >>> import torch
        >>> LeNet5()(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, activation: str = "tanh", pooling: str = "avg"
    ) -> None:
        super().__init__()
        for name, size in (("num_classes", num_classes), ("in_channels", in_channels)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size}: expected a whole number of 1 or more")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation}: expected one of {', '.join(ACTIVATIONS)}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling}: expected one of {', '.join(POOLINGS)}")
        act, pool = ACTIVATIONS[activation], POOLINGS[pooling]
        self.c1 = nn.Conv2d(in_channels, 6, kernel_size=5)
        self.s2 = pool(2)
        self.c3 = nn.Conv2d(6, 16, kernel_size=5)
        self.s4 = pool(2)
        self.c5 = nn.Linear(16 * 5 * 5, 120)
        self.f6 = nn.Linear(120, 84)
        self.output = nn.Linear(84, num_classes)
        self.act = act()

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of a batch.

        Args:
            images: Normalised images, float, (B, in_channels, 32, 32).

        Returns:
            Logits, (B, num_classes): log-probabilities up to a constant per image.
        """
        x = self.s2(self.act(self.c1(images)))  # (B, 6, 14, 14)
        x = self.s4(self.act(self.c3(x)))  # (B, 16, 5, 5)
        x = self.act(self.c5(x.flatten(start_dim=1)))  # (B, 120)
        x = self.act(self.f6(x))  # (B, 84)
        logits: Tensor = self.output(x)  # (B, num_classes)
        return logits
