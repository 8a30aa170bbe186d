"""A sweep's folder: the jobs' names, and that a sweep killed in the middle goes on; real processes, real kills."""

import json
import re
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.engine.errors import SweepError
from src.engine.runs.build import load_checkpoint
from src.engine.runs.resume import quoted
from src.engine.sweeps.folder import NAME_LENGTH, SweepFolder, job_name
from tests import forks
from tests.engine.sweeps.test_sweep import SMALL, Sweep, run_again
from tests.processes import wait_until

VALUES = st.text(max_size=200) | st.floats().map(str) | st.sampled_from(["a/b", "a_b", "A", "[1,2]", "../..", "é"])
OVERRIDES = st.lists(st.tuples(st.sampled_from(["optimizer.lr", "data.root", "+x@y"]), VALUES).map("=".join))
PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "))


def test_a_name_is_what_was_swept() -> None:
    assert job_name(["optimizer.lr=0.001", "seed=3"]) == "optimizer.lr=0.001,seed=3"
    assert job_name(["model=lenet5", "+trainer.x=1e-05"]) == "model=lenet5,trainer.x=1e-05"


@given(OVERRIDES)
def test_any_name_is_a_short_folder_name(overrides: list[str]) -> None:
    name = job_name(overrides)
    assert re.fullmatch(r"[A-Za-z0-9_.,=+@-]+", name)
    assert len(name) <= NAME_LENGTH
    assert name not in (".", "..")
    assert name.startswith(re.split(r"[^\w.@=]", overrides[0].lstrip("+"), flags=re.ASCII)[0] if overrides else "job")


@given(st.sets(st.text("a_/:é", max_size=4), min_size=2) | st.sets(VALUES, min_size=2))
def test_different_jobs_have_different_names(values: set[str]) -> None:
    assert len({job_name([f"data.root={value}"]) for value in values}) == len(values)


def test_cut_names_stay_different() -> None:
    common = "data.mirrors=" + "m" * 150
    first, second = job_name([common + "1"]), job_name([common + "2"])
    assert first != second
    assert first[:100] == second[:100] == common[:100]
    assert len(first) == len(second) == 120


@settings(deadline=None)  # Hydra's parser warms up
@given(PRINTABLE)
def test_quoted_text_comes_through_hydra_as_it_was(text: str) -> None:
    override = OverridesParser.create().parse_override(f"key={quoted(text)}")
    assert override.value() == text


def _finish(folder: Path, **extra: Any) -> None:
    best = {"score": 0.75, "checkpoint": str(folder / "checkpoints" / "best.ckpt")}
    record = {"metrics": {"val/acc": 0.5, "train/acc": 1.0}, "best": best, "pruned": False, "seconds": 2.5}
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(record | extra))


