"""How robust classifiers are: ``python -m notebooks.robustness <checkpoint> [<checkpoint> ...] [--root <data>]``.

Prints the accuracy of each on its test images as they are, and under five corruptions of three strengths, as a table in
Markdown, and draws figures/robustness.svg.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from notebooks.draw import DISTORTED, FIGURES, INK, TRAIN, VAL, save_figure
from src.engine.errors import CheckpointError, ConfigError, DataError
from src.engine.runs.build import preprocess, restore, restore_datamodule

STRENGTHS = {  # and their units
    "shift": ((2, 3, 4), "pixels right and down"),
    "rotation": ((15, 30, 45), "degrees"),
    "noise": ((0.1, 0.2, 0.4), "standard deviation, of 1"),
    "blur": ((1, 1.5, 2), "pixels, standard deviation"),
    "inversion": ((0.25, 0.75, 1), "share of the negative"),
}
Accuracies = dict[tuple[str, float], float]  # by corruption and strength; ("none", 0): as they are


def corrupt(images: Tensor, kind: str, strength: float) -> Tensor:
    """Images (B, H, W) or (B, C, H, W), uint8, changed in a way of ``STRENGTHS``; "none" leaves them as they are."""
    values = functional.to_dtype(images, torch.float32, scale=True)
    if kind == "shift":
        values = functional.affine(values, 0, [strength, strength], 1, [0.0, 0.0])
    elif kind == "rotation":
        values = functional.rotate(values, strength, InterpolationMode.BILINEAR)
    elif kind == "noise":
        values = functional.gaussian_noise(values, sigma=strength)
    elif kind == "blur":
        values = functional.gaussian_blur(values, [9, 9], [strength, strength])
    elif kind == "inversion":
        values = torch.lerp(values, 1 - values, strength)
    changed: Tensor = functional.to_dtype(values, torch.uint8, scale=True)
    return changed


def measure(checkpoint: Path, root: str | None = None) -> Accuracies:
    """The accuracy of a checkpoint's classifier on its test images, and on what corruptions make of them, in 0..1.

    Args:
        checkpoint: Of a classifier whose data module yields (images, labels) with uint8 images.
        root: The folder of its data; None for the run's.
    """
    torch.manual_seed(0)  # each is asked about the same noise
    module, datamodule = restore(checkpoint).eval(), restore_datamodule(checkpoint, root=root)
    datamodule.setup("test")
    cases = [("none", 0.0), *((kind, strength) for kind, (each, _) in STRENGTHS.items() for strength in each)]
    right = dict.fromkeys(cases, 0)
    count = 0
    with torch.no_grad():
        for images, labels in datamodule.test_dataloader():
            count += len(labels)
            for case in cases:
                logits = module(preprocess(corrupt(images, *case), datamodule))
                right[case] += int((logits.argmax(dim=1) == labels).sum())
    return {case: number / count for case, number in right.items()}


def make_table(measured: dict[str, Accuracies]) -> list[str]:
    """A row a corruption and strength, a column a classifier, in Markdown."""
    lines = [f"| corruption | strength | {' | '.join(f'`{name}`' for name in measured)} |"]
    lines.append(f"| --- | --- |{' ---: |' * len(measured)}")
    for kind, strength in next(iter(measured.values())):
        how = f"{strength:g} {STRENGTHS[kind][1]}" if kind in STRENGTHS else ""
        cells = (f"{100 * accuracies[kind, strength]:.1f} %" for accuracies in measured.values())
        lines.append(f"| {kind} | {how} | {' | '.join(cells)} |")
    return lines


def draw(measured: dict[str, Accuracies], path: Path) -> None:
    """Draw accuracy against strength: a panel a corruption, a line a classifier."""
    with rc_context({"svg.hashsalt": "robustness", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(14, 3), facecolor="white", layout="constrained")
        for axes, (kind, (strengths, unit)) in zip(figure.subplots(1, 5, sharey=True), STRENGTHS.items(), strict=True):
            for (name, accuracies), color in zip(measured.items(), (TRAIN, VAL, DISTORTED) * len(measured)):  # noqa: B905
                values = [100 * accuracies["none", 0], *(100 * accuracies[kind, each] for each in strengths)]
                axes.plot([0, *strengths], values, color=color, marker="o", markersize=4, lw=1.6, label=name)
            axes.set_title(kind, color=INK)
            axes.set_xlabel(unit, color=INK)
            axes.tick_params(colors=INK)
            axes.grid(color="#d1d9e0", lw=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("test accuracy, %", color=INK)
        figure.axes[0].legend(frameon=False, labelcolor=INK)
        save_figure(figure, path)


def main(arguments: Iterable[str] | None = None) -> None:
    """Measure classifiers on corrupted test images, each named by its run's folder."""
    parser = argparse.ArgumentParser(prog="python -m notebooks.robustness", description=main.__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="as in logs/.../best/checkpoints/last.ckpt")
    parser.add_argument("--root", help="folder of the data, if it is not the run's")
    args = parser.parse_args(None if arguments is None else list(arguments))
    paths = {path.resolve().parents[1].name: path for path in args.checkpoints}
    if len(paths) < len(args.checkpoints):
        parser.error("two checkpoints of runs whose folders have one name: rename one")
    try:
        measured = {name: measure(path, args.root) for name, path in paths.items()}
    except (CheckpointError, ConfigError, DataError) as error:
        parser.error(str(error))
    draw(measured, FIGURES / "robustness.svg")
    print("\n".join(make_table(measured)))


if __name__ == "__main__":
    main()
