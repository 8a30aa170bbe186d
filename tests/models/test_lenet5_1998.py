import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import gradcheck

from src.engine.runs.build import build_datamodule, build_module
from src.engine.runs.trainer import build_trainer
from src.models.lenet5_1998 import (
    MEAN,
    RBF,
    STD,
    GlobalRates,
    OriginalLeNet5,
    PenaltyLoss,
    Squashing,
    Subsampling,
    TableConv2d,
    parse_bitmaps,
    parse_table,
)
from tests.compose import compose_cfg

# Table I as section II-B tells it in words, map by map.
CONNECTIONS = [
    {0, 1, 2}, {1, 2, 3}, {2, 3, 4}, {3, 4, 5}, {4, 5, 0}, {5, 0, 1},
    {0, 1, 2, 3}, {1, 2, 3, 4}, {2, 3, 4, 5}, {3, 4, 5, 0}, {4, 5, 0, 1}, {5, 0, 1, 2},
    {0, 1, 3, 4}, {1, 2, 4, 5}, {2, 3, 5, 0},
    {0, 1, 2, 3, 4, 5},
]  # fmt: skip
FAN_IN = {"c1": 25, "s2": 4, "s4": 4, "c5": 400, "f6": 120}


def _double(*shape: int, seed: int = 0) -> Tensor:
    numbers = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return numbers.requires_grad_()


def _randomise(layer: nn.Module) -> nn.Module:
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = _double(*parameter.shape, seed=seed + 1).detach()
    return layer


def _check_gradients(layer: nn.Module, inputs: Tensor) -> bool:
    """Those with respect to the inputs and to all parameters, against finite differences."""
    names = [name for name, _ in layer.named_parameters()]

    def compute(inputs: Tensor, *values: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (inputs,))
        return output

    return gradcheck(compute, (inputs, *layer.parameters()))


def test_has_60000_trainable_parameters_as_many_a_layer_as_in_the_paper() -> None:
    net = OriginalLeNet5()
    by_layer = {name: sum(p.numel() for p in layer.parameters()) for name, layer in net.named_children()}
    assert {name: count for name, count in by_layer.items() if count} == {
        "c1": 156,
        "s2": 12,
        "c3": 1_516,
        "s4": 32,
        "c5": 48_120,
        "f6": 10_164,
    }
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 60_000


def test_has_the_papers_shapes_and_its_340908_connections() -> None:
    net = OriginalLeNet5()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in net.named_children():
        if name != "squash":
            layer.register_forward_hook(
                lambda _m, _i, output, name=name: shapes.update({name: tuple(output.shape[1:])})
            )
    assert net(torch.zeros(3, 1, 32, 32)).shape == (3, 10)
    assert shapes == {
        "c1": (6, 28, 28),
        "s2": (6, 14, 14),
        "c3": (16, 10, 10),
        "s4": (16, 5, 5),
        "c5": (120,),
        "f6": (84,),
        "rbf": (10,),
    }
    # Each unit of a map has a connection per parameter, but one per input, four, for each coefficient of subsampling.
    parameters = {name: sum(p.numel() for p in getattr(net, name).parameters()) for name in shapes}
    parameters |= {"s2": 6 * (4 + 1), "s4": 16 * (4 + 1), "rbf": net.rbf.codes.numel()}
    assert sum(count * math.prod(shapes[name][1:]) for name, count in parameters.items()) == 340_908


def test_c3_sees_the_maps_of_table_i() -> None:
    table = parse_table()
    assert [set(row.nonzero().flatten().tolist()) for row in table] == CONNECTIONS
    assert table.sum(dim=1).tolist() == [3] * 6 + [4] * 9 + [6]
    assert table.sum(dim=0).tolist() == [10] * 6


