"""A sweep in pictures: the metric against each swept value, and TensorBoard's HPARAMS tab."""

import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from tensorboard.compat.proto.summary_pb2 import Summary

    from src.engine.sweeps.folder import Job
    from src.engine.sweeps.leaderboard import Leaderboard, Setting

MAX_PANELS = 6
MAX_TICKS = 6  # more values than that get matplotlib's ticks
LOG_KEYS = ("lr", "max_lr", "eta_min", "weight_decay", "eps")  # their scale is a logarithmic one


def draw(board: "Leaderboard") -> bytes:
    """The monitored metric against each swept key, as a PNG: mean and, over seeds, standard deviation.

    The winner is marked by a star. A learning rate, or numbers that span a factor of 100, get a logarithmic axis.
    """
    from matplotlib.figure import Figure

    keys = [key for key in board.keys if key != "seed"] or board.keys or ["job"]
    panels = keys[:MAX_PANELS]
    width, height = 1 + 4.2 * len(panels), 3.6
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=0.8 / width, right=1 - 0.2 / width, bottom=0.6 / height, top=1 - 0.2 / height, wspace=0.1
    )
    for axes, key in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, board, key, connected=len(keys) == 1)
    figure.axes[0].set_ylabel(f"best {board.monitor}")
    file = io.BytesIO()
    figure.savefig(file, dpi=100, metadata={"Software": None})
    return file.getvalue()


def _draw_panel(axes: "Axes", board: "Leaderboard", key: str, connected: bool) -> None:
    points = _points(board, key)
    x, labels = _positions([value for value, _, _, _ in points], key, axes)
    order = sorted(range(len(x)), key=lambda index: x[index])
    if connected and not labels:
        axes.plot([x[i] for i in order], [points[i][1] for i in order], color="tab:blue", alpha=0.4)
    means, stds = [mean for _, mean, _, _ in points], [std for _, _, std, _ in points]
    axes.errorbar(x, means, stds, fmt="o", color="tab:blue", capsize=4)
    for position, (_, mean, _, is_winner) in zip(x, points, strict=True):
        if is_winner:
            axes.plot([position], [mean], "*", color="tab:orange", markersize=16, label="best")
            axes.legend(loc="best")
    if labels:
        is_long = max(map(len, labels)) > 8
        axes.set_xticks(range(len(labels)), labels, rotation=20 * is_long, ha="right" if is_long else "center")
        axes.figure.subplots_adjust(bottom=0.3 if is_long else None)
    elif len(set(x)) <= MAX_TICKS:
        axes.set_xticks(sorted(set(x)), [f"{value:g}" for value in sorted(set(x))])
        axes.set_xticks([], minor=True)
    if len(set(x)) == 1:
        axes.set_xlim(*((x[0] / 2, x[0] * 2) if axes.get_xscale() == "log" else (x[0] - 1, x[0] + 1)))
    axes.set_xlabel(key)
    axes.grid(alpha=0.3)


def _points(board: "Leaderboard", key: str) -> list[tuple[Any, float, float, bool]]:
    """(value, mean, std, whether the winner) of each setting, or of each job where the key tells jobs apart."""
    if key in ("seed", "job"):
        return [
            (job.values.get(key, job.name), job.score, math.nan, job is board.best_job)
            for job in board.jobs
            if job.score is not None
        ]
    finished: list[Setting] = [setting for setting in board.settings if setting.scores]
    finished.sort(key=lambda setting: board.jobs.index(setting.jobs[0]))  # as they were planned, not as they rank
    return [(setting.values.get(key, "-"), setting.mean, setting.std, setting is board.winner) for setting in finished]


def _positions(values: Sequence[Any], key: str, axes: "Axes") -> tuple[list[float], list[str]]:
    """Where the values lie on the x axis; with labels where they are no numbers."""
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        labels = list(dict.fromkeys(map(str, values)))
        return [float(labels.index(str(value))) for value in values], labels
    if numbers and min(numbers) > 0 and (key.split(".")[-1] in LOG_KEYS or max(numbers) >= 100 * min(numbers)):
        axes.set_xscale("log")
    return numbers, []


def log_image(folder: Path, png: bytes) -> None:
    """Show the figure in TensorBoard, as the sweep's own run; the previous one goes."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))  # PNG's header
    image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
    old = list(folder.glob("events.*"))
    _write_events(folder, Summary(value=[Summary.Value(tag="sweep", image=image)]))
    for path in old:
        path.unlink()


def log_hparams(folder: Path, job: "Job", monitor: str) -> None:
    """Make a job a row of TensorBoard's HPARAMS tab, once: its swept values, and its metrics by their scalars.

    Without a summary of the experiment, which would be the only one that TensorBoard reads, the tab has the columns of
    all jobs below its log folder.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
    from tensorboard.plugins.hparams.metadata import (
        NULL_TENSOR,
        SESSION_END_INFO_TAG,
        SESSION_START_INFO_TAG,
        create_summary_metadata,
    )
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

    if any(folder.glob("events.*.hparams")):
        return
    now = time.time()
    start = SessionStartInfo(start_time_secs=now - (job.seconds or 0.0))
    for key, value in job.values.items():
        if isinstance(value, bool):
            start.hparams[key].bool_value = value
        elif isinstance(value, int | float):
            start.hparams[key].number_value = value
        else:
            start.hparams[key].string_value = str(value)
    end = SessionEndInfo(end_time_secs=now, status=STATUS_FAILURE if job.status == "failed" else STATUS_SUCCESS)
    values = [
        Summary.Value(
            tag=SESSION_START_INFO_TAG,
            metadata=create_summary_metadata(HParamsPluginData(session_start_info=start)),
            tensor=NULL_TENSOR,
        ),
        Summary.Value(
            tag=SESSION_END_INFO_TAG,
            metadata=create_summary_metadata(HParamsPluginData(session_end_info=end)),
            tensor=NULL_TENSOR,
        ),
    ]
    if job.score is not None:
        values.append(Summary.Value(tag=f"best/{monitor}", simple_value=job.score))
    _write_events(folder, Summary(value=values), ".hparams")


def _write_events(folder: Path, summary: "Summary", suffix: str = "") -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder), filename_suffix=suffix)
    writer.add_event(Event(wall_time=time.time(), step=0, summary=summary))
    writer.close()
