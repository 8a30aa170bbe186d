"""A sweep's folder: the jobs' names, and that a sweep killed in the middle resumes; real processes, real kills."""

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
from src.engine.runs.status import write_status
from src.engine.sweeps.folder import NAME_LENGTH, SweepFolder, job_name
from src.engine.sweeps.sweep import running
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


def test_names_that_differ_in_case_only_are_two_folders_everywhere() -> None:
    taken: dict[str, str] = {}
    names = []
    for override in ("name=adam", "name=Adam", "name=adam", "name=ADAM"):
        names.append(job_name([override], taken))
        taken.setdefault(names[-1].lower(), names[-1])
    assert names[0] == names[2] == "name=adam"  # the same job
    assert len({name.lower() for name in names}) == 3


CONFIG = {"monitor": "val/acc", "mode": "max", "trainer": {"max_epochs": 2, "plugins": [{"a": 1}]}, "sweep": None}


def start(path: Path, *jobs: str) -> SweepFolder:
    """A sweep's folder with some jobs planned."""
    folder = SweepFolder(path)
    with folder.opened(OmegaConf.create(CONFIG), {"seed": "0,1"}):
        folder.add({name: {"seed": number} for number, name in enumerate(jobs)})
    return folder


def write_record(folder: Path, **changes: Any) -> None:
    """What a job of any module may leave."""
    record = {
        "metrics": {"val/acc": 0.5, "perplexity": 7.0}, "pruned": False, "seconds": 2.5,
        "best": {"score": 0.75, "checkpoint": str(folder / "best.ckpt"), "monitor": "val/acc"},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "best.ckpt").touch()
    (folder / "metrics.json").write_text(json.dumps(record | changes))


