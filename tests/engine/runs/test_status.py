"""src/status.py: what a run's folder says of it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from src.engine.errors import ConfigError
from src.engine.runs.status import (
    add_to_status,
    describe_start,
    is_held,
    list_checkpoints,
    read_status,
    repeat_start,
    tracked,
    write_status,
)
from src.engine.settings.check import CONF, ROOT

START = {"overrides": ["seed=1"], "config_dirs": []}


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (None, "finished"),
        (RuntimeError(), "failed"),
        (SystemExit(1), "failed"),
        (SystemExit("error"), "failed"),
        (SystemExit(143), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_run_says_how_it_stands_and_how_it_ended(end: BaseException | None, state: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with suppress(BaseException), tracked(folder, START):
        assert read_status(folder)["state"] == "running"
        assert is_held(folder)
        if end:
            raise end
    status = read_status(folder)
    assert (status["state"], status["overrides"], status["process"]) == (state, ["seed=1"], os.getpid())
    assert not is_held(folder)


def test_a_folder_in_which_a_run_is_at_work_is_refused(tmp_path: Path) -> None:
    with tracked(tmp_path, START):
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on \S+ is at work there"), tracked(tmp_path, {}):
            pass
        assert read_status(tmp_path)["state"] == "running"


AT_WORK = """
import os, sys, time
from pathlib import Path
from src.engine.runs.status import tracked
with tracked(Path(sys.argv[1]), {}):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


def test_a_killed_run_holds_its_folder_no_more_though_a_worker_of_it_lives(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_WORK, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        worker = int(process.stdout.readline())
        assert is_held(tmp_path)
        process.kill()
        process.wait()
        os.kill(worker, 0)  # it lives
        assert not is_held(tmp_path)
        os.kill(worker, signal.SIGKILL)


def test_you_are_warned_of_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")  # as NFS says without its lock service

    monkeypatch.setattr("fcntl.flock", flock)
    with tracked(tmp_path, START):
        assert caplog.messages == [
            f"hydra.run.dir={tmp_path}: a file system without locks: start no other run there meanwhile"
        ]
    assert read_status(tmp_path)["state"] == "finished"


def test_a_folder_that_takes_no_files_is_not_held(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "missing")
    assert not is_held(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("first", "then"), [("finished", "finished"), ("interrupted", "failed"), ("running", "failed")]
)
def test_an_attempt_that_comes_to_nothing_changes_nothing_in_how_the_run_was_started(
    first: str, then: str, tmp_path: Path
) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    write_status(tmp_path, first, START)
    attempt = {"overrides": ["seed=1", "optimizer.lr=5"], "config_dirs": []}
    with suppress(ConfigError), tracked(tmp_path, attempt):
        assert read_status(tmp_path)["overrides"] == attempt["overrides"]  # what a killed one resumes with
        raise ConfigError("another learning rate")
    assert read_status(tmp_path) | START | {"state": then} == read_status(tmp_path)

    with suppress(RuntimeError), tracked(tmp_path, attempt):
        os.utime(last, ns=(1, 1))
        raise RuntimeError("after a checkpoint")
    assert read_status(tmp_path) | attempt | {"state": "failed"} == read_status(tmp_path)


def test_the_error_of_a_run_is_not_hidden_by_a_status_that_cannot_be_written(tmp_path: Path) -> None:
    def fail_without_a_folder() -> None:
        with tracked(tmp_path / "run", START):
            shutil.rmtree(tmp_path / "run")
            raise RuntimeError("the error")

    with pytest.raises(RuntimeError, match="the error"):
        fail_without_a_folder()


def test_a_status_keeps_how_the_run_was_started(tmp_path: Path) -> None:
    write_status(tmp_path, "queued", START)
    write_status(tmp_path, "running")
    assert json.loads((tmp_path / "status.json").read_text())["overrides"] == ["seed=1"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1", b"[1]", b'{"state": "\xff"}', bytes(100)])
def test_without_a_readable_file_there_is_no_status(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "status.json").write_bytes(content)
    assert read_status(tmp_path) == {}


def start_of(task: list[str], *own: str, **choices: str) -> dict[str, Any]:
    """What is described of a run in the folder ``run``, as Hydra tells of it."""
    sources = [
        {"provider": "hydra", "schema": "pkg", "path": "hydra.conf"},
        {"provider": "main", "schema": "file", "path": str(CONF)},
        {"provider": "hydra.searchpath in command-line", "schema": "file", "path": "more"},
        {"provider": "hydra.searchpath in command-line", "schema": "pkg", "path": "theirs.conf"},
        {"provider": "command-line", "schema": "file", "path": "/mine"},
    ]
    runtime = {"config_sources": sources, "cwd": str(Path.cwd()), "choices": choices}
    overrides = {"task": task, "hydra": [*own, "hydra.run.dir=run", "hydra.mode=RUN"]}
    job = {"config_name": "other"}
    node = {"overrides": overrides, "runtime": runtime, "run": {"dir": "run"}, "job": job}
    return describe_start(OmegaConf.create(node))


def test_a_resumed_run_was_started_as_the_first_time_with_what_was_added() -> None:
    task = ["seed=1", "ckpt_path=first.ckpt", "trainer.max_epochs=5"]
    assert start_of(task)["overrides"] == task
    resumed = [*task, "resume=run", "ckpt_path='run/checkpoints/last.ckpt'"]
    assert start_of(resumed)["overrides"] == task  # the first checkpoint is where the run has begun
    assert start_of([*task, "ckpt_path=null", "resume=run"])["overrides"] == [*task, "ckpt_path=null"]


def test_hydras_own_settings_are_repeated_but_for_those_of_a_sweep() -> None:
    of_sweep = ("hydra.sweep.dir=all", "hydra.sweep.subdir='a'", "hydra/launcher=process", "hydra.launcher.n_jobs=2",
                "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2")  # fmt: skip
    own = ("hydra.searchpath=[file://more,pkg://theirs.conf]", "hydra.job.name=x", "hydra/job_logging=stdout")
    start = start_of(["seed=1"], *own, *of_sweep, debug="fast")
    assert start["debug"]
    flag, name, *overrides = repeat_start(start)
    assert (flag, name) == ("--config-dir=/mine", "--config-name=other")
    parsed = OverridesParser.create().parse_overrides(overrides)
    assert {override.key_or_group: override.value() for override in parsed} == {
        "seed": 1, "hydra.job.name": "x", "hydra/job_logging": "stdout",
        "hydra.searchpath": [f"file://{Path.cwd()}/more", "pkg://theirs.conf"],
    }  # fmt: skip
    assert not start_of([])["debug"]


def test_checkpoints_are_found_where_the_record_says(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere" / "last.ckpt"
    files = [run / "checkpoints" / "a.ckpt", run / "own" / "b.ckpt", elsewhere]
    for path in files:
        path.parent.mkdir(parents=True)
        path.touch()
    assert list_checkpoints(run) == files[:1]
    add_to_status(run, {"checkpoints": ["own/b.ckpt", str(elsewhere), "own/gone.ckpt"]})
    assert set(list_checkpoints(run)) == set(files)