def test_table_convolution_equals_plain_loops_over_connections() -> None:
    layer = TableConv2d(parse_table(), kernel_size=5)
    _randomise(layer)
    maps = _double(2, 6, 7, 8).detach()
    kernels, x = iter(layer.weight.detach().numpy()), maps.numpy()
    expected = np.tile(layer.bias.detach().numpy().reshape(16, 1, 1), (2, 1, 3, 4))
    for out, seen in enumerate(CONNECTIONS):
        for source in sorted(seen):
            kernel = next(kernels)
            for row in range(3):
                for column in range(4):
                    patch = x[:, source, row : row + 5, column : column + 5]
                    expected[:, out, row, column] += (patch * kernel).sum(axis=(1, 2))
    assert next(kernels, None) is None
    np.testing.assert_allclose(layer(maps).detach().numpy(), expected)


def test_subsampling_is_the_sum_of_four_times_a_coefficient_plus_a_bias() -> None:
    layer = Subsampling(2)
    layer.weight.data, layer.bias.data = torch.tensor([0.5, -2.0]), torch.tensor([0.25, 3.0])
    maps = torch.arange(16.0).reshape(1, 2, 2, 4)  # 0 1 2 3 / 4 5 6 7, and so on
    expected = [[[0.5 * (0 + 1 + 4 + 5) + 0.25, 0.5 * (2 + 3 + 6 + 7) + 0.25]]]
    expected += [[[-2.0 * (8 + 9 + 12 + 13) + 3.0, -2.0 * (10 + 11 + 14 + 15) + 3.0]]]
    assert layer(maps)[0].tolist() == expected


def test_squashing_has_its_fixed_points_and_bends_most_there() -> None:
    f = Squashing()
    assert f(torch.tensor([1.0, -1.0, 0.0])).tolist() == pytest.approx([1.0, -1.0, 0.0], abs=1e-5)
    assert f(torch.tensor([50.0, -50.0])).tolist() == pytest.approx([1.7159, -1.7159])
    a = np.linspace(0, 3, 3001)
    second = np.gradient(np.gradient(f(torch.from_numpy(a)).numpy(), a), a)
    assert a[np.abs(second[5:-5]).argmax() + 5] == pytest.approx(1.0, abs=0.02)


def test_gradients_are_those_of_finite_differences() -> None:
    table = torch.tensor([[True, False], [True, True], [False, True]])
    assert _check_gradients(_randomise(Subsampling(3)), _double(2, 3, 4, 6))
    assert _check_gradients(_randomise(TableConv2d(table, kernel_size=2)), _double(2, 2, 4, 3))
    assert _check_gradients(Squashing(), _double(4, 3))
    assert _check_gradients(RBF(_double(4, 5, seed=9).detach()), _double(3, 5))
    labels = torch.tensor([2, 0, 3])
    assert gradcheck(lambda scores: PenaltyLoss(0.7)(scores, labels), (_double(3, 4),))


def test_initial_weights_are_uniform_within_2_4_by_fan_in() -> None:
    torch.manual_seed(0)
    nets = [OriginalLeNet5() for _ in range(30)]
    scaled: dict[str, list[NDArray[np.float32]]] = {}
    for net in nets:
        for name, fan_in in FAN_IN.items():
            for kind in ("weight", "bias"):
                values = getattr(getattr(net, name), kind).detach().numpy()
                scaled.setdefault(f"{name}.{kind}", []).append(values.ravel() * fan_in / 2.4)
        kernels = iter(net.c3.weight.detach().numpy())
        for out, seen in enumerate(CONNECTIONS):
            fan_in = 25 * len(seen)
            group = f"c3.{len(seen)} maps"
            scaled.setdefault(group, []).append(np.array([net.c3.bias[out].item() * fan_in / 2.4]))
            for _ in seen:
                scaled[group].append(next(kernels).ravel() * fan_in / 2.4)
    for name, parts in scaled.items():
        values = np.concatenate(parts)
        assert 0.97 < np.abs(values).max() <= 1 + 1e-6, name
        # A uniform distribution's mean and standard deviation, and what they vary by in a sample of this size.
        assert abs(values.mean()) < 5 * 3**-0.5 / len(values) ** 0.5, name
        assert values.std() == pytest.approx(3**-0.5, abs=2 / len(values) ** 0.5), name


