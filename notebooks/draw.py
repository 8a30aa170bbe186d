"""The READMEs' figures: ``python -m notebooks.draw [run folder]``."""

import argparse
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from notebooks.results import Sweep, read_results, select
from src.models.lenet5 import LeNet5

FIGURES = Path(__file__).parent / "figures"
INK, GREY = "#1f2328", "#59636e"
FILLS = {"input": "#e6e8eb", "conv": "#a9cdf0", "pool": "#f7cf9a", "linear": "#b4dfb4"}
TRAIN, VAL, DISTORTED = "#0969da", "#bc4c00", "#1a7f37"

# The architecture is drawn in pixels of the feature maps: the input is 32 wide.
STACK_DEPTH = 9.0  # how far a stack's front map lies from its rearmost, in x and in y, for 16 maps
GAP = 13.5  # between two layers
UNIT_HEIGHT, UNIT_WIDTH = 0.36, 2.6  # a unit of a fully connected layer


@dataclass(frozen=True)
class Layer:
    """A layer as it is drawn.

    Attributes:
        name: Its name in the paper.
        kind: A key of ``FILLS``.
        operation: What it does.
        shape: Its output's shape without the batch: (C, H, W) or (N,).
        window: Width of the square of its input that one of its outputs sees, 0 where that is all of it.
        num_params: Number of its trainable parameters.
    """

    name: str
    kind: str
    operation: str
    shape: tuple[int, ...]
    window: int = 0
    num_params: int = 0

    @property
    def size(self) -> str:
        """The shape as in the paper's text: width x height x maps."""
        return "x".join(str(length) for length in reversed(self.shape))

    @property
    def width(self) -> float:
        """Width of the drawing, all maps of the stack together."""
        return UNIT_WIDTH if len(self.shape) == 1 else self.shape[-1] + self.depth

    @property
    def height(self) -> float:
        """Height of the drawing, all maps of the stack together."""
        return self.shape[0] * UNIT_HEIGHT if len(self.shape) == 1 else self.shape[-2] + self.depth

    @property
    def depth(self) -> float:
        """How far the front map lies from the rearmost, in x and in y."""
        return 0.0 if len(self.shape) == 1 else STACK_DEPTH * math.sqrt((self.shape[0] - 1) / 15)


def read_layers(model: nn.Module, images: Tensor) -> list[Layer]:
    """Run a model and note what each of its convolutions, poolings and linear layers does.

    Args:
        model: A model whose layers run one after the other.
        images: A batch for it, (B, C, H, W).

    Returns:
        The input and the layers in the order in which they ran.
    """
    layers = [Layer("input", "input", "image", tuple(images.shape[1:]))]
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[module]
        name = name.upper() if name[-1:].isdigit() else name
        shape, num_params = tuple(output.shape[1:]), sum(p.numel() for p in module.parameters())
        if isinstance(module, nn.Conv2d):
            window = module.kernel_size[0]
            layers.append(Layer(name, "conv", f"conv {window}x{window}", shape, window, num_params))
        elif isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
            window = inputs[0].shape[-1] // shape[-1]
            layers.append(Layer(name, "pool", f"pool {window}x{window}", shape, window, num_params))
        elif isinstance(module, nn.Linear):
            layers.append(Layer(name, "linear", "linear", shape, 0, num_params))

    hooks = [module.register_forward_hook(note) for module in model.modules() if not list(module.children())]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return layers


