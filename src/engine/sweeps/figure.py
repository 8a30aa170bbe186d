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
from src.engine.sweeps.leaderboard import Leaderboard, Setting, scores_of

MAX_PANELS = 6
MAX_LINES = 6  # of two keys; more are a heat map
MAX_TICKS = 6  # more values than that get matplotlib's ticks
MAX_LABELS = 12  # of more texts some stand for all
LABEL_LENGTH = 16
LOG_KEYS = ("lr", "max_lr", "eta_min", "weight_decay", "eps")  # their scale is a logarithmic one


def draw(board: Leaderboard) -> bytes:
    """The monitored metric against the swept keys, as a PNG: mean and, over repetitions, standard deviation.

    Two keys are lines or a heat map; of more, each has a panel. The winner is marked by a star. A learning rate, or
    numbers that span a factor of 100, get a logarithmic axis.
    """
    keys = [key for key in board.keys if key not in board.repeated] or board.keys or ["job"]
    pair = (
        sorted(keys, key=lambda key: -len(_values(board, key)))
        if len(keys) == 2 and board.winner and keys != board.repeated
        else []
    )
    panels = pair[:1] or keys[:MAX_PANELS]
    figure = Figure(figsize=(1 + 4.2 * len(panels) + len(pair), 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    all_axes[0].set_ylabel(board.heading)
    if pair and len(_values(board, pair[1])) > MAX_LINES:
        draw_map(all_axes[0], board, *pair)
    else:
        for axes, key in zip(all_axes, panels, strict=True):
            draw_panel(axes, board, key, pair[1] if pair else None, connected=len(panels) == 1)
    file = io.BytesIO()
    figure.savefig(file, dpi=100, metadata={"Software": None})
    return file.getvalue()


def draw_panel(axes: Axes, board: Leaderboard, key: str, other: str | None = None, connected: bool = True) -> None:
    """The metric against one key, a point a setting, or a job where the key tells jobs apart.

    Args:
        axes: Where to draw.
        board: What to draw.
        key: The swept key of the x axis.
        other: A key each of whose values is a line of its own.
        connected: Whether there is a line at all.
    """
    points, best = [setting for setting in board.planned if setting.scores], board.winner
    if key in (*board.repeated, "job"):  # each job is a point
        points = [Setting({"job": j.name, **j.values}, [j], scores_of([j])) for j in board.jobs if scores_of([j])]
        best = next((point for point in points if point.jobs[0] is board.best_job), None)
    values = _values(board, key)
    is_text = not all(_is_number(value) for value in values.values())
    lines: dict[str | None, list[Setting]] = {}
    for point in points:
        lines.setdefault(f"{other}={_cut(point.values.get(other))}" if other else None, []).append(point)

    def place(point: Setting) -> Any:  # matplotlib places texts by itself
        return str(point.values.get(key)) if is_text else point.values[key]

    for label, line in lines.items():
        line.sort(key=lambda point: list(values).index(str(point.values.get(key))))
        axes.errorbar(
            [place(point) for point in line], [point.mean for point in line], [point.std for point in line],
            fmt="o-" if connected and not is_text else "o", capsize=4, label=label,
        )  # fmt: skip
    if best:
        axes.plot([place(best)], [best.mean], "*", color="tab:orange", markersize=16, zorder=5, label="best")
        axes.legend(loc="best", fontsize="small")
    axes.set_xlabel(key)
    axes.grid(alpha=0.3)
    if is_text and points:
        _label(axes.xaxis, list(dict.fromkeys(str(point.values.get(key)) for line in lines.values() for point in line)))
    elif points:
        _scale(axes, key, sorted({float(point.values[key]) for point in points}))


def draw_map(axes: Axes, board: Leaderboard, key: str, other: str) -> None:
    """The metric over two keys, as a heat map."""
    columns, rows = list(_values(board, key)), list(_values(board, other))
    means = np.full((len(rows), len(columns)), math.nan)
    for setting in board.settings:
        row, column = rows.index(str(setting.values.get(other))), columns.index(str(setting.values.get(key)))
        means[row, column] = setting.mean
        if setting is board.winner:
            axes.plot(column, row, "*", color="tab:orange", markersize=16)
    axes.figure.colorbar(axes.imshow(means, aspect="auto", origin="lower"), ax=axes, label=board.heading)
    for axis, name, texts in ((axes.xaxis, key, columns), (axes.yaxis, other, rows)):
        axis.set_label_text(name)
        _label(axis, texts)


def _values(board: Leaderboard, key: str) -> dict[str, Any]:
    """A key's values by their texts: numbers in order, others as they were planned."""
    values = {str(value): value for job in board.jobs for value in [job.values.get(key, job.name)]}
    is_ordered = all(map(_is_number, values.values()))
    return dict(sorted(values.items(), key=lambda item: item[1])) if is_ordered else values


def _scale(axes: Axes, key: str, numbers: Sequence[float]) -> None:
    """Choose the scale, ticks and limits of an axis of numbers."""
    first, last = numbers[0], numbers[-1]
    is_log = first > 0 and (key.split(".")[-1] in LOG_KEYS or last >= 100 * first)
    if is_log:
        axes.set_xscale("log")
    if len(numbers) <= MAX_TICKS:
        axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
        axes.set_xticks([], minor=True)
    if first == last:
        axes.set_xlim(*((first / 2, first * 2) if is_log else (first - 1, first + 1)))


def _label(axis: Any, texts: Sequence[str]) -> None:
    """Label the places 0, 1, 2... of an axis, some of them where there are many."""
    step = -(-len(texts) // MAX_LABELS)
    shown = list(map(_cut, texts[::step]))
    is_long = axis.axis_name == "x" and max(map(len, shown)) > 8
    style = {"rotation": 20, "ha": "right"} if is_long else {}
    axis.set_ticks(range(0, len(texts), step), shown, **style)


def _cut(value: Any) -> str:
    return str(value) if len(str(value)) <= LABEL_LENGTH else f"{str(value)[: LABEL_LENGTH - 1]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
