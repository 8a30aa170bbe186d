"""Which job is best, by the numbers of numpy and the standard library."""

import csv
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t, ttest_1samp

from src.engine.sweeps.folder import Job
from src.engine.sweeps.leaderboard import Leaderboard, shown_mean

SCORES = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=6)


def make_board(
    scores: Mapping[Any, Sequence[float | None]], mode: str = "max", failed: str = "failed", key: str = "optimizer.lr"
) -> Leaderboard:
    """A board of a swept key's values, each with the scores of seeds 0, 1...; None: this one has failed."""
    jobs = [
        Job(f"{value},{seed}", {key: value, "seed": seed}, failed if score is None else "finished", score)
        for value, column in scores.items()
        for seed, score in enumerate(column)
    ]
    return Leaderboard(jobs, "val/acc", mode)


def ranking(board: Leaderboard) -> list[Any]:
    return [value for setting in board.settings for key, value in setting.values.items() if key != "seed"]


@pytest.mark.parametrize(("mode", "order"), [("max", [3, 1, 2]), ("min", [2, 1, 3])])
def test_settings_rank_by_their_mean_over_seeds(mode: str, order: list[int]) -> None:
    board = make_board({1: [0.5, 0.6], 2: [0.1, 0.9], 3: [0.6, 0.61]}, mode)
    assert ranking(board) == order
    assert board.winner is board.settings[0]
    assert [row["optimizer.lr"] for row in board.rows()] == [value for value in order for _ in range(2)]
    assert [row["rank"] for row in board.rows()] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("mode", "best"), [("max", "2,1"), ("min", "1,0")])
def test_the_best_job_is_the_winners_best_seed(mode: str, best: str) -> None:
    board = make_board({1: [0.0, 0.95], 2: [0.7, 0.9]}, mode)
    assert board.best_job is not None
    assert board.best_job.name == best


@given(SCORES)
def test_mean_and_deviation_are_numpys(scores: list[float]) -> None:
    (setting,) = make_board({1: scores}).settings
    assert setting.mean == pytest.approx(np.mean(scores))
    if len(scores) > 1:
        assert setting.std == pytest.approx(np.std(scores, ddof=1), abs=1e-12)
        shown = [float(number) for number in shown_mean(scores).split(" ± ")]
        assert shown == pytest.approx([np.mean(scores), np.std(scores, ddof=1)], abs=0.000051)  # of four decimals
    else:
        assert math.isnan(setting.std)
        assert shown_mean(scores) == f"{scores[0]:.4f}"


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_setting_with_a_failed_seed_ranks_below_the_complete_ones(mode: str, missing: float | None) -> None:
    lucky = 0.9 if mode == "max" else 0.1
    board = make_board({1: [lucky, missing], 2: [missing, missing], 3: [0.5, 0.5]}, mode)
    assert ranking(board) == [3, 1, 2]
    assert [len(setting.scores) for setting in board.settings] == [2, 1, 0]


@pytest.mark.parametrize("status", ["failed", "waiting", "started", "pruned"])
def test_without_a_finished_job_there_is_no_winner(status: str) -> None:
    board = Leaderboard([Job("a", {"seed": 0}, status, 0.9 if status == "pruned" else None)], "val/acc", "max")
    assert board.winner is None
    assert board.best_job is None
    assert not any(line.startswith("best") for line in board.summary())


def test_a_pruned_job_never_wins() -> None:
    jobs = [Job("a", {"x": 1}, "pruned", 0.9), Job("b", {"x": 2}, "finished", 0.1)]
    board = Leaderboard(jobs, "val/acc", "max")
    assert board.best_job is jobs[1]
    assert [row[-1] for row in board.table()[1:]] == ["finished", "pruned"]


