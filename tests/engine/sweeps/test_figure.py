"""The figure of a sweep, on its axes and in TensorBoard's files."""

import io
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.engine.sweeps import figure
from src.engine.sweeps.folder import Job
from src.engine.sweeps.leaderboard import Leaderboard
from tests.engine.sweeps.test_leaderboard import make_board


def drawn(board: Leaderboard, key: str) -> Axes:
    axes = Figure().subplots()
    figure.draw_panel(axes, board, key)
    return axes


def make_pairs(first: list[Any], second: list[Any]) -> Leaderboard:
    """A board over two keys, of scores that tell their settings: 0, 1, 2..."""
    pairs = [(x, y) for x in first for y in second]
    jobs = [Job(f"{x},{y}", {"x": x, "y": y}, "finished", float(i)) for i, (x, y) in enumerate(pairs)]
    return Leaderboard(jobs, "val/acc", "max")


@pytest.mark.parametrize(
    ("key", "values", "scale"),
    [
        ("optimizer.lr", [0.001, 0.002], "log"),
        ("optimizer.weight_decay", [1e-4, 2e-4], "log"),
        ("optimizer.weight_decay", [0, 1e-4], "linear"),
        ("data.batch_size", [32, 64], "linear"),
        ("data.batch_size", [8, 800], "log"),
        ("model.net.activation", ["relu", "tanh"], "linear"),
        ("optimizer.nesterov", [True, False], "linear"),
    ],
)
def test_the_axis_suits_the_values(key: str, values: list[Any], scale: str) -> None:
    assert drawn(make_board({value: [0.5] for value in values}, key=key), key).get_xscale() == scale


def test_means_stand_over_their_values_and_the_best_is_marked() -> None:
    axes = drawn(make_board({0.001: [0.5, 0.7], 0.01: [0.9, 0.8], 0.1: [None, None]}), "optimizer.lr")
    points, star = axes.lines[0], axes.lines[-1]
    np.testing.assert_allclose(np.array(points.get_xydata()), [[0.001, 0.6], [0.01, 0.85]])
    np.testing.assert_allclose(np.array(star.get_xydata()), [[0.01, 0.85]])
    assert star.get_label() == "best"
    (bars,) = axes.collections
    ends = np.array([path.vertices for path in bars.get_paths()])[:, :, 1]
    np.testing.assert_allclose(ends, [[0.6 - 0.02**0.5, 0.6 + 0.02**0.5], [0.85 - 0.005**0.5, 0.85 + 0.005**0.5]])


def test_categories_are_labelled() -> None:
    axes = drawn(make_board({"relu": [0.5], "tanh": [0.6], None: [0.4]}, key="activation"), "activation")
    labels = {label.get_text(): float(x) for label, x in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)}
    assert {name: labels[name] for name in ("tanh", "relu", "None")} == {"relu": 0, "tanh": 1, "None": 2}
    assert np.array(axes.lines[-1].get_xdata(orig=False)) == [labels["tanh"]]


@pytest.mark.parametrize(
    "board",
    [
        make_board({0.001: [0.5, 0.7], 0.01: [0.9, None]}),
        make_board({0.001: [None]}),
        Leaderboard([Job("job", {}, "finished", 0.5)], "val/acc", "max"),
        Leaderboard([Job("a", {f"k{i}": "v" * i for i in range(9)}, "finished", 0.5)], "val/acc", "max"),
        Leaderboard([Job("a", {"lr": 1e30}, "finished", 1e30), Job("b", {"lr": -1}, "failed")], "val/loss", "min"),
        make_pairs([0.1, 0.2], ["relu", None]),
        make_pairs(list(range(40)), [f"text {number}" for number in range(40)]),
        Leaderboard(
            [Job(f"{s},{f}", {"seed": s, "fold": f}, "finished", s + f) for s in range(9) for f in range(9)],
            "f1",
            "max",
        ),
    ],
    ids=[
        "seeds",
        "all failed",
        "nothing swept",
        "many keys",
        "extreme",
        "two keys",
        "two keys, many",
        "seeds and folds",
    ],
)
def test_any_board_is_drawn(board: Leaderboard) -> None:
    image = matplotlib.image.imread(io.BytesIO(figure.draw(board)))
    assert image.shape[0] == 360
    assert image.std() > 0


def test_two_keys_are_a_line_for_each_value_of_the_other() -> None:
    axes = Figure().subplots()
    figure.draw_panel(axes, make_pairs([3, 1, 2], ["relu", "tanh"]), "x", "y")
    handles, labels = axes.get_legend_handles_labels()
    lines = {
        text: bars.lines[0] for bars, text in zip(handles, labels, strict=True) if isinstance(bars, ErrorbarContainer)
    }
    np.testing.assert_allclose(np.array(lines["y=relu"].get_xydata()), [[1, 2], [2, 4], [3, 0]])
    np.testing.assert_allclose(np.array(lines["y=tanh"].get_xydata()), [[1, 3], [2, 5], [3, 1]])
    np.testing.assert_allclose(np.array(axes.lines[-1].get_xydata()), [[2, 5]])


def test_many_values_of_two_keys_are_a_heat_map() -> None:
    axes = Figure().subplots()
    figure.draw_map(axes, make_pairs([3, 1, 2], list("fedcba")), "x", "y")
    (image,) = axes.images
    np.testing.assert_allclose(np.array(image.get_array())[:, 2], [0, 1, 2, 3, 4, 5])  # x=3 is last, y=f is first
    np.testing.assert_allclose(np.array(axes.lines[0].get_xydata()), [[1, 5]])  # x=2, y=a: 17


def test_labels_are_few_and_short() -> None:
    board = make_board({f"value {number} " + "x" * 100: [0.5] for number in range(1000)}, key="name")
    axes = drawn(board, "name")
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(labels) <= 12
    assert max(map(len, labels)) <= 16


def test_the_same_board_is_the_same_picture_and_another_is_not() -> None:
    first = make_board({0.001: [0.5], 0.01: [0.9]})
    assert figure.draw(first) == figure.draw(make_board({0.001: [0.5], 0.01: [0.9]}))
    assert figure.draw(first) != figure.draw(make_board({0.001: [0.9], 0.01: [0.5]}))


def test_tensorboard_holds_the_newest_picture_alone(tmp_path: Path) -> None:
    for scores in ([0.1], [0.2]):
        png = figure.draw(make_board({0.001: scores}))
        figure.log_image(tmp_path, png)
    events = EventAccumulator(str(tmp_path)).Reload()
    (image,) = events.Images("sweep")
    shown = matplotlib.image.imread(io.BytesIO(image.encoded_image_string))
    np.testing.assert_array_equal(shown, matplotlib.image.imread(io.BytesIO(png))[..., :3])
    assert (image.height, image.width) == matplotlib.image.imread(io.BytesIO(png)).shape[:2]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_jobs_row_in_the_hparams_tab_is_written_once(tmp_path: Path) -> None:
    for _ in range(2):
        figure.log_hparams(tmp_path, Job("a", {"lr": 0.1}, "finished", 0.5), "val/acc")
    (event,) = EventAccumulator(str(tmp_path)).Reload().Scalars("best/val/acc")
    assert event.value == 0.5
    assert len(list(tmp_path.iterdir())) == 1
