"""resume=<run>: kills, signals and exceptions change nothing. With real processes and real kills."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator

from src.engine.errors import ConfigError
from src.engine.runs.build import load_checkpoint
from src.engine.runs.resume import check_difference, expand, quoted
from src.engine.runs.status import write_status
from src.engine.settings.trust import plain_config
from tests import forks
from tests.compose import run_command
from tests.engine.equality import assert_equal, assert_same_run, content, scalars, table
from tests.engine.tiny import TINY, compose_tiny
from tests.marks import by_default
from tests.processes import wait_until

# All that draws random numbers or keeps a state: shuffling, noise, dropout, a schedule, averaged weights.
ARGUMENTS = (
    *TINY, "data.num_rows=250", "data.batch_size=5", "data.noise=0.1", "scheduler=onecycle", "trainer.max_epochs=3",
    "callbacks=minimal", "callbacks.last.every_n_steps=7", "logger=[tensorboard,csv]",
    "+callbacks.lr._target_=pytorch_lightning.callbacks.LearningRateMonitor",
    "+callbacks.averaging={_target_: pytorch_lightning.callbacks.EMAWeightAveraging, decay: 0.9}",
)  # fmt: skip
STEPS = 50  # an epoch: 250 rows in batches of 5

KILL = "callbacks.kill"


def kill_at(step: int, in_validation: bool = False) -> str:
    return f"+{KILL}={{_target_: tests.engine.faults.KillAt, step: {step}, in_validation: {in_validation}}}"


class Runs:
    """Runs of one command below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {"PROJECT_ROOT": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(self, *arguments: str) -> ForkServerProcess:
        return forks.start("train", arguments, self.root / "said", self.env)

    def begin(self, name: str, *overrides: str) -> ForkServerProcess:
        return self.start(*ARGUMENTS, *overrides, f"hydra.run.dir={self.path(name)}")

    def whole(self, name: str, *overrides: str) -> Path:
        """A run that nothing stops."""
        self.end(self.begin(name, *overrides))
        return self.path(name)

    def wait_in_step(self, name: str, process: ForkServerProcess) -> None:
        """Wait until a run waits in a step."""
        wait_until(lambda: f"waiting in {self.path(name)}" in self.said() or not process.is_alive(), seconds=300)
        assert process.is_alive(), self.said()[-3000:]

    def resume(self, name: str, *overrides: str) -> None:
        self.end(self.start(f"resume={self.path(name)}", *overrides))

    def end(self, process: ForkServerProcess, status: int = 0) -> None:
        process.join(300)
        assert process.exitcode == status, self.said()[-3000:]

    def kill(self, name: str, step: int, *overrides: str, in_validation: bool = False) -> None:
        """A run that is killed when some steps are done."""
        self.end(self.begin(name, *overrides, kill_at(step, in_validation)), status=-signal.SIGKILL)
        assert self.state(name) == "running"

    def path(self, name: str) -> Path:
        return self.root / "logs" / "train" / name

    def last(self, name: str) -> Path:
        return self.path(name) / "checkpoints" / "last.ckpt"

    def said(self) -> str:
        return (self.root / "said").read_text()

    def state(self, name: str) -> str:
        return str(json.loads((self.path(name) / "status.json").read_text())["state"])

    def wait_for_step(self, name: str, step: int) -> None:
        """Wait until a step's checkpoint is there."""
        path = self.last(name)
        wait_until(lambda: path.exists() and torch.load(path, weights_only=True)["global_step"] >= step, seconds=60)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    """The uninterrupted run."""
    return runs.whole("whole")


@pytest.mark.parametrize(
    ("step", "in_validation", "saved"),
    by_default(
        [
            (STEPS, True, STEPS - 1),  # the epoch's own save is due next
            (2 * STEPS + 17, False, 2 * STEPS + 12),
            (STEPS + 6, False, STEPS + 6),  # just saved
            (STEPS, False, STEPS),
        ]
    ),
)
def test_a_killed_run_ends_as_the_uninterrupted_one_to_the_bit(
    runs: Runs, whole: Path, step: int, in_validation: bool, saved: int
) -> None:
    name = f"killed-{step}-{in_validation}"
    runs.kill(name, step, in_validation=in_validation)
    assert load_checkpoint(runs.last(name))["global_step"] == saved
    runs.resume(name, f"{KILL}=null")
    assert runs.state(name) == "finished"
    assert_same_run(whole, runs.path(name))


@pytest.mark.slow
def test_a_clock_that_goes_back_between_kills_changes_no_curve(
    runs: Runs, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runs.env, "CLOCK_AHEAD", "7200")
    runs.kill("clock", STEPS + 20)
    monkeypatch.setitem(runs.env, "CLOCK_AHEAD", "3600")
    runs.end(runs.start(f"resume={runs.path('clock')}", f"{KILL}.step={2 * STEPS + 20}"), status=-signal.SIGKILL)
    monkeypatch.delitem(runs.env, "CLOCK_AHEAD")
    runs.resume("clock", f"{KILL}=null")
    assert_same_run(whole, runs.path("clock"))
    assert served(whole) == served(runs.path("clock"))


def served(folder: Path) -> dict[str, list[int]]:
    """The steps of each curve that TensorBoard's server in Python shows."""
    events = PluginEventAccumulator(str(folder), tensor_size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["tensors"] if not tag.startswith("_hparams_")]
    return {tag: [event.step for event in events.Tensors(tag)] for tag in tags}


@pytest.mark.slow
def test_twenty_kills_in_a_row_change_nothing(runs: Runs) -> None:
    longer = ("trainer.max_epochs=16", "callbacks.last.every_n_steps=3")
    whole = runs.whole("whole-16", *longer)
    at_random = random.Random(0).sample([step for step in range(4, 16 * STEPS) if step % STEPS], 17)
    first, *steps = sorted([*at_random, 3 * STEPS, 7 * STEPS, 12 * STEPS])
    runs.kill("killed-20", first, *longer)
    for step in steps:
        runs.end(runs.start("resume=latest", f"{KILL}.step={step}"), status=-signal.SIGKILL)
        saved = load_checkpoint(runs.last("killed-20"))["global_step"]
        assert saved == max(step // 3 * 3, step // STEPS * STEPS)
    runs.end(runs.start("resume=latest", f"{KILL}=null"))
    assert_same_run(whole, runs.path("killed-20"))


VARIANTS = {
    "plateau": ("scheduler=plateau", "scheduler.scheduler.patience=0", "optimizer.lr=0.05"),
    "accumulate": ("trainer.accumulate_grad_batches=3",),
    "validations in an epoch": ("+trainer.val_check_interval=0.2",),
    "bfloat16": ("trainer.precision=bf16-mixed",),
    "clipped": ("optimizer=sgd", "trainer.gradient_clip_val=0.1", "scheduler=step", "scheduler.scheduler.step_size=1"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_with_other_settings(runs: Runs, variant: str) -> None:
    whole = runs.whole(f"whole-{variant}", *VARIANTS[variant])
    for step in (12, STEPS, STEPS + 10):
        name = f"{variant}-{step}"
        runs.kill(name, step // (3 if variant == "accumulate" else 1), *VARIANTS[variant])
        runs.resume(name, f"{KILL}=null")
        assert_same_run(whole, runs.path(name))


KILLS = int(os.environ.get("KILLS", "5"))  # in a row, in each of SETTINGS
SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "validated within an epoch": ("+trainer.val_check_interval=10", "callbacks.last.every_n_steps=10"),
    "every second epoch validated": (
        "trainer.check_val_every_n_epoch=2", "scheduler=plateau", "scheduler.scheduler.patience=0",
        "+scheduler.strict=false", "optimizer.lr=0.05",
    ),
    "best three": ("+callbacks.checkpoint.save_top_k=3",),
    "moved": (),
    "steps": (
        "trainer=steps", "accelerator=cpu", "trainer.max_steps=250", "trainer.max_epochs=-1",
        "trainer.val_check_interval=30",
    ),
    "another folder of best ones": ("callbacks.checkpoint.dirpath='${output_dir}/own'",),
    "last window cut short": ("trainer.accumulate_grad_batches=3", "optimizer=sgd"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_several_kills_in_a_row_change_nothing_in_other_settings(runs: Runs, setting: str) -> None:
    settings = ("trainer.max_epochs=5", "callbacks.last.every_n_steps=3", *SETTINGS[setting])
    name = setting.replace(" ", "-")
    whole = runs.whole(f"whole-{name}", *settings)
    num_steps = load_checkpoint(runs.last(f"whole-{name}"))["global_step"]
    first, *steps = sorted(random.Random(setting).sample(range(4, num_steps), KILLS))
    runs.kill(name, first, *settings)
    for step in steps:
        if setting == "moved":
            runs.path(name).rename(runs.path(f"{name}-{step}"))
            name = f"{name}-{step}"
        runs.end(runs.start(f"resume={runs.path(name)}", f"{KILL}.step={step}"), status=-signal.SIGKILL)
    runs.resume(name, f"{KILL}=null")
    assert_equal(content(runs.last(whole.name)), content(runs.last(name)))
    assert scalars(whole) == scalars(runs.path(name))
    assert table(whole) == table(runs.path(name))
    records = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, runs.path(name))]
    for key in ("metrics", "logged"):
        assert records[0][key] == records[1][key]
    bests = [
        {path.name: load_checkpoint(path)["state_dict"] for path in folder.rglob("*.ckpt") if path.name != "last.ckpt"}
        for folder in (whole, runs.path(name))
    ]
    assert len(bests[0]) == (3 if setting == "best three" else 1)
    assert_equal(bests[0], bests[1])


@pytest.mark.parametrize(
    "signum",
    by_default([signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGQUIT]),
)
def test_a_signal_saves_the_current_step_and_changes_nothing(runs: Runs, whole: Path, signum: signal.Signals) -> None:
    name = signum.name
    go_on = runs.root / f"{name}-is-sent"
    wait = f"+callbacks.wait={{_target_: tests.engine.faults.WaitAt, step: 70, path: '{go_on}'}}"
    process = runs.begin(name, "callbacks.last.every_n_steps=null", wait)
    runs.wait_in_step(name, process)
    assert process.pid
    os.kill(process.pid, signum)
    go_on.touch()
    runs.end(process, status=128 + signum)
    assert runs.state(name) == "interrupted"
    assert load_checkpoint(runs.last(name))["global_step"] == 71
    runs.resume(name, "callbacks.wait=null")
    assert_same_run(whole, runs.path(name))


@pytest.mark.slow
def test_a_run_that_is_killed_soon_after_a_resume_has_all_its_curves(runs: Runs, whole: Path) -> None:
    runs.kill("soon", 2 * STEPS + 17)
    runs.end(runs.start(f"resume={runs.path('soon')}", f"{KILL}.step={2 * STEPS + 14}"), status=-signal.SIGKILL)
    assert load_checkpoint(runs.last("soon"))["global_step"] == 2 * STEPS + 12
    runs.resume("soon", f"{KILL}=null")
    assert_same_run(whole, runs.path("soon"))


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_anew(runs: Runs, whole: Path) -> None:
    runs.kill("early", 3)
    assert list(runs.path("early").glob("events.*"))
    assert not runs.last("early").exists()
    runs.resume("early", f"{KILL}=null")
    assert_same_run(whole, runs.path("early"))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_next_one_taken(runs: Runs, whole: Path) -> None:
    folder = runs.whole("damaged", "trainer.max_epochs=2", "scheduler=[]")
    content = bytearray(runs.last("damaged").read_bytes())
    content[len(content) // 2] ^= 1
    runs.last("damaged").write_bytes(content)
    best = load_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"]
    runs.resume("damaged", "trainer.max_epochs=3")
    said = runs.said()
    assert re.search(r"damaged/checkpoints: last\.ckpt: damaged \(.*\): \w+ing( on)? from best\.ckpt", said)
    assert f" from {folder}/checkpoints/best.ckpt, step {best}" in said
    assert [step for step, _ in scalars(folder)["val/acc"]] == [STEPS - 1, 2 * STEPS - 1, 3 * STEPS - 1]
    assert_same_run(runs.whole("constant", "scheduler=[]"), folder)


@pytest.mark.slow
def test_a_finished_run_is_extended_as_if_it_had_been_longer(runs: Runs) -> None:
    steady = ("scheduler=step", "scheduler.scheduler.step_size=2")
    runs.whole("extended", *steady, "trainer.max_epochs=1")
    runs.resume("extended", "trainer.max_epochs=3")
    assert "the config differs: trainer.max_epochs: 1 -> 3" in runs.said()
    assert_same_run(runs.whole("steady", *steady), runs.path("extended"))
    shorter = "trainer.max_epochs=2: the run so far has come to its epoch 3; choose more"
    assert_refused(runs, "extended", "trainer.max_epochs=2", shorter)


@pytest.mark.slow
def test_you_are_warned_of_what_is_not_exact(runs: Runs) -> None:
    runs.whole("other", "trainer.max_epochs=1", "scheduler=[]")
    said = len(runs.said())
    runs.resume("other", "trainer.max_epochs=2", "data.noise=0.2", "callbacks.averaging.decay=0.5")
    (differs,) = (line for line in runs.said()[said:].splitlines() if "not an exact continuation" in line)
    assert differs.startswith("not an exact continuation: the config differs: ")
    assert set(differs.split(": ", 2)[2].split(", ")) == {
        "trainer.max_epochs: 1 -> 2", "data.noise: 0.1 -> 0.2", "callbacks.averaging.decay: 0.9 -> 0.5"
    }  # fmt: skip


@pytest.mark.slow
def test_a_checkpoint_is_resumed_in_a_new_folder(runs: Runs) -> None:
    steady = ("scheduler=step", "scheduler.scheduler.step_size=2")
    runs.whole("first", *steady, "trainer.max_epochs=1")
    folder = runs.whole("second", *steady, f"ckpt_path={runs.last('first')}")
    assert_equal(content(runs.last("first"))["progress"]["epochs"], 1)
    assert [step for step, _ in scalars(folder)["val/acc"]] == [2 * STEPS - 1, 3 * STEPS - 1]

    # Killed before a checkpoint of its own, twice, it resumes from the first run's once more.
    runs.kill("third", STEPS + 3, *steady, f"ckpt_path={runs.last('first')}")
    runs.end(runs.start(f"resume={runs.path('third')}", f"{KILL}.step={STEPS + 4}"), status=-signal.SIGKILL)
    assert not runs.last("third").exists()
    runs.resume("third", f"{KILL}=null")
    assert_same_run(folder, runs.path("third"))


def test_only_weights_cannot_be_resumed(runs: Runs, whole: Path) -> None:
    checkpoint = load_checkpoint(whole / "checkpoints" / "last.ckpt")
    path = runs.root / "weights.ckpt"
    torch.save({name: checkpoint[name] for name in ("state_dict", "config")}, path)
    said = len(runs.said())
    runs.end(runs.begin("from-weights", f"ckpt_path={path}"), status=1)
    (line,) = (line for line in runs.said()[said:].splitlines() if "error" in line)
    assert f"error: ckpt_path={path}: holds weights only, nothing to resume from; choose a run's last.ckpt" in line


CONTRADICTIONS = {
    "trainer.max_epochs=9": "trainer.max_epochs=9: the run so far has 3, and its schedule, OneCycleLR, is",
    "data.batch_size=9": "data.batch_size=9: the run so far has 5, and its schedule, OneCycleLR, is",
    "trainer.limit_train_batches=0.5": "trainer.limit_train_batches=0.5: the run so far has .*Cycle",
    "optimizer.lr=0.1": "optimizer.lr=0.1: the run so far has 0.004, which its checkpoint keeps",
    "model.net.num_hidden=9": "model.net.num_hidden=9: the run so far has 8",
}


@pytest.mark.parametrize("resumed", CONTRADICTIONS)
def test_what_would_not_be_a_continuation_is_refused(resumed: str, whole: Path) -> None:
    stored = load_checkpoint(whole / "checkpoints" / "last.ckpt")["config"]
    asked = compose_tiny(whole, *ARGUMENTS[1:], resumed)
    with pytest.raises(ConfigError, match=CONTRADICTIONS[resumed]):
        check_difference(stored, plain_config(asked))


def test_what_it_was_given_itself_is_no_contradiction(whole: Path) -> None:
    stored = load_checkpoint(whole / "checkpoints" / "last.ckpt")["config"]
    check_difference(stored, plain_config(compose_tiny(whole, *ARGUMENTS[1:])))


@pytest.mark.parametrize(
    ("resumed", "reason"),
    [
        ((), "resume=.*whole.*: this run has finished; to train longer, add trainer.max_epochs=<more>"),
        (("ckpt_path=a.ckpt",), "ckpt_path=a.ckpt: resume=.* chooses this itself"),
        (("++ckpt_path=a.ckpt",), r"\+\+ckpt_path=a.ckpt: resume=.* chooses this itself"),
    ],
)
def test_what_resume_stands_for_is_not_set_beside_it(resumed: tuple[str, ...], reason: str, whole: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        expand([f"resume='{whole}'", *resumed])


def test_a_command_that_contradicts_its_run_ends_in_a_line_and_changes_nothing(runs: Runs, whole: Path) -> None:
    assert_refused(runs, "whole", "optimizer.lr=0.1", CONTRADICTIONS["optimizer.lr=0.1"])


@pytest.mark.slow
def test_a_cosine_is_not_made_longer(runs: Runs) -> None:
    runs.whole("cosine", "trainer.max_epochs=1", "scheduler=cosine")
    assert_refused(runs, "cosine", "trainer.max_epochs=9", "trainer.max_epochs=9: .* CosineAnnealingLR, is made for")


def assert_refused(runs: Runs, name: str, resumed: str | None, reason: str) -> None:
    before = runs.last(name).read_bytes()
    said = len(runs.said())
    process = runs.start(f"resume='{runs.path(name)}'", *([resumed] if resumed else []))
    runs.end(process, status=1)
    (line,) = [line for line in runs.said()[said:].splitlines() if not line.startswith("run ")]
    assert line.startswith("error: ")
    assert re.search(reason, line), line
    assert runs.last(name).read_bytes() == before
    assert runs.state(name) == "finished"


@pytest.mark.slow
def test_a_disk_that_gets_full_leaves_the_checkpoint_to_resume_from(
    runs: Runs, whole: Path, mount_disk: Callable[[str], Path]
) -> None:
    folder = mount_disk("3m") / "run"
    fill = f"+callbacks.fill={{_target_: tests.engine.faults.FillDiskAt, step: 60, path: {folder.parent}/zeros}}"
    quiet = ("logger=[]", f"hydra.run.dir={folder}")
    runs.end(runs.start(*ARGUMENTS, *quiet, fill), status=1)
    assert re.search(r"error: .*last\.ckpt: cannot be written \(No space left on device\)", runs.said())
    last = folder / "checkpoints" / "last.ckpt"
    assert load_checkpoint(last)["global_step"] == 56
    assert not list(last.parent.glob(".*"))
    (folder.parent / "zeros").unlink()
    runs.end(runs.start(f"resume={folder}", "callbacks.fill=null"))
    expected, found = content(whole / "checkpoints" / "last.ckpt"), content(last)
    del expected["metrics"], found["metrics"]  # without a logger there is no learning rate among them
    del expected["logged"]["at"]["lr-Adam"]
    assert_equal(expected, found)


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(runs: Runs) -> None:
    process = runs.begin("busy", "trainer.max_epochs=1000")
    runs.wait_for_step("busy", 7)
    for arguments in ((f"resume={runs.path('busy')}",), (*ARGUMENTS, f"hydra.run.dir={runs.path('busy')}")):
        said = len(runs.said())
        runs.end(runs.start(*arguments), status=1)
        assert re.search(rf"process {process.pid} on \S+ is at work", runs.said()[said:])
    process.kill()
    process.join()


def test_a_second_signal_ends_the_run_at_once(runs: Runs) -> None:
    process = runs.begin("impatient", "+callbacks.wait={_target_: tests.engine.faults.WaitAt, step: 5, path: never}")
    runs.wait_in_step("impatient", process)
    assert process.pid
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.is_alive()  # it is about to end its step
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    assert runs.state("impatient") == "interrupted"


@pytest.mark.slow
def test_an_exception_in_training_saves_the_steps_before(runs: Runs) -> None:
    steady = ("data.noise=0", "model.net.dropout=0", "~callbacks.averaging")
    whole = runs.whole("plain", *steady)
    fault = "+callbacks.fault={_target_: tests.engine.faults.FailAt, step: 60}"
    process = runs.begin("failed", *steady, fault)
    runs.end(process, status=1)
    assert runs.state("failed") == "failed"
    assert "error: RuntimeError: step 60 fails" in runs.said()
    assert load_checkpoint(runs.last("failed"))["global_step"] == 60
    runs.resume("failed", "callbacks.fault=null")
    assert "an exception had ended the run within a step" in runs.said()
    # What draws no random numbers resumes exactly all the same; the failed step's rows were not lost.
    weights = [
        load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (whole, runs.path("failed"))
    ]
    assert_equal(*weights)
    assert scalars(whole)["val/acc"] == scalars(runs.path("failed"))["val/acc"]


def test_resuming_nothing_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "sweep.json").touch()
    monkeypatch.setenv("PROJECT_ROOT", str(tmp_path))
    for value, reason in {
        "latest": "resume=latest: no run below .*: train first",
        "nowhere": "resume=nowhere: no such folder; expected a run's",
        str(tmp_path): "resume=.*: no run's folder: its status.json does not say",
        str(sweep): f"resume=.*: a sweep's folder; repeat its command with hydra.sweep.dir={sweep}",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            expand([f"resume={value}"])
    with pytest.raises(ConfigError, match="resumes one run; a sweep resumes by its own command"):
        expand(["-m", "resume=latest"])
    result = run_command("train", "resume=nowhere")
    assert result.returncode == 1
    assert re.fullmatch("error: resume=nowhere: no such folder; .*\n", result.stderr)


def test_the_latest_run_is_one_of_training(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "logs" / "train" / "run"
    run.mkdir(parents=True)
    write_status(run, "interrupted", {"overrides": ["seed=1"], "config_dirs": []})
    checkpoint = f"ckpt_path={whole}/checkpoints/best.ckpt"
    tested = forks.run_command("test", TINY[0], checkpoint, "accelerator=cpu", PROJECT_ROOT=str(tmp_path))
    assert tested.returncode == 0, tested.stderr
    (folder,) = (tmp_path / "logs" / "test").iterdir()
    monkeypatch.setenv("PROJECT_ROOT", str(tmp_path))
    assert f"hydra.run.dir={quoted(run)}" in expand(["resume=latest"])
    with pytest.raises(ConfigError, match="no run's folder"):
        expand([f"resume={quoted(folder)}"])


def test_the_latest_run_is_so_by_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT_ROOT", str(tmp_path))
    runs = [tmp_path / "logs" / "train" / name for name in ("first", "second")]
    for run in runs:
        run.mkdir(parents=True)
        write_status(run, "interrupted", {"overrides": [], "config_dirs": []})
        time.sleep(0.002)  # its clock counts milliseconds
    os.utime(runs[0] / "status.json", (2e9, 2e9))  # as a copy may have it
    assert f"hydra.run.dir={quoted(runs[1])}" in expand(["resume=latest"])


@pytest.mark.slow
def test_the_command_as_a_user_types_it(runs: Runs, whole: Path) -> None:
    runs.kill("typed", 20)
    result = run_command("train", "resume=latest", f"{KILL}=null", cwd=runs.root, **runs.env)
    assert result.returncode == 0, result.stderr
    said = result.stderr.splitlines()
    assert said[0].startswith("not an exact continuation: the config differs: callbacks.kill")
    assert said[1].endswith(" from logs/train/typed/checkpoints/last.ckpt, step 14")
    assert_same_run(whole, runs.path("typed"))


@pytest.mark.parametrize("name", ["run", "it's = here, too"])
def test_resume_stands_for_how_the_run_was_started(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    write_status(folder, "interrupted", {"overrides": ["seed=1", "ckpt_path=old.ckpt"], "config_dirs": ["mine"]})
    parser = OverridesParser.create()

    def values(arguments: list[str]) -> dict[str, Any]:  # of a key that is there twice, Hydra takes the last one, too
        return {override.key_or_group: override.value() for override in parser.parse_overrides(arguments)}

    flag, *overrides = expand(["seed=2", f"resume={quoted(folder)}"])
    assert flag == "--config-dir=mine"
    here = {"seed": 2, "resume": str(folder), "hydra.run.dir": str(folder)}
    assert values(overrides) == here | {"ckpt_path": "old.ckpt"}

    (folder / "checkpoints").mkdir()
    last = folder / "checkpoints" / "last.ckpt"
    torch.save({}, last)
    assert values(expand([f"resume={quoted(folder)}", "seed=2"])[1:]) == here | {"ckpt_path": str(last)}
    assert expand(["seed=2", "resume=null"]) == ["seed=2", "resume=null"]
    for plus in ("+", "++"):  # Hydra's words for a key that may not be there yet
        assert values(expand([f"{plus}resume={quoted(folder)}", "seed=2"])[1:]) == here | {"ckpt_path": str(last)}


def test_what_is_deleted_comes_after_what_was_added(tmp_path: Path) -> None:
    write_status(tmp_path, "interrupted", {"overrides": ["+callbacks.x=1"], "config_dirs": []})
    arguments = expand(["~callbacks.x", "--info", "all", f"resume={quoted(tmp_path)}"])
    assert arguments[:4] == ["--info", "all", "+callbacks.x=1", "~callbacks.x"]


@pytest.mark.parametrize("content", [b"\xff{}", b"{}", b"[]", b'{"overrides": []}', b'{"state": "running"}'])
def test_a_run_whose_status_is_damaged_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"its status\.json does not say how it was started"):
        expand([f"resume={quoted(tmp_path)}"])


def test_resume_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "again.yaml").write_text("# @package _global_\nresume: latest\n")
    result = run_command("train", f"--config-dir={tmp_path}", "experiment=again", PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line == "error: resume=latest: resumes a run from the command line only, not from a file"
    assert not (tmp_path / "logs").exists()