def test_the_csv_file_holds_every_number_in_full() -> None:
    score = 0.1 + 0.2
    jobs = [
        Job(
            "a",
            {"x": 1e-5},
            "finished",
            score,
            {"loss": 1 / 3},
            {"test/acc": 0.25, "loss": 2.0},
            "runs/a b/best.ckpt",
            1.5,
        ),
        Job("b", {"x": "relu,tanh"}, "failed", error='no "memory",\nat all'),
    ]
    rows = list(csv.DictReader(io.StringIO(Leaderboard(jobs, "val/acc", "max").to_csv())))
    assert [row["job"] for row in rows] == ["a", "b"]
    assert [float(rows[0][key]) for key in ("x", "best val/acc", "loss")] == [1e-5, score, 1 / 3]
    assert [float(rows[0][key]) for key in ("test/acc", "test loss")] == [0.25, 2.0]
    assert (rows[0]["checkpoint"], rows[0]["error"]) == ("runs/a b/best.ckpt", "")
    assert (rows[1]["x"], rows[1]["status"], rows[1]["best val/acc"]) == ("relu,tanh", "failed", "")
    assert rows[1]["error"] == 'no "memory",\nat all'


@given(
    st.lists(st.tuples(st.floats(0.5, 1, allow_subnormal=False), st.floats(0, 0.5)), min_size=2, max_size=8),
    st.sampled_from(["max", "min"]),
)
def test_the_winners_lead_is_paired_over_the_seeds_as_by_scipy(scores: list[tuple[float, float]], mode: str) -> None:
    better, worse = ([pair[index] for pair in scores] for index in (0, 1))
    if mode == "min":
        better, worse = ([1 - score for score in column] for column in (better, worse))
    said = [line for line in make_board({1: worse, 2: better}, mode).summary() if line.startswith("ahead of")]
    if np.mean(better) == np.mean(worse):
        return
    differences = np.abs(np.array(better) - np.array(worse))
    with np.errstate(invalid="ignore"), warnings.catch_warnings(action="ignore"):  # differences that are all equal
        interval = ttest_1samp(differences, 0).confidence_interval(0.95)
    low, high = (differences.mean() if math.isnan(end) else end for end in interval)
    (line,) = said
    numbers = re.match(r"ahead of optimizer.lr=1 by (\S+), 95 % interval (\S+) to (\S+): (.*)", line)
    assert numbers
    assert [float(number) for number in numbers.groups()[:3]] == pytest.approx(
        [differences.mean(), low, high], abs=1e-4
    )
    if abs(low) > 1e-9:
        assert numbers.group(4).startswith("better over" if low > 0 else "not told apart by")


def test_seeds_that_would_tell_are_as_many_as_the_interval_needs() -> None:
    (line,) = [line for line in make_board({1: [0.5, 0.5], 2: [0.5, 0.7]}).summary() if line.startswith("ahead of")]
    std = 0.2 / math.sqrt(2)
    needed = next(n for n in range(2, 99) if t.ppf(0.975, n - 1) * std / math.sqrt(n) < 0.1)
    assert line.endswith(f"not told apart by 2 seeds; some {needed - 2} more may tell")


@pytest.mark.parametrize(
    ("key", "units"), [("data.fold", "folds"), ("fold", "folds"), ("data.split_seed", "split_seeds")]
)
def test_folds_and_seeds_of_other_names_are_averaged_like_seeds(key: str, units: str) -> None:
    scores = {(lr, fold): 0.5 + lr + fold / 10 for lr in (0.1, 0.2) for fold in range(3)}
    jobs = [Job(f"{lr},{fold}", {"lr": lr, key: fold}, "finished", score) for (lr, fold), score in scores.items()]
    board = Leaderboard(jobs, "val/acc", "max")
    assert board.table() == [
        ["rank", "lr", "n", "best val/acc", "status"],
        ["1", "0.2", "3", "0.8000 ± 0.1000", "3 finished"],
        ["2", "0.1", "3", "0.7000 ± 0.1000", "3 finished"],
    ]
    (line,) = [line for line in board.summary() if line.startswith("ahead of")]
    assert line == f"ahead of lr=0.1 by 0.1000, 95 % interval 0.1000 to 0.1000: better over 3 {units}"