def test_bitmaps_are_of_7_by_12_and_far_from_each_other() -> None:
    bitmaps = parse_bitmaps()
    assert bitmaps.shape == (10, 7 * 12)
    assert set(bitmaps.unique().tolist()) == {-1.0, 1.0}
    distances = (bitmaps[:, None] != bitmaps).sum(dim=2) + 84 * torch.eye(10, dtype=torch.int64)
    assert distances.min() >= 14  # at one digit's bitmap any other's penalty is 4 * 14 or more


def test_bitmaps_are_drawn_so_that_each_is_its_digit() -> None:
    """Holes tell 0, 4, 6, 8 and 9 from the rest; which lines stand where tells each from each."""
    cells = parse_bitmaps().reshape(10, 12, 7) > 0
    middle = [_runs(digit[:, 3]) for digit in cells]  # strokes that a line down the middle crosses
    assert [middle[digit] for digit in (0, 2, 3, 5, 6, 8, 9)] == [2, 3, 3, 3, 3, 3, 3]
    assert [_count_holes(digit.numpy()) for digit in cells] == [1, 0, 0, 0, 0, 0, 1, 0, 2, 1]


def _runs(line: Tensor) -> int:
    return int((line.int().diff(prepend=torch.tensor([0])) == 1).sum())


def _count_holes(cells: NDArray[np.bool_]) -> int:
    """Connected regions of background, but for the one outside."""
    background = ~np.pad(cells, 1)
    regions = 0
    while background.any():
        regions += 1
        todo = [tuple(np.argwhere(background)[0])]
        while todo:
            row, column = todo.pop()
            if 0 <= row < background.shape[0] and 0 <= column < background.shape[1] and background[row, column]:
                background[row, column] = False
                todo += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return regions - 1


def test_pixels_are_taken_for_what_the_data_module_makes_of_them() -> None:
    mnist = pytest.importorskip("src.data.mnist")
    assert (MEAN, STD) == (mnist.MEAN, mnist.STD)


def test_input_is_scaled_from_the_data_modules_to_the_papers() -> None:
    mnist = pytest.importorskip("src.data.mnist")
    images = torch.zeros(1, 28, 28, dtype=torch.uint8)
    images[0, 3, 4], images[0, 5, 6] = 255, 51
    scaled = OriginalLeNet5().scale(mnist.preprocess(images))
    assert scaled[0, 0, 2 + 3, 2 + 4].item() == pytest.approx(1.175, abs=1e-6)
    assert scaled[0, 0, 2 + 5, 2 + 6].item() == pytest.approx(-0.1 + 1.275 / 5, abs=1e-6)
    assert sorted(scaled.flatten().tolist())[:-2] == pytest.approx([-0.1] * (32 * 32 - 2), abs=1e-6)


