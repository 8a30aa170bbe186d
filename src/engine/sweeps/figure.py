"""A sweep in pictures: the metric against the swept values, and TensorBoard's HPARAMS tab."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from src.engine.sweeps.folder import Job
from src.engine.sweeps.leaderboard import SEED, Leaderboard, Setting

MAX_PANELS = 6
MAX_LINES = 6  # of two keys; more are a heat map
MAX_TICKS = 6  # more values than that get matplotlib's ticks
MAX_LABELS = 30  # of more texts some stand for all
LABEL_LENGTH = 24
LOG_KEYS = ("lr", "max_lr", "eta_min", "weight_decay", "eps")  # their scale is a logarithmic one


def draw(board: Leaderboard) -> bytes:
    """The monitored metric against the swept keys, as a PNG: mean and, over seeds, standard deviation.

    Two keys are lines or a heat map; of more, each has a panel. The winner is marked by a star. A learning rate, or
    numbers that span a factor of 100, get a logarithmic axis.
    """
    keys = [key for key in board.keys if key != SEED] or board.keys or ["job"]
    values = {key: list(dict.fromkeys(str(setting.values.get(key)) for setting in board.settings)) for key in keys}
    keys.sort(key=lambda key: -len(values[key])) if len(keys) == 2 else None
    is_pair = len(keys) == 2 and all(len(texts) > 1 for texts in values.values()) and board.winner
    panels = keys[:1] if is_pair else keys[:MAX_PANELS]
    width, height = 1 + 4.2 * len(panels) + 2 * bool(is_pair), 3.6
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=0.8 / width, right=1 - 0.2 / width, bottom=0.6 / height, top=1 - 0.2 / height, wspace=0.1
    )
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    if is_pair:
        (draw_lines if len(values[keys[1]]) <= MAX_LINES else draw_map)(all_axes[0], board, keys[0], keys[1])
    else:
        for axes, key in zip(all_axes, panels, strict=True):
            draw_panel(axes, board, key, connected=len(keys) == 1)
        figure.axes[0].set_ylabel(board.heading)
    file = io.BytesIO()
    figure.savefig(file, dpi=100, metadata={"Software": None})
    return file.getvalue()


def draw_panel(axes: Axes, board: Leaderboard, key: str, connected: bool) -> None:
    """The metric against one key, a point a setting, or a job where the key tells jobs apart."""
    if key in (SEED, "job"):
        best = board.best_job
        points = [(j.values.get(key, j.name), j.score, math.nan, j is best) for j in board.jobs if j.score is not None]
    else:
        points = [(s.values.get(key, "-"), s.mean, s.std, s is board.winner) for s in _finished(board)]
    x = _place(axes, key, [value for value, _, _, _ in points])
    if connected and all(_is_number(point[0]) for point in points):
        order = np.argsort(x)
        axes.plot(np.array(x)[order], [points[i][1] for i in order], color="tab:blue", alpha=0.4)
    axes.errorbar(x, [point[1] for point in points], [point[2] for point in points], fmt="o", capsize=4)
    _mark(axes, [(position, point[1]) for position, point in zip(x, points, strict=True) if point[3]])


def draw_lines(axes: Axes, board: Leaderboard, key: str, other: str) -> None:
    """The metric against one key, a line for each value of another."""
    settings = _finished(board)
    x = dict(zip(map(id, settings), _place(axes, key, [setting.values[key] for setting in settings]), strict=True))
    for value in dict.fromkeys(str(setting.values[other]) for setting in settings):
        line = sorted((s for s in settings if str(s.values[other]) == value), key=lambda setting: x[id(setting)])
        means, stds = [setting.mean for setting in line], [setting.std for setting in line]
        axes.errorbar([x[id(s)] for s in line], means, stds, fmt="o-", capsize=4, label=f"{other}={_cut(value)}")
    axes.set_ylabel(board.heading)
    axes.legend(loc="best", fontsize="small")
    _mark(axes, [(x[id(setting)], setting.mean) for setting in settings if setting is board.winner])


def draw_map(axes: Axes, board: Leaderboard, key: str, other: str) -> None:
    """The metric over two keys, as a heat map."""
    settings = _finished(board)
    columns, rows = (sorted({s.values[name] for s in settings}, key=_sorting) for name in (key, other))
    means = np.full((len(rows), len(columns)), math.nan)
    for setting in settings:
        place = rows.index(setting.values[other]), columns.index(setting.values[key])
        means[place] = setting.mean
        if setting is board.winner:
            axes.plot(place[1], place[0], "*", color="tab:orange", markersize=16)
    image = axes.imshow(means, aspect="auto", origin="lower")
    axes.figure.colorbar(image, ax=axes, label=board.heading)
    for axis, values, name in ((axes.xaxis, columns, key), (axes.yaxis, rows, other)):
        _label(axis, values)
        axis.set_label_text(name)


def _finished(board: Leaderboard) -> list[Setting]:
    """The settings with a score, as they were planned, not as they rank."""
    planned = {job.name: index for index, job in enumerate(board.jobs)}
    return sorted((s for s in board.settings if s.scores), key=lambda setting: planned[setting.jobs[0].name])


def _place(axes: Axes, key: str, values: Sequence[Any]) -> list[float]:
    """Where the values lie on the x axis, which gets a name, a scale, and labels where the values are no numbers."""
    axes.set_xlabel(key)
    axes.grid(alpha=0.3)
    numbers = [float(value) for value in values if _is_number(value)]
    if len(numbers) < len(values):
        texts = {text: index for index, text in enumerate(dict.fromkeys(map(str, values)))}
        _label(axes.xaxis, list(texts))
        axes.tick_params("x", labelrotation=20 * (max(map(len, texts)) > 8))
        axes.figure.subplots_adjust(bottom=0.3 if max(map(len, texts)) > 8 else None)
        return [float(texts[str(value)]) for value in values]
    distinct = sorted(set(numbers))
    if numbers and distinct[0] > 0 and (key.split(".")[-1] in LOG_KEYS or distinct[-1] >= 100 * distinct[0]):
        axes.set_xscale("log")
    if len(distinct) <= MAX_TICKS:
        axes.set_xticks(distinct, [f"{value:g}" for value in distinct])
        axes.set_xticks([], minor=True)
    if len(distinct) == 1:
        (x,) = distinct
        axes.set_xlim(*((x / 2, x * 2) if axes.get_xscale() == "log" else (x - 1, x + 1)))
    return numbers


def _label(axis: Any, values: Sequence[Any]) -> None:
    """Label the places 0, 1, 2... of an axis, some of them where there are many."""
    step = -(-len(values) // MAX_LABELS)
    axis.set_ticks(range(0, len(values), step), [_cut(str(value)) for value in values[::step]])


def _cut(text: str) -> str:
    return text if len(text) <= LABEL_LENGTH else f"{text[: LABEL_LENGTH - 1]}…"


def _sorting(value: Any) -> tuple[bool, float, str]:
    return (not _is_number(value), float(value) if _is_number(value) else 0.0, str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mark(axes: Axes, best: Sequence[tuple[float, float]]) -> None:
    for x, y in best:
        axes.plot([x], [y], "*", color="tab:orange", markersize=16, label="best")
        axes.legend(loc="best", fontsize="small")


def log_image(folder: Path, png: bytes) -> None:
    """Show the figure in TensorBoard, as the sweep's own run; the previous one goes."""
    old = list(folder.glob("events.*"))
    with SummaryWriter(folder) as writer:
        writer.add_image("sweep", np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), dataformats="HWC")
    for path in old:
        path.unlink()


def log_hparams(folder: Path, job: Job, monitor: str) -> None:
    """Make a job a row of TensorBoard's HPARAMS tab, once: its swept values, and its metrics by their scalars.

    Without a summary of the experiment, which would be the only one that TensorBoard reads, the tab has the columns of
    all jobs below its log folder.
    """
    if any(folder.glob("events.*.hparams")):
        return
    _, start, end = hparams({k: v if _is_number(v) else str(v) for k, v in job.values.items()}, {})
    with SummaryWriter(folder, filename_suffix=".hparams") as writer:
        for summary in [start] if job.status == "failed" else [start, end]:  # which says that all went well
            writer.file_writer.add_summary(summary)
        if job.score is not None:
            writer.add_scalar(f"best/{monitor}", job.score)
