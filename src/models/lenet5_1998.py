"""LeNet-5 as it was published: 60,000 trainable parameters, and penalties in the place of logits.

LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition, Proc. IEEE 86(11), 1998.
Sections, equations and tables below are that paper's.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

MEAN, STD = 0.1307, 0.3081  # what the data module normalises MNIST's pixels, 0 .. 1, by
BACKGROUND, FOREGROUND = -0.1, 1.175  # section II-B: with these the mean of the inputs is about 0

# Table I: which maps of S2 (rows) each map of C3 (columns) sees. Maps 0 to 5 see three neighbours, 6 to 11 four, 12 to
# 14 two and two, and 15 all.
TABLE_I = """
    X . . . X X X . . X X X X . X X
    X X . . . X X X . . X X X X . X
    X X X . . . X X X . . X . X X X
    . X X X . . X X X X . . X . X X
    . . X X X . . X X X X . X X . X
    . . . X X X . . X X X X . X X X
"""

# Figure 3 in drawings of our own, 7 wide and 12 high: what F6 is to look like for each digit, # is +1 and . is -1.
BITMAPS = """
    ..###..   ...##..   .#####.   .#####.   ##..##.   #######   ..####.   #######   .#####.   .#####.
    .##.##.   ..###..   ##...##   ##...##   ##..##.   #######   .##....   #######   ##...##   ##...##
    ##...##   .####..   .....##   .....##   ##..##.   ##.....   ##.....   .....##   ##...##   ##...##
    ##...##   ...##..   .....##   .....##   ##..##.   ##.....   ##.....   .....##   ##...##   ##...##
    ##...##   ...##..   ....##.   .....##   ##..##.   ##.....   ##.....   ....##.   .##.##.   ##...##
    ##...##   ...##..   ....##.   ..####.   ##..##.   ######.   ######.   ....##.   ..###..   .######
    ##...##   ...##..   ...##..   ..####.   #######   .....##   ##...##   ...##..   ..###..   .....##
    ##...##   ...##..   ...##..   .....##   #######   .....##   ##...##   ...##..   .##.##.   .....##
    ##...##   ...##..   ..##...   .....##   ....##.   .....##   ##...##   ...##..   ##...##   .....##
    ##...##   ...##..   .##....   .....##   ....##.   .....##   ##...##   ..##...   ##...##   .....##
    .##.##.   ...##..   ##.....   ##...##   ....##.   ##...##   ##...##   ..##...   ##...##   ....##.
    ..###..   .######   #######   .#####.   ....##.   .#####.   .#####.   ..##...   .#####.   .####..
"""

# Section III-B: the global rate of each pass over the training images; the last holds from there on.
RATES = [0.0005] * 2 + [0.0002] * 3 + [0.0001] * 3 + [0.00005] * 4 + [0.00001]


def parse_bitmaps() -> Tensor:
    """The ten digits' bitmaps, -1 or +1, (10, 84): row after row of each drawing."""
    rows = [line.split() for line in BITMAPS.strip().splitlines()]
    digits = ["".join(parts) for parts in zip(*rows, strict=True)]
    return torch.tensor([[1.0 if cell == "#" else -1.0 for cell in digit] for digit in digits])


def parse_table() -> Tensor:
    """Table I, true where a map of C3 sees a map of S2, (16, 6)."""
    rows = [line.split() for line in TABLE_I.strip().splitlines()]
    return torch.tensor([[cell == "X" for cell in column] for column in zip(*rows, strict=True)])


class Squashing(nn.Module):
    """The squashing function f(a) = 1.7159 tanh(2a/3) of equation (6), element by element (appendix A).

    It has f(1) = 1 and f(-1) = -1, and bends most there: targets of +-1 do not drive the units into saturation.
    """

    A = 1.7159
    S = 2 / 3

    def forward(self, sums: Tensor) -> Tensor:
        """States, in (-1.7159, 1.7159), of weighted sums of any shape."""
        return self.A * torch.tanh(self.S * sums)


class Subsampling(nn.Module):
    """The sum of 2x2 inputs times a coefficient plus a bias, both trained, one of each a map (section II-B, S2, S4).

    Args:
        num_maps: Number of maps, 1 or more.
    """

    def __init__(self, num_maps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_maps))
        self.bias = nn.Parameter(torch.empty(num_maps))

    def forward(self, maps: Tensor) -> Tensor:
        """Weighted sums (B, num_maps, H / 2, W / 2) of maps (B, num_maps, H, W)."""
        sums = 4 * F.avg_pool2d(maps, kernel_size=2)
        return self.weight.view(-1, 1, 1) * sums + self.bias.view(-1, 1, 1)