def draw_architecture(path: Path) -> None:
    """Draw LeNet-5 as in figure 2 of LeCun et al. (1998); sizes and numbers are read from the model.

    Args:
        path: The SVG file to write.
    """
    model = LeNet5()
    layers = read_layers(model, torch.zeros(1, 1, 32, 32))
    total = sum(parameter.numel() for parameter in model.parameters())

    lefts = [0.0]
    for layer, following in pairwise(layers):
        # A thin layer takes the room that its label needs.
        lefts.append(lefts[-1] + layer.width + max(GAP, 24 - (layer.width + following.width) / 2))
    right, top = lefts[-1] + layers[-1].width, max(layer.height for layer in layers) / 2
    left_edge, right_edge, low, high = -4.0, right + 6, -top - 15, top + 11

    with rc_context({"svg.hashsalt": "lenet5", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(13, 13 * (high - low) / (right_edge - left_edge)), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(left_edge, right_edge), ylim=(low, high), aspect="equal")
        axes.set_axis_off()
        for layer, left in zip(layers, lefts, strict=True):
            _draw_layer(axes, layer, left)
            middle = left + layer.width / 2
            axes.text(middle, top + 6, layer.name, ha="center", va="baseline", fontsize=13, weight="bold", color=INK)
            axes.text(middle, top + 2, layer.size, ha="center", va="baseline", fontsize=11, color=INK)
            axes.text(middle, -top - 4, layer.operation, ha="center", va="baseline", fontsize=11, color=INK)
            count = "parameters" if layer.kind == "input" else f"{layer.num_params:,}"
            axes.text(middle, -top - 8, count, ha="center", va="baseline", fontsize=11, color=GREY)
        for number in range(1, len(layers)):
            _draw_connection(axes, layers[number - 1], lefts[number - 1], layers[number], lefts[number])
        sum_of_all = f"total: {total:,}"
        axes.text(layers[0].width / 2, -top - 12, sum_of_all, ha="center", va="baseline", fontsize=11, color=GREY)
        save_figure(figure, path)


def _draw_layer(axes: Axes, layer: Layer, left: float) -> None:
    """A stack of maps, the front one lowest and rightmost, or a column of units."""
    if len(layer.shape) == 1:
        box = Rectangle((left, -layer.height / 2), layer.width, layer.height, fc=FILLS[layer.kind], ec=INK, lw=0.8)
        axes.add_patch(box)
        return
    maps, height, width = layer.shape
    for number in range(maps):
        shift = layer.depth * number / max(maps - 1, 1)
        corner = (left + shift, layer.height / 2 - height - shift)
        axes.add_patch(Rectangle(corner, width, height, fc=FILLS[layer.kind], ec=INK, lw=0.8))


def _draw_connection(axes: Axes, source: Layer, source_left: float, target: Layer, target_left: float) -> None:
    """Lines from what a unit of the target sees, a window or all of the source, to the target."""
    source_right, target_top = source_left + source.width, target.height / 2
    if target.window:
        # A window of the front map, and the unit that it goes to, at the visible edge of the target's rearmost map.
        size = target.window
        x, y = source_right - 1.5 - size, -source.height / 2 + source.shape[-2] * 0.55
        unit_x, unit_y = target_left + 0.8, target_top - target.shape[-2] * 0.6
        axes.add_patch(Rectangle((x, y), size, size, fc="white", ec=INK, lw=0.8))
        for start in ((x + size, y), (x + size, y + size)):
            axes.plot((start[0], unit_x), (start[1], unit_y), color=GREY, lw=0.7)
        return
    starts = source.height / 2 - source.depth, -source.height / 2
    for start_y, end_y in zip(starts, (target_top, -target_top), strict=True):
        axes.plot((source_right, target_left), (start_y, end_y), color=GREY, lw=0.7)


def draw_curves(log_dir: Path, path: Path) -> None:
    """Draw a run's loss and accuracy in training and validation.

    Args:
        log_dir: A folder with TensorBoard event files.
        path: The SVG file to write.

    Raises:
        ValueError: If there is no such folder, or no such curves in it.
    """
    if not log_dir.is_dir():
        raise ValueError(f"{log_dir}: no such folder")
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    missing = {f"{stage}/{name}" for stage in ("train", "val") for name in ("loss", "acc")}
    missing -= set(events.Tags()["scalars"])
    if missing:
        raise ValueError(f"{log_dir}: no TensorBoard events of {', '.join(sorted(missing))}")

    with rc_context({"svg.hashsalt": "curves", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(11, 3.8), facecolor="white", layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, name, title in zip(panels, ("loss", "acc"), ("loss", "accuracy"), strict=True):
            for stage, color, marker in (("train", TRAIN, "o"), ("val", VAL, "s")):
                points = events.Scalars(f"{stage}/{name}")
                steps, values = [point.step for point in points], [point.value for point in points]
                label = f"{stage}/{name}  (last: {values[-1]:.4f})"
                axes.plot(steps, values, color=color, marker=marker, markersize=4, lw=1.6, label=label)
            axes.set_title(title, color=INK)
            axes.set_xlabel("step", color=INK)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.tick_params(colors=INK)
            axes.grid(color="#d1d9e0", lw=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, labelcolor=INK)
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_formatter("{x:g}")
        save_figure(figure, path)


def draw_paper(results: dict[str, Sweep], path: Path) -> None:
    """Draw the paper's figures 5 and 6 from our runs: error against passes, and against the number of training images.

    The paper read its test error after each pass; we read validation there, and test once. Its numbers are those of its
    text (section III-B).

    Args:
        results: What results.json holds; needs ``paper1998`` and ``paper1998_distorted``, and draws
            ``paper1998_train_size`` where it is there.
        path: The SVG file to write.
    """
    plain, distorted = results["paper1998"]["runs"], results["paper1998_distorted"]["runs"]
    runs_of = {}
    if fewer := results.get("paper1998_train_size"):
        runs_of = {size: select(fewer, data__train_size=size) for size in (15_000, 30_000)}
    num_plain, num_distorted = (
        results[name]["data"]["num_images"]["train"] for name in ("paper1998", "paper1998_distorted")
    )
    runs_of[num_plain] = plain
    with rc_context({"svg.hashsalt": "paper", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(11, 3.8), facecolor="white", layout="constrained")
        passes, images = figure.subplots(1, 2)
        for runs, name, color, label in (
            (plain, "train/acc", TRAIN, "training"),
            (plain, "val/acc", VAL, "validation"),
            (distorted, "val/acc", DISTORTED, "validation, with distortions"),
        ):
            errors = 100 - 100 * np.array([run[name] for run in runs])  # (n, passes)
            mean, std = errors.mean(axis=0), errors.std(axis=0, ddof=1)
            x = np.arange(1, len(mean) + 1)
            passes.plot(x, mean, color=color, lw=1.6, label=label)
            passes.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, lw=0)
        passes.axhline(0.95, color=GREY, ls="--", lw=1, label="paper, test: 0.95 %")
        passes.axhline(0.35, color=GREY, ls=":", lw=1, label="paper, training: 0.35 %")
        passes.set_ylim(0, 3)
        passes.set_xticks(range(0, 21, 4))
        passes.set_xlabel("passes over the training images", color=INK)

        for runs_by_size, color, label in (
            (runs_of, VAL, "test"),
            ({num_distorted: distorted}, DISTORTED, "test, with distortions"),
        ):
            tests = [[100 - 100 * run["test/acc"] for run in runs] for runs in runs_by_size.values()]
            mean, std = np.mean(tests, axis=1), np.std(tests, axis=1, ddof=1)
            images.errorbar(list(runs_by_size), mean, std, color=color, marker="o", capsize=3, lw=1.6, label=label)
        for error, marker, label in ((0.95, "s", "paper: 0.95 %"), (0.8, "D", "paper, with distortions: 0.8 %")):
            images.plot([60_000], [error], color=GREY, marker=marker, ls="none", label=label)
        images.set_ylim(0, None)
        images.set_xlim(10_000, 65_000)
        images.set_xticks(list(runs_of))
        images.xaxis.set_major_formatter("{x:,.0f}")
        images.set_xlabel("training images", color=INK)

        for axes in (passes, images):
            axes.set_ylabel("error, %", color=INK)
            axes.tick_params(colors=INK)
            axes.grid(color="#d1d9e0", lw=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, labelcolor=INK)
        save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same, byte for byte, each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})


def main() -> None:
    """Draw the architecture, the results beside the paper's, and the curves of a run where one is given."""
    parser = argparse.ArgumentParser(prog="python -m notebooks.draw", description=main.__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="a run's folder, with its TensorBoard event files")
    args = parser.parse_args()
    draw_architecture(FIGURES / "lenet5.svg")
    draw_paper(read_results(), FIGURES / "paper.svg")
    if args.run:
        try:
            draw_curves(args.run, FIGURES / "curves.svg")
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