def test_scores_are_the_negative_penalties_of_the_paper_written_out_in_numpy() -> None:
    torch.manual_seed(0)
    net = OriginalLeNet5().double()
    for parameter in net.parameters():
        parameter.data *= 4  # as they start, the units are nearly linear
    w = {name: parameter.detach().numpy() for name, parameter in net.named_parameters()}
    images = _double(3, 1, 32, 32).detach()

    def f(a: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1.7159 * np.tanh(2 * a / 3)

    def subsample(maps: NDArray[np.float64], layer: str) -> NDArray[np.float64]:
        sums = maps[..., ::2, ::2] + maps[..., 1::2, ::2] + maps[..., ::2, 1::2] + maps[..., 1::2, 1::2]
        return f(np.einsum("m,bmyx->bmyx", w[f"{layer}.weight"], sums) + w[f"{layer}.bias"].reshape(-1, 1, 1))

    def convolve(
        maps: NDArray[np.float64], kernels: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        patches = np.lib.stride_tricks.sliding_window_view(maps, (5, 5), axis=(2, 3))
        return f(np.einsum("bmyxij,omij->boyx", patches, kernels) + bias.reshape(-1, 1, 1))

    c3 = np.zeros((16, 6, 5, 5))
    c3[tuple(zip(*[(out, seen) for out in range(16) for seen in sorted(CONNECTIONS[out])], strict=True))] = w[
        "c3.weight"
    ]
    x = (images.numpy() * 0.3081 + 0.1307) * (1.175 + 0.1) - 0.1
    x = subsample(convolve(x, w["c1.weight"], w["c1.bias"]), "s2")
    x = subsample(convolve(x, c3, w["c3.bias"]), "s4")
    x = convolve(x, w["c5.weight"].reshape(120, 16, 5, 5), w["c5.bias"]).reshape(3, 120)
    x = f(x @ w["f6.weight"].T + w["f6.bias"])
    penalties = ((x[:, None] - parse_bitmaps().numpy()) ** 2).sum(axis=2)
    np.testing.assert_allclose(net(images).detach().numpy(), -penalties)


def test_the_state_that_is_a_bitmap_is_taken_for_its_digit_at_no_penalty() -> None:
    bitmaps = parse_bitmaps()
    penalties = RBF(bitmaps)(bitmaps)
    assert penalties.diagonal().tolist() == [0.0] * 10
    assert (-penalties).argmax(dim=1).tolist() == list(range(10))


@pytest.mark.parametrize("j", [0.1, 1.0, 20.0])
def test_loss_is_that_of_equation_9(j: float) -> None:
    penalties = 30 * torch.rand(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 9, 3, 3, 7, 1])
    total = 0.0
    for row, label in zip(penalties.tolist(), labels.tolist(), strict=True):
        total += row[label] + math.log(math.exp(-j) + sum(math.exp(-penalty) for penalty in row))
    assert PenaltyLoss(j)(-penalties, labels).item() == pytest.approx(total / 6, rel=1e-12)


def test_loss_stays_finite_where_the_exponentials_vanish() -> None:
    penalties = torch.full((1, 10), 600.0)
    assert PenaltyLoss(1.0)(-penalties, torch.tensor([4])).item() == pytest.approx(600 - 1.0)


@pytest.mark.parametrize("j", [0.0, -1, math.inf, math.nan, True, "10", None])
def test_loss_refuses_a_j_that_is_no_number_above_0(j: Any) -> None:
    with pytest.raises(ValueError, match=f"j={j}: expected a number above 0"):
        PenaltyLoss(j)


def test_global_rates_are_those_of_the_papers_20_passes() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0005)
    scheduler = GlobalRates(optimizer)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [5e-4, 5e-4, 2e-4, 2e-4, 2e-4, 1e-4, 1e-4, 1e-4, 5e-5, 5e-5, 5e-5, 5e-5, *[1e-5] * 8]
    assert rates == pytest.approx(expected)


def test_learns_digits_within_an_epoch(tmp_path: Path) -> None:
    cfg = compose_cfg(
        tmp_path, "data=mnist5k", "model=lenet5_1998", "optimizer=sgd_1998", "scheduler=[]", "data.batch_size=16",
        "trainer=cpu", "trainer.max_epochs=1", "logger=[]", "callbacks=minimal", "callbacks.progress=null",
    )  # fmt: skip
    torch.manual_seed(0)
    module, datamodule = build_module(cfg), build_datamodule(cfg)
    assert isinstance(module.loss, PenaltyLoss)
    trainer = build_trainer(cfg)
    trainer.fit(module, datamodule)
    assert trainer.callback_metrics["val/acc"] > 0.5  # 0.1 by chance
    assert trainer.callback_metrics["val/loss"] < 40  # 74 for states of zero, as they are before training