def test_each_pair_of_seed_and_fold_is_a_repetition() -> None:
    jobs = [
        Job(f"{lr},{seed},{fold}", {"lr": lr, "seed": seed, "data.fold": fold}, "finished", lr + seed / 10 + fold / 100)
        for lr in (0.1, 0.2) for seed in (0, 1) for fold in (0, 1)
    ]  # fmt: skip
    board = Leaderboard(jobs, "val/acc", "max")
    assert [row[:3] for row in board.table()[1:]] == [["1", "0.2", "4"], ["2", "0.1", "4"]]
    assert any(line.endswith("better over 4 repetitions") for line in board.summary())


@pytest.mark.parametrize("key", ["data.num_folds", "data.n_fold", "model.scaffold", "seeded"])
def test_a_key_that_only_sounds_like_a_seed_or_fold_is_a_setting(key: str) -> None:
    board = Leaderboard([Job(f"{x}", {key: x}, "finished", x / 10) for x in (1, 2)], "val/acc", "max")
    assert board.table()[0] == ["rank", key, "best val/acc", "status"]


def test_where_a_job_has_no_best_all_are_compared_by_their_last() -> None:
    jobs = [
        Job("a", {"x": 1}, "finished", 0.9, {"val/acc": 0.4}),
        Job("b", {"x": 2}, "finished", 0.6, {"val/acc": 0.6}, is_best=False),
        Job("c", {"x": 3}, "waiting"),
    ]
    board = Leaderboard(jobs, "val/acc", "max")
    assert board.heading == "last val/acc"
    assert [(row["job"], row["last val/acc"]) for row in board.rows()] == [("b", 0.6), ("a", 0.4), ("c", None)]
    assert Leaderboard([jobs[0], jobs[2]], "val/acc", "max").heading == "best val/acc"


def test_tests_of_any_name_are_shown() -> None:
    jobs = [Job(f"{x}", {"x": x}, "finished", x, {"f1": x}, {"test/f1": x / 2, "bleu": 1 - x}) for x in (0.25, 0.5)]
    board = Leaderboard(jobs, "f1", "max")
    assert board.table()[:2] == [
        ["rank", "x", "best f1", "test bleu", "test/f1", "status"],
        ["1", "0.5", "0.5000", "0.5000", "0.2500", "finished"],
    ]
    assert {"test bleu: 0.5000", "test/f1: 0.2500"} <= set(board.summary())


def test_the_markdown_table_has_a_row_a_setting() -> None:
    board = make_board({"a|b": [0.5, 0.7], "c": [0.4, None]}, key="model")
    lines = board.to_markdown("Sweep x").splitlines()
    assert lines[:4] == [
        "# Sweep x",
        "",
        "| rank | model | n | best val/acc | status |",
        "| --- | --- | --- | --- | --- |",
    ]
    assert lines[4] == r"| 1 | a\|b | 2 | 0.6000 ± 0.1414 | 2 finished |"
    assert lines[5] == "| 2 | c | 1 | 0.4000 | 1 finished, 1 failed |"


def test_a_winner_by_more_seeds_is_told_of_the_better_mean() -> None:
    scores = {("a", 0): 0.80, ("a", 1): 0.82, ("b", 0): 0.90, ("b", 1): None}
    jobs = [
        Job(f"net={net},seed={seed}", {"net": net, "seed": seed}, "failed" if score is None else "finished", score)
        for (net, seed), score in scores.items()
    ]
    board = Leaderboard(jobs, "val/acc", "max")
    assert board.summary()[:2] == [
        "best: net=a,seed=1, val/acc 0.8200",
        "net=b has a better mean, 0.9000, of fewer seeds, 1 beside 2: settings with more finished seeds win",
    ]
    assert not [line for line in Leaderboard(jobs[2:], "val/acc", "max").summary() if "better mean" in line]