class TableConv2d(nn.Module):
    """A convolution whose output maps see some of the input maps each (section II-B, C3).

    Only the kernels that there are, are parameters: a masked convolution would count, and save, those that are not.

    Args:
        table: True where an output map sees an input map, (out_maps, in_maps).
        kernel_size: Height and width of a kernel, 1 or more.
    """

    connections: Tensor

    def __init__(self, table: Tensor, kernel_size: int) -> None:
        super().__init__()
        self.shape = table.shape
        # Where each kernel belongs among all pairs of maps, counted row after row; it follows from the table.
        self.register_buffer("connections", table.flatten().nonzero().squeeze(1), persistent=False)
        self.weight = nn.Parameter(torch.empty(len(self.connections), kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(len(table)))

    def forward(self, maps: Tensor) -> Tensor:
        """Weighted sums (B, out_maps, H - kernel_size + 1, W - kernel_size + 1) of maps (B, in_maps, H, W)."""
        kernels = self.weight.new_zeros(self.shape.numel(), *self.weight.shape[1:])
        kernels = kernels.index_copy(0, self.connections, self.weight)
        return F.conv2d(maps, kernels.unflatten(0, self.shape), self.bias)


class RBF(nn.Module):
    """Euclidean radial basis functions (equation 7): squared distances to fixed codes.

    Args:
        codes: One a class, (num_classes, F).
    """

    codes: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """Penalties y_i = sum over j of (x_j - w_ij)^2, 0 or more, (B, num_classes), of states x, (B, F)."""
        return (states.unsqueeze(-2) - self.codes).square().sum(dim=-1)


class PenaltyLoss(nn.Module):
    """The loss of equation (9), with its competitive term: small penalty of the right class, large ones of the others.

    With the penalties y_i of an image of class D it is the mean over the images of

        y_D + log(exp(-j) + sum over i of exp(-y_i)),

    which is the cross-entropy of the logits -y_i with one more of -j, for an image that is no digit. The second term is
    the competitive one: it pushes the other classes' penalties up, but those that are large beside j no further.

    Args:
        j: The penalty of the class that is no digit, above 0. The paper does not give its value.

    Raises:
        ValueError: If ``j`` is not above 0.
    """

    def __init__(self, j: float) -> None:
        super().__init__()
        if isinstance(j, bool) or not isinstance(j, int | float) or not 0 < j < math.inf:
            raise ValueError(f"j={j}: expected a number above 0")
        self.j = j

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean loss, 0 or more, of scores -y_i, (B, num_classes), and labels (B,)."""
        return F.cross_entropy(F.pad(scores, (0, 1), value=-self.j), labels)


class OriginalLeNet5(nn.Module):
    """LeNet-5 of section II-B and figure 2: 60,000 trainable parameters, 340,908 connections.

    ======  ================================  ================  ==========
    layer   operation                         output shape      parameters
    ======  ================================  ================  ==========
    input   scaled to -0.1 .. 1.175           (B, 1, 32, 32)
    C1      convolution 5x5, f                (B, 6, 28, 28)           156
    S2      trained subsampling 2x2, f        (B, 6, 14, 14)            12
    C3      convolution 5x5 by table I, f     (B, 16, 10, 10)        1,516
    S4      trained subsampling 2x2, f        (B, 16, 5, 5)             32
    C5      convolution 5x5, f                (B, 120)              48,120
    F6      fully connected, f                (B, 84)               10,164
    output  distance to the digits' bitmaps   (B, 10)
    ======  ================================  ================  ==========

    f is ``Squashing``. C5 sees all of S4's 5x5 maps at once, so it is written as the fully connected layer that it
    equals. Weights and biases start uniform in +-2.4 / fan-in, the number of a unit's inputs (appendix A).

    Example:
        >>> import torch
        >>> OriginalLeNet5()(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        table = parse_table()
        self.c1 = nn.Conv2d(1, 6, kernel_size=5)
        self.s2 = Subsampling(6)
        self.c3 = TableConv2d(table, kernel_size=5)
        self.s4 = Subsampling(16)
        self.c5 = nn.Linear(16 * 5 * 5, 120)
        self.f6 = nn.Linear(120, 84)
        self.squash = Squashing()
        self.rbf = RBF(parse_bitmaps())

        for layer, fan_in in ((self.c1, 25), (self.s2, 4), (self.s4, 4), (self.c5, 400), (self.f6, 120)):
            for parameter in layer.parameters():
                _init_uniform(parameter, fan_in)
        maps_seen = table.sum(dim=1)  # 3, 4 or 6: C3's units differ in their number of inputs
        _init_uniform(self.c3.weight, 25 * maps_seen.repeat_interleave(maps_seen).view(-1, 1, 1))
        _init_uniform(self.c3.bias, 25 * maps_seen)

    def scale(self, images: Tensor) -> Tensor:
        """Turn images normalised by the data module into the paper's, background -0.1 and foreground 1.175."""
        pixels = images * STD + MEAN  # 0 .. 1
        return BACKGROUND + (FOREGROUND - BACKGROUND) * pixels

    def forward(self, images: Tensor) -> Tensor:
        """Compute the classes' scores: the negative penalties, so that the smallest penalty is the largest score.

        Args:
            images: Images as ``src.data.mnist.preprocess`` makes them, float, (B, 1, 32, 32).

        Returns:
            Scores -y_i, 0 or less, (B, 10). Like logits they are log-probabilities up to a constant per image, for
            images that are a digit.
        """
        x = self.squash(self.c1(self.scale(images)))  # (B, 6, 28, 28)
        x = self.squash(self.s2(x))  # (B, 6, 14, 14)
        x = self.squash(self.c3(x))  # (B, 16, 10, 10)
        x = self.squash(self.s4(x))  # (B, 16, 5, 5)
        x = self.squash(self.c5(x.flatten(start_dim=1)))  # (B, 120)
        x = self.squash(self.f6(x))  # (B, 84)
        scores: Tensor = -self.rbf(x)
        return scores


class GlobalRates(LambdaLR):
    """The paper's schedule of global rates (section III-B), in proportion to the rate of the first pass.

    Args:
        optimizer: The optimizer; its learning rate stands for the paper's first, 0.0005.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, lambda epoch: RATES[min(epoch, len(RATES) - 1)] / RATES[0])


def _init_uniform(parameter: Tensor, fan_in: Tensor | int) -> None:
    with torch.no_grad():
        parameter.uniform_(-1, 1).mul_(2.4 / fan_in)