def test_a_finished_or_pruned_job_is_not_run_again(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    _finish(tmp_path / "a")
    _finish(tmp_path / "b", pruned=True)
    assert folder.prepare("a") is None
    assert folder.prepare("b") is None
    job = folder.job("a", {"seed": 1})
    assert (job.status, job.score, job.metrics, job.seconds) == ("finished", 0.75, {"val/acc": 0.5}, 2.5)
    assert folder.job("b", {}).status == "pruned"


def _values(overrides: Sequence[str] | None) -> dict[str, Any]:
    parsed = OverridesParser.create().parse_overrides(list(overrides or ()))
    return {override.key_or_group: override.value() for override in parsed}


@pytest.mark.parametrize("name", ["seed=1", "it's,a=b-0123abcd"])
def test_an_interrupted_job_goes_on_from_its_last_checkpoint(name: str, tmp_path: Path) -> None:
    last = tmp_path / "it's = here" / name / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    with zipfile.ZipFile(last, "w") as file:
        file.writestr("data", "weights")
    folder = SweepFolder(last.parents[2])
    assert folder.job(name, {}).status == "started"
    assert _values(folder.prepare(name)) == {"hydra.sweep.subdir": name, "test": False, "ckpt_path": str(last)}
    assert last.is_file()

    last.write_bytes(last.read_bytes()[:-10])
    assert "ckpt_path" not in _values(folder.prepare(name))
    assert (folder.job(name, {}).status, last.exists()) == ("waiting", False)


def test_a_failed_job_starts_anew_and_its_log_goes_on(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    job = tmp_path / "a"
    (job / "checkpoints").mkdir(parents=True)
    for name in ("checkpoints/last.ckpt", "events.out.tfevents.1", "train.log"):
        (job / name).write_text("kept")
    (job / "error.txt").write_text("error: no memory\n")
    assert (folder.job("a", {}).status, folder.job("a", {}).error) == ("failed", "no memory")
    assert "ckpt_path" not in _values(folder.prepare("a"))
    assert {path.name for path in job.iterdir()} == {"status.json", "train.log"}
    assert (job / "train.log").read_text() == "kept"


def test_a_job_that_has_not_run_waits(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    assert folder.job("a", {}).status == "waiting"
    assert _values(folder.prepare("a")) == {"hydra.sweep.subdir": "a", "test": False}
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "queued"
    assert folder.job("a", {}).status == "waiting"


CONFIG = {"monitor": "val/acc", "mode": "max", "trainer": {"max_epochs": 2, "plugins": [{"a": 1}]}, "sweep": None}


@pytest.mark.parametrize(
    ("config", "space", "message"),
    [
        ({"trainer": {"max_epochs": 3}}, {"seed": "0,1"}, "trainer.max_epochs=3: the sweep in .* was started with 2;"),
        ({"mode": "min"}, {"seed": "0,1"}, "mode=min: .* was started with max;"),
        ({"new": 1}, {"seed": "0,1"}, "new=1: .* was started with absent;"),
        ({}, {"seed": "0,1,2"}, "seed=0,1,2: .* was started with 0,1;"),
        ({}, {"data.seed": "0,1"}, "data.seed=0,1: .* was started with absent;"),
    ],
)
def test_another_sweeps_folder_is_refused(
    config: dict[str, Any], space: dict[str, str], message: str, tmp_path: Path
) -> None:
    folder = SweepFolder(tmp_path)
    with folder.opened(OmegaConf.create(CONFIG), {"seed": "0,1"}):
        folder.add({"seed=0": {"seed": 0}})
    with folder.opened(OmegaConf.create(CONFIG), {"seed": "0,1"}):
        assert [job.name for job in folder.jobs()] == ["seed=0"]
    changed = OmegaConf.merge(CONFIG, config)
    assert isinstance(changed, DictConfig)
    with pytest.raises(SweepError, match=message), folder.opened(changed, space):
        pass


EPOCHS, STEPS = 4, 20
# What is swept changes nothing in the training: whether interrupted or not, the jobs must come to the same weights.
LONG = ("data.timeout=-1,1,2,3", "test=false", f"trainer.max_epochs={EPOCHS}", f"trainer.limit_train_batches={STEPS}")


class Resumed(NamedTuple):
    """A sweep that was killed in its third job; what was there by then, and what came of it."""

    sweep: Sweep
    second: subprocess.CompletedProcess[str]
    rows: list[dict[str, str]]
    killed_at: int
    finished: dict[Path, int]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """Let a job fail and one finish, kill the sweep behind the first epoch of the next, then start it again."""
    root = tmp_path_factory.mktemp("resumed")
    sweep, again = root / "my = sweep", (*SMALL, *LONG, f"hydra.sweep.dir='{root}/my = sweep'")
    process = forks.start("train", ["-m", *again], root / "said", {"PROJECT_ROOT": str(root)})
    wait_until((sweep / "sweep.json").is_file, seconds=300)
    second = forks.run_command("train", "-m", *again, PROJECT_ROOT=str(root))
    wait_until((sweep / "data.timeout=2" / "checkpoints" / "last.ckpt").is_file, seconds=300)
    process.kill()
    process.join()
    killed_at = load_checkpoint(sweep / "data.timeout=2" / "checkpoints" / "last.ckpt")["global_step"]
    rows = Sweep(sweep, second).rows()
    finished = {path: path.stat().st_mtime_ns for path in (sweep / "data.timeout=1").rglob("*.*")}
    result = forks.run_command("train", "-m", *again, PROJECT_ROOT=str(root))
    return Resumed(Sweep(sweep, result), second, rows, killed_at, finished)


def test_a_second_process_in_the_same_folder_is_refused(resumed: Resumed) -> None:
    assert resumed.second.returncode == 1
    (line,) = (resumed.second.stdout + resumed.second.stderr).splitlines()
    assert line == f"error: hydra.sweep.dir={resumed.sweep.path}: another process works on it; wait for its end"


def test_the_table_is_there_behind_each_job(resumed: Resumed) -> None:
    assert [(row["job"], row["status"]) for row in resumed.rows] == [
        ("data.timeout=1", "finished"),
        ("data.timeout=-1", "failed"),
        ("data.timeout=2", "waiting"),
        ("data.timeout=3", "waiting"),
    ]


def test_an_interrupted_job_goes_on_where_it_was_killed(resumed: Resumed) -> None:
    path, result = resumed.sweep
    assert STEPS <= resumed.killed_at < EPOCHS * STEPS
    assert resumed.finished == {file: file.stat().st_mtime_ns for file in (path / "data.timeout=1").rglob("*.*")}
    last = path / "data.timeout=2" / "checkpoints" / "last.ckpt"
    assert yaml.safe_load((path / "data.timeout=2" / "config.yaml").read_text())["ckpt_path"] == str(last)
    epochs = re.findall(r"epoch (\d)/4 ", (path / "data.timeout=2" / "train.log").read_text())
    assert epochs == ["1", "2", "3", "4"]
    assert len(re.findall(r"^epoch ", result.stderr, re.M)) == (EPOCHS - resumed.killed_at // STEPS) + EPOCHS


def test_a_failed_job_runs_again(resumed: Resumed) -> None:
    path, result = resumed.sweep
    assert result.returncode == 1
    assert "error: 1 of 4 jobs failed" in result.stderr
    assert (path / "data.timeout=-1" / "train.log").read_text().count("Traceback") == 2
    assert len(list((path / "data.timeout=-1").glob("events.*"))) == 1


@pytest.mark.parametrize("job", ["data.timeout=2", "data.timeout=3"])
def test_a_resumed_sweep_comes_to_what_an_uninterrupted_one_does(job: str, resumed: Resumed) -> None:
    def curve(name: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(resumed.sweep.path / name), purge_orphaned_data=False).Reload()
        return [(event.step, event.value) for event in events.Scalars("val/acc")]

    def weights(name: str) -> dict[str, torch.Tensor]:
        checkpoint = load_checkpoint(resumed.sweep.path / name / "checkpoints" / "last.ckpt")
        assert checkpoint["global_step"] == EPOCHS * STEPS
        return dict(checkpoint["state_dict"])

    whole, record = resumed.sweep.record("data.timeout=1"), resumed.sweep.record(job)
    assert record["metrics"]["val/loss"] == whole["metrics"]["val/loss"]
    assert record["best"]["score"] == whole["best"]["score"]
    assert [step for step, _ in curve(job)] == [STEPS * epoch - 1 for epoch in range(1, EPOCHS + 1)]
    assert curve(job) == curve("data.timeout=1")
    assert all(torch.equal(tensor, weights("data.timeout=1")[name]) for name, tensor in weights(job).items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_epochs=5", "trainer.max_epochs=5: the sweep in {} was started with 4;"),
        ("data.timeout=1,2", "data.timeout=1,2: the sweep in {} was started with -1,1,2,3;"),
    ],
)
def test_another_sweep_cannot_go_on_in_the_folder(override: str, message: str, resumed: Resumed) -> None:
    path = resumed.sweep.path
    result = run_again(resumed.sweep, *LONG, override)
    assert result.returncode == 1
    (line,) = (result.stdout + result.stderr).splitlines()
    assert line.startswith(f"error: {message.format(path)}")
