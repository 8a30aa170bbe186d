"""hydra/launcher=vectorized by the command: folders, failures, groups, signals."""

import csv
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hydra_plugins.vectorized_launcher import get_shared
from src.build import load_checkpoint
from src.config import ROOT
from src.status import read_status
from tests import forks
from tests.compose import compose_cfg, run_command
from tests.processes import wait_until

VECTORIZED = ("-m", "hydra/launcher=vectorized", "data=mnist5k", "trainer=cpu", "callbacks=minimal")
NETS = """
import torch
from torch import nn

class Branching(nn.Module):
    def __init__(self, **_):
        super().__init__()
        self.layer = nn.Linear(1024, 10)

    def forward(self, images):
        logits = self.layer(images.flatten(1))
        return logits if logits.sum() > 0 else -logits
"""


def run_sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return forks.run_command("train", *VECTORIZED, *arguments, f"hydra.sweep.dir={folder}")


def read_rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return {row["job"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Two learning rates by two batch sizes, and one that diverges in each group."""
    folder = tmp_path_factory.mktemp("sweeps") / "sweep"
    swept = ("optimizer.lr=0.001,0.004,1e30", "data.batch_size=64,100")
    return folder, run_sweep(folder, "trainer.max_epochs=2", "trainer.limit_train_batches=20", *swept)


def test_each_job_leaves_what_it_leaves_alone(
    sweep: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, _ = sweep
    job = folder / "optimizer.lr=0.004,data.batch_size=64"
    overrides = [*VECTORIZED[2:], "trainer.max_epochs=2", "trainer.limit_train_batches=20", "optimizer.lr=0.004"]
    overrides.append("test=false")
    alone = forks.run_command("train", *overrides, f"hydra.run.dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr

    def names(folder: Path) -> set[str]:
        found = {path.name.partition(".tfevents")[0] for path in folder.rglob("*") if path.is_file()}
        return found - {"events.out"}

    assert names(job) - {"train.log"} == names(tmp_path / "alone") - {"train.log"}
    assert "epoch 2/2" in (job / "train.log").read_text()
    records = [json.loads((path / "metrics.json").read_text()) for path in (job, tmp_path / "alone")]
    assert records[0].keys() == records[1].keys()
    assert records[0]["metrics"] == pytest.approx(records[1]["metrics"], abs=1e-2)
    assert records[0]["data"] == records[1]["data"]
    curves = []
    for path in (job, tmp_path / "alone"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        tags = sorted(tag for tag in events.Tags()["scalars"] if not tag.startswith("best/"))
        curves.append([(tag, [event.step for event in events.Scalars(tag)]) for tag in tags])
    assert curves[0] == curves[1]
    assert read_status(job)["state"] == "finished"


def test_a_job_that_diverges_fails_and_the_others_do_not(sweep: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, result = sweep
    assert result.returncode == 1
    rows = read_rows(folder)
    assert len(rows) == 6
    for job, row in rows.items():
        diverged = "1e+30" in job or "1e30" in job
        assert row["status"] == ("failed" if diverged else "finished"), job
        assert read_status(folder / job)["state"] == row["status"]
        assert not diverged or "loss is" in row["error"]
    assert "2 of 6 jobs failed" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.slow
def test_a_jobs_checkpoint_can_be_tested_and_gone_on_from(
    sweep: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    job = sweep[0] / "optimizer.lr=0.001,data.batch_size=100"
    tested = forks.run_command("test", f"ckpt_path='{job}/checkpoints/best.ckpt'", f"hydra.run.dir={tmp_path / 'test'}")
    assert tested.returncode == 0, tested.stderr
    checkpoint = f"ckpt_path='{job}/checkpoints/last.ckpt'"
    settings = ("data=mnist5k", "data.batch_size=100", "optimizer.lr=0.001", "scheduler=cosine", "trainer=cpu")
    on = forks.run_command("train", checkpoint, *settings, "trainer.max_epochs=3", f"hydra.run.dir={tmp_path / 'on'}")
    assert "scheduler" in on.stderr + on.stdout  # it says that this is another one


def test_jobs_are_grouped_by_what_they_must_share(tmp_path: Path) -> None:
    def shared(*overrides: str) -> str:
        return get_shared(compose_cfg(tmp_path, *overrides))

    free = [
        "optimizer.lr=0.1", "optimizer=sgd", "optimizer.weight_decay=0.1", "optimizer.betas=[0.5,0.9]", "seed=1",
        "data.seed=2", "scheduler=cosine", "callbacks=minimal", "+model.loss={_target_:torch.nn.CrossEntropyLoss}",
        "+model.net.dropout=0.1", "logger=csv", "monitor=val/loss",
    ]  # fmt: skip
    bound = ["data.batch_size=32", "model.net.activation=tanh", "trainer.max_epochs=3", "trainer=cpu", "data=mnist5k"]
    assert {shared(override) for override in free} == {shared()}
    assert len({shared(override) for override in ["seed=0", *bound]}) == len(bound) + 1


@pytest.mark.slow
def test_a_net_that_vmap_does_not_take_ends_the_sweep_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    net = "model.net={_target_:nets.Branching}"
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "ALLOWED_TARGETS": "nets"}
    sweep = (*VECTORIZED, "optimizer.lr=0.001,0.01", f"hydra.sweep.dir={tmp_path}/sweep")
    result = run_command("train", *sweep, net, **env)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith("error: hydra/launcher=vectorized: torch.vmap does not take Branching: ")
    assert line.endswith("; run the same command with hydra/launcher=basic")
    assert "Traceback" not in result.stdout + result.stderr
    assert not list((tmp_path / "sweep").glob("*/metrics.json"))


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_all_jobs_and_the_sweep_goes_on_to_the_same_weights(signum: int, tmp_path: Path) -> None:
    arguments = ("optimizer.lr=0.001,0.002", "trainer.max_epochs=3", "test=false", "callbacks.last.every_n_steps=null")
    folder = tmp_path / "sweep"
    jobs = [folder / f"optimizer.lr={rate}" for rate in ("0.001", "0.002")]
    process = forks.start("train", [*VECTORIZED, *arguments, f"hydra.sweep.dir={folder}"], tmp_path / "said", {})
    wait_until(lambda: all((job / "checkpoints" / "last.ckpt").is_file() for job in jobs), seconds=300)
    assert process.pid
    os.kill(process.pid, signum)
    process.join(60)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 128 + signum, said
    assert f"hydra.sweep.dir={folder} goes on" in said
    steps = [load_checkpoint(job / "checkpoints" / "last.ckpt")["global_step"] for job in jobs]
    assert [read_status(job)["state"] for job in jobs] == ["interrupted"] * 2
    assert steps[0] == steps[1] < 3 * 63

    again = run_sweep(folder, *arguments)
    assert again.returncode == 0, again.stderr
    whole = run_sweep(tmp_path / "whole", *arguments)
    assert whole.returncode == 0, whole.stderr
    for job in jobs:
        one, other = (
            load_checkpoint(path / "checkpoints" / "last.ckpt") for path in (job, tmp_path / "whole" / job.name)
        )
        assert one["global_step"] == other["global_step"] == 3 * 63
        for name, weights in one["state_dict"].items():
            assert torch.equal(weights, other["state_dict"][name]), name


@pytest.mark.slow
def test_a_search_tries_several_trials_at_once(tmp_path: Path) -> None:
    arguments = (
        "sweep=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", "trainer.max_epochs=1", "test=false",
        "hydra.sweeper.params={optimizer.lr:'tag(log,interval(1e-4,1e-2))'}", "trainer.limit_train_batches=5",
    )  # fmt: skip
    result = run_sweep(tmp_path / "sweep", *arguments)
    assert result.returncode == 0, result.stderr
    assert [row["status"] for row in read_rows(tmp_path / "sweep").values()] == ["finished"] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("hydra.launcher.max_members=0", "hydra.launcher.max_members=0: expected a whole number of 1 or more"),
        ("trainer=ddp_cpu", "trainer.devices=2"),
        ("accelerator.precision=bf16-mixed", "precision=bf16-mixed: hydra/launcher=vectorized computes in 32 bits"),
        ("callbacks=[minimal,compile]", "callbacks.compile: hydra/launcher=vectorized computes all nets as one"),
    ],
)
def test_what_it_cannot_do_is_said_at_once(setting: str, said: str, tmp_path: Path) -> None:
    result = run_sweep(tmp_path / "sweep", setting, "optimizer.lr=0.001,0.01")
    assert result.returncode == 1
    assert said in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
