"""Which checkpoint is taken."""

import os
import re
import shutil
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest
import torch

from src.engine.errors import CheckpointError, ConfigError
from src.engine.runs.checkpoints import choose_newest, find_best, find_checkpoint
from src.engine.runs.status import add_to_status, tracked, write_status
from tests.forks import run_command


def test_the_last_checkpoint_is_preferred_to_a_younger_one(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for age, name in enumerate(["best.ckpt", "last.ckpt", "older.ckpt"]):
        torch.save({}, folder / name)
        os.utime(folder / name, (10 - age, 10 - age))
    assert find_checkpoint(tmp_path) == folder / "last.ckpt"
    for name, next_name in (("last.ckpt", "best.ckpt"), ("best.ckpt", "older.ckpt")):
        (folder / name).write_bytes((folder / name).read_bytes()[:-30])
        assert find_checkpoint(tmp_path) == folder / next_name
    (folder / "older.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r": last\.ckpt: not .*; older\.ckpt: not .*; start the run anew"):
        find_checkpoint(tmp_path)


def test_of_damaged_ones_the_last_saved_is_taken_whatever_its_date(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    names = [f"checkpoints/{name}.ckpt" for name in ("b", "a", "last")]
    for number, name in enumerate(names):
        torch.save({}, tmp_path / name)
        os.utime(tmp_path / name, (10 - number, 10 - number))  # of a clock that goes back
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"")
    write_status(tmp_path, "interrupted", {"checkpoints": names})
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "a.ckpt"


def write_run(folder: Path, state: str = "finished", name: str | None = "checkpoints/best.ckpt", **facts: Any) -> Path:
    """The record of a run that is older than those written after it, and its checkpoint."""
    if name:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    folder.mkdir(parents=True, exist_ok=True)
    write_status(folder, state, {"best": {"checkpoint": name, "monitor": "acc"}, **facts})
    number = len(list(folder.parents[1].rglob("status.json")))
    add_to_status(folder, {"since": f"2026-01-01T00:00:{number:02}.000+00:00"})
    return folder


@pytest.mark.parametrize("state", ["finished", "interrupted", "running"])  # the last was killed
def test_the_newest_run_is_taken_by_its_record_whatever_its_files_are_called(state: str, tmp_path: Path) -> None:
    old = write_run(tmp_path / "train" / "old")
    new = write_run(tmp_path / "train" / "new", state, "own/epoch=3.ckpt")
    later = old / "checkpoints" / "best.ckpt"
    os.utime(later, (2e9, 2e9))
    (old / "status.json").touch()
    assert choose_newest(tmp_path) == (new / "own" / "epoch=3.ckpt", "best acc of the newest run")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"debug": True}, "only tried something out: debug="),
        ({"train": False}, "has not trained: train=false"),
        ({"state": "failed"}, "failed"),
        ({"state": "queued"}, "has not begun"),
        ({"reproduces": "logs/train/old"}, "repeats old"),
    ],
)
def test_runs_that_are_not_worth_it_are_passed_over_and_named(
    facts: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    said = rf"no run to choose below .*: train first .* or set ckpt_path; passed over: new \({re.escape(reason)}\)$"
    write_run(tmp_path / "train" / "new", **facts)
    with pytest.raises(ConfigError, match=said):
        choose_newest(tmp_path)
    shutil.rmtree(tmp_path / "train")
    old = write_run(tmp_path / "train" / "old", best={"checkpoint": "checkpoints/best.ckpt", "monitor": None})
    write_run(tmp_path / "train" / "new", **facts)
    path, why = choose_newest(tmp_path)
    assert path == old / "checkpoints" / "best.ckpt"
    assert why == f"last weights of the newest run; passed over: new ({reason})"


def test_a_run_at_work_is_passed_over(tmp_path: Path) -> None:
    with tracked(tmp_path / "train" / "new", {}), pytest.raises(ConfigError, match=r"new \(still at work\)"):
        choose_newest(tmp_path)


def test_the_newest_run_is_so_though_the_clock_was_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ahead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Ahead":
            return super().now(tz) + timedelta(hours=1)

    def write(name: str) -> Path:
        path = tmp_path / "logs" / "train" / name / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        write_status(path.parents[1], "finished", {"best": {"checkpoint": "checkpoints/last.ckpt"}})
        return path

    monkeypatch.setenv("PROJECT_ROOT", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("src.engine.runs.status.datetime", Ahead)
        write("first")
    for name in ("second", "third"):
        path = write(name)
        assert choose_newest(tmp_path / "logs")[0] == path


def test_if_the_newest_has_no_checkpoint_none_is_taken(tmp_path: Path) -> None:
    write_run(tmp_path / "train" / "old")
    write_run(tmp_path / "train" / "new", name=None)
    with pytest.raises(CheckpointError, match=r"new: the newest run, has left no checkpoint; set ckpt_path="):
        choose_newest(tmp_path)


def test_of_a_sweep_the_winner_is_taken_and_not_the_last_job(tmp_path: Path) -> None:
    write_run(tmp_path / "train" / "old")
    sweep = tmp_path / "multirun" / "sweep"
    for job in ("lr=1", "lr=2", "lr=3"):
        write_run(sweep / job)
    (sweep / "sweep.json").touch()
    assert choose_newest(tmp_path)[0].is_relative_to(tmp_path / "train")  # no job has finished as far as it knows
    (sweep / "sweep.csv").write_text("rank,job,status\n1,lr=2,finished\n2,lr=1,finished\n3,lr=3,finished\n")
    path, why = choose_newest(tmp_path)
    assert path == sweep / "lr=2" / "checkpoints" / "best.ckpt"
    assert why == "best acc of the winner of the newest sweep, sweep"


def test_a_copy_has_its_own_best(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shutil.copytree(run, tmp_path / "copy")
    assert find_best(tmp_path / "copy") == tmp_path / "copy" / "checkpoints" / "best.ckpt"


def test_a_sweeps_folder_stands_for_its_winners_best_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path / "lr=2")
    (tmp_path / "sweep.json").touch()
    with pytest.raises(CheckpointError, match=f"^ckpt_path={tmp_path}: no job of this sweep has finished"):
        find_best(tmp_path)
    (tmp_path / "sweep.csv").write_text("rank,job,status,checkpoint\n1,lr=1,failed,\n1,lr=2,finished,\n")
    assert find_best(tmp_path) == tmp_path / "lr=2" / "checkpoints" / "best.ckpt"


@pytest.mark.parametrize(
    "content", [None, "", "5", "{}", '{"best": {"checkpoint": "gone.ckpt"}}', '{"best": {"checkpoint": null}}']
)
def test_a_folder_without_a_best_checkpoint_is_told(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"^ckpt_path={tmp_path}: its status.json names no checkpoint"):
        find_best(tmp_path)


def test_several_checkpoints_are_tested_in_folders_with_names_that_are_no_paths(tmp_path: Path) -> None:
    paths = [tmp_path / "logs" / "train" / name / "checkpoints" / "best.ckpt" for name in "ab"]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.touch()
    command = ("-m", f"ckpt_path={paths[0]},{paths[1]}", "accelerator=cpu")
    result = run_command("test", *command, PROJECT_ROOT=str(tmp_path))
    assert f"ckpt_path={paths[0]}: not a checkpoint" in result.stderr
    assert sorted(tmp_path.rglob("best.ckpt")) == paths
    assert {path.name for path in (tmp_path / "logs" / "multirun").glob("*/*") if path.is_dir()} <= {"0", "1"}