def write_checkpoint(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data", "weights")


def test_a_finished_or_pruned_job_is_not_run_again(tmp_path: Path) -> None:
    folder = start(tmp_path, "a", "b")
    write_record(tmp_path / "a")
    write_record(tmp_path / "b", pruned=True)
    assert folder.prepare("a") is None
    assert folder.prepare("b") is None
    job, other = folder.jobs()
    assert (job.status, job.score, job.is_best, job.seconds) == ("finished", 0.75, True, 2.5)
    assert job.metrics == {"val/acc": 0.5, "perplexity": 7.0}
    assert other.status == "pruned"


@pytest.mark.parametrize(
    ("best", "score", "is_best"),
    [
        ({"score": 0.75, "monitor": "val/acc"}, 0.75, True),
        ({"score": 0.1, "monitor": "val/loss"}, 0.5, False),  # chosen by another measure
        ({"score": 0.5, "monitor": None}, 0.5, False),  # the last weights
    ],
)
def test_a_score_is_the_best_or_is_told_to_be_the_last(
    best: dict[str, Any], score: float, is_best: bool, tmp_path: Path
) -> None:
    folder = start(tmp_path, "a")
    write_record(tmp_path / "a", best=best | {"checkpoint": None})
    (job,) = folder.jobs()
    assert (job.score, job.is_best) == (score, is_best)


def test_a_job_that_has_ended_is_read_once(tmp_path: Path) -> None:
    folder = start(tmp_path, "a", "b")
    write_record(tmp_path / "a")
    assert [job.status for job in folder.jobs()] == ["finished", "waiting"]
    (tmp_path / "a" / "metrics.json").write_text("")
    write_record(tmp_path / "b")
    assert [job.status for job in folder.jobs()] == ["finished", "finished"]
    folder.forget("a")
    assert [job.status for job in folder.jobs()] == ["started", "finished"]


@pytest.mark.parametrize("written", ["", "{", "[]", "{}", '{"metrics": {}}', "\x00" * 40, '{"metrics": null}'])
def test_a_job_whose_record_is_damaged_is_run_again(
    written: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = start(tmp_path, "a")
    write_checkpoint(tmp_path / "a" / "checkpoints" / "last.ckpt")
    (tmp_path / "a" / "metrics.json").write_text(written)
    write_status(tmp_path / "a", "finished")
    assert _values(folder.prepare("a"))["ckpt_path"] == str(tmp_path / "a" / "checkpoints" / "last.ckpt")
    assert f"{tmp_path}/a/metrics.json: damaged" in caplog.text


@pytest.mark.parametrize("written", ["", "{", "[]", "{}", "\x00" * 40])
def test_a_damaged_plan_is_named_in_a_line(written: str, tmp_path: Path) -> None:
    start(tmp_path, "a")
    (tmp_path / "sweep.json").write_text(written)
    with pytest.raises(SweepError, match=rf"^{tmp_path}/sweep\.json: damaged .*; delete it and repeat"):
        start(tmp_path, "a")


@pytest.mark.parametrize("state", ["interrupted", "running"])
def test_a_job_that_was_stopped_or_killed_keeps_its_checkpoints(state: str, tmp_path: Path) -> None:
    folder = start(tmp_path, "a")
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    write_checkpoint(last)
    write_status(tmp_path / "a", state)
    if state == "running":  # killed: its launcher has noted so
        (tmp_path / "a" / "error.txt").write_text("error: killed by SIGKILL\n")
    (job,) = folder.jobs()
    assert job.status == {"interrupted": "stopped", "running": "failed"}[state]
    assert _values(folder.prepare("a"))["ckpt_path"] == str(last)
    assert not (tmp_path / "a" / "error.txt").exists()


def _values(overrides: Sequence[str] | None) -> dict[str, Any]:
    parsed = OverridesParser.create().parse_overrides(list(overrides or ()))
    return {override.key_or_group: override.value() for override in parsed}


@pytest.mark.parametrize("name", ["seed=1", "it's,a=b-0123abcd"])
def test_an_interrupted_job_goes_on_from_its_last_checkpoint(name: str, tmp_path: Path) -> None:
    last = tmp_path / "it's = here" / name / "checkpoints" / "last.ckpt"
    write_checkpoint(last)
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
    (job / "error.txt").write_text("error: no memory für alle\n", encoding="utf-8")
    write_status(job, "failed")
    assert (folder.job("a", {}).status, folder.job("a", {}).error) == ("failed", "no memory für alle")
    assert "ckpt_path" not in _values(folder.prepare("a"))
    assert {path.name for path in job.iterdir()} == {"status.json", "train.log"}
    assert (job / "train.log").read_text() == "kept"


def test_what_a_cluster_has_in_its_queue_is_left_alone(tmp_path: Path) -> None:
    folder = start(tmp_path, "waits", "is done", "new")
    folder.note_submitted({"waits": "7_0", "is done": "7_1"})
    write_record(tmp_path / "is done")
    (tmp_path / "waits").mkdir()
    (tmp_path / "waits" / "curve").touch()
    with folder.opened(OmegaConf.create(CONFIG), {"seed": "0,1"}):
        assert folder.submitted == {"waits": "7_0"}
        assert folder.prepare("is done") is None
        assert folder.prepare("waits") == ["hydra.sweep.subdir='waits'", "test=false"]
    assert (tmp_path / "waits" / "curve").exists()
    folder.note_submitted({"waits": None})
    assert folder.submitted == {}


def test_a_sweep_in_slurms_queue_is_no_other_launchers(tmp_path: Path) -> None:
    start(tmp_path, "waits").note_submitted({"waits": "7_0"})
    hydra: dict[str, Any] = {"sweeper": {}, "sweep": {"dir": str(tmp_path)}, "launcher": {"_target_": "another"}}
    hydra["overrides"] = {"hydra": [f"hydra.sweep.dir={tmp_path}"]}
    with (
        pytest.raises(SweepError, match=r"jobs of this sweep are in Slurm's queue; add hydra/launcher=submitit_slurm"),
        running(OmegaConf.create({**CONFIG, "hydra": hydra}), {"seed": "0,1"}),
    ):
        pass


def test_a_job_that_has_not_run_waits(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    assert folder.job("a", {}).status == "waiting"
    assert _values(folder.prepare("a")) == {"hydra.sweep.subdir": "a", "test": False}
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "queued"
    assert folder.job("a", {}).status == "waiting"


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
    folder = start(tmp_path, "seed=0")
    with folder.opened(OmegaConf.create(CONFIG), {"seed": "0,1"}):
        assert [job.name for job in folder.jobs()] == ["seed=0"]
    changed = OmegaConf.merge(CONFIG, config)
    assert isinstance(changed, DictConfig)
    with pytest.raises(SweepError, match=message), folder.opened(changed, space):
        pass


EPOCHS, STEPS = 4, 12
# What is swept changes nothing in the training: whether interrupted or not, the jobs must come to the same weights.
LONG = ("trainer.limit_test_batches=-1,1,2,3", "test=false", f"trainer.max_epochs={EPOCHS}")


def wait(root: Path) -> tuple[str, ...]:
    """Each job waits after its first epoch for a file of the value's name."""
    path = f"'{root}/${{trainer.limit_test_batches}}'"
    return (f"+callbacks.wait={{_target_:tests.engine.faults.WaitAt,step:{STEPS + 1},path:{path}}}",)


class Resumed(NamedTuple):
    """A sweep that was killed in its third job; what was there by then, and what came of it."""

    sweep: Sweep
    second: subprocess.CompletedProcess[str]
    rows: list[dict[str, str]]
    killed_at: int
    finished: dict[Path, int]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """Let a job fail and one finish, kill the sweep after the first epoch of the next, then start it again."""
    root = tmp_path_factory.mktemp("resumed")
    env = {"PROJECT_ROOT": str(root)}
    sweep, again = root / "my = sweep", (*SMALL, *LONG, *wait(root), f"hydra.sweep.dir='{root}/my = sweep'")
    (root / "1").touch()
    process = forks.start("train", ["-m", *again], root / "said", env)
    wait_until((sweep / "sweep.json").is_file, seconds=300)
    second = forks.run_command("train", "-m", *again, **env)
    told = sweep / "trainer.limit_test_batches=2" / "train.log"  # the epoch's line, which comes after its checkpoint
    wait_until(lambda: told.is_file() and "epoch 1/" in told.read_text(), seconds=300)
    process.kill()
    process.join()
    for name in "23":
        (root / name).touch()
    killed_at = load_checkpoint(sweep / "trainer.limit_test_batches=2" / "checkpoints" / "last.ckpt")["global_step"]
    rows = Sweep(sweep, second).rows()
    finished = {path: path.stat().st_mtime_ns for path in (sweep / "trainer.limit_test_batches=1").rglob("*.*")}
    result = forks.run_command("train", "-m", *again, **env)
    return Resumed(Sweep(sweep, result), second, rows, killed_at, finished)


@pytest.mark.slow
def test_a_second_process_in_the_same_folder_is_refused(resumed: Resumed) -> None:
    assert resumed.second.returncode == 1
    (line,) = (resumed.second.stdout + resumed.second.stderr).splitlines()
    assert line == f"error: hydra.sweep.dir={resumed.sweep.path}: another process works on it; wait for its end"


@pytest.mark.slow
def test_the_table_is_there_behind_each_job(resumed: Resumed) -> None:
    assert [(row["job"], row["status"]) for row in resumed.rows] == [
        ("trainer.limit_test_batches=1", "finished"),
        ("trainer.limit_test_batches=-1", "failed"),
        ("trainer.limit_test_batches=2", "waiting"),
        ("trainer.limit_test_batches=3", "waiting"),
    ]


@pytest.mark.slow
def test_an_interrupted_job_goes_on_where_it_was_killed(resumed: Resumed) -> None:
    path, result = resumed.sweep
    assert STEPS <= resumed.killed_at < EPOCHS * STEPS
    assert resumed.finished == {
        file: file.stat().st_mtime_ns for file in (path / "trainer.limit_test_batches=1").rglob("*.*")
    }
    last = path / "trainer.limit_test_batches=2" / "checkpoints" / "last.ckpt"
    assert yaml.safe_load((path / "trainer.limit_test_batches=2" / "config.yaml").read_text())["ckpt_path"] == str(last)
    epochs = re.findall(r"epoch (\d)/4 ", (path / "trainer.limit_test_batches=2" / "train.log").read_text())
    assert epochs == ["1", "2", "3", "4"]
    assert len(re.findall(r"^epoch ", result.stderr, re.M)) == (EPOCHS - resumed.killed_at // STEPS) + EPOCHS


@pytest.mark.slow
def test_a_failed_job_runs_again(resumed: Resumed) -> None:
    path, result = resumed.sweep
    assert result.returncode == 1
    assert "error: 1 of 4 jobs failed" in result.stderr
    assert (path / "trainer.limit_test_batches=-1" / "train.log").read_text().count("stack trace:") == 2
    assert len(list((path / "trainer.limit_test_batches=-1").glob("events.*"))) == 1


@pytest.mark.parametrize("job", ["trainer.limit_test_batches=2", "trainer.limit_test_batches=3"])
@pytest.mark.slow
def test_a_resumed_sweep_comes_to_what_an_uninterrupted_one_does(job: str, resumed: Resumed) -> None:
    def curve(name: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(resumed.sweep.path / name), purge_orphaned_data=False).Reload()
        return [(event.step, event.value) for event in events.Scalars("val/acc")]

    def weights(name: str) -> dict[str, torch.Tensor]:
        checkpoint = load_checkpoint(resumed.sweep.path / name / "checkpoints" / "last.ckpt")
        assert checkpoint["global_step"] == EPOCHS * STEPS
        return dict(checkpoint["state_dict"])

    whole, record = resumed.sweep.record("trainer.limit_test_batches=1"), resumed.sweep.record(job)
    assert record["metrics"]["val/loss"] == whole["metrics"]["val/loss"]
    assert record["best"]["score"] == whole["best"]["score"]
    assert [step for step, _ in curve(job)] == [STEPS * epoch - 1 for epoch in range(1, EPOCHS + 1)]
    assert curve(job) == curve("trainer.limit_test_batches=1")
    assert all(
        torch.equal(tensor, weights("trainer.limit_test_batches=1")[name]) for name, tensor in weights(job).items()
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_epochs=5", "trainer.max_epochs=5: the sweep in {} was started with 4;"),
        (
            "trainer.limit_test_batches=1,2",
            "trainer.limit_test_batches=1,2: the sweep in {} was started with -1,1,2,3;",
        ),
    ],
)
@pytest.mark.slow
def test_another_sweep_cannot_go_on_in_the_folder(override: str, message: str, resumed: Resumed) -> None:
    path = resumed.sweep.path
    result = run_again(resumed.sweep, *LONG, *wait(path.parent), override)
    assert result.returncode == 1
    (line,) = (result.stdout + result.stderr).splitlines()
    assert line.startswith(f"error: {message.format(path)}")
