"""Runs that are trained again: of a real repository, in a real worktree of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from src.engine.errors import ConfigError
from src.engine.runs.reproduce import compare_runs, find_run, read_curves
from src.engine.runs.status import write_status
from src.engine.settings.check import ROOT
from tests.engine.tiny import TINY

LOST = "1" * 40


def write_run(folder: Path, loss: float = 0.5, weight: float = 1.0) -> Path:
    with SummaryWriter(folder) as writer:
        for step in range(4):
            writer.add_scalar("train/loss", 1 / (step + 1) if step < 2 else loss, step)
            writer.add_scalar("train/images_per_second", torch.rand(1).item(), step)
    (folder / "csv").mkdir()
    (folder / "csv" / "metrics.csv").write_text("step,val/acc\n3,0.5\n")
    (folder / "metrics.json").write_text(json.dumps({"metrics": {"loss": loss, "images_per_second": 5.0}}))
    (folder / "checkpoints").mkdir()
    content = {"state_dict": {"weight": torch.tensor([weight])}, "config": {"model": {}}}
    torch.save(content, folder / "checkpoints" / "best.ckpt")
    return folder


def test_runs_are_compared_by_curves_metrics_and_weights(tmp_path: Path) -> None:
    one, same = write_run(tmp_path / "one"), write_run(tmp_path / "same")
    assert set(read_curves(one)) == {"train/loss", "val/acc (csv/metrics.csv)"}
    counts, differences = compare_runs(one, same)
    assert (counts, differences) == ("2 curves of 5 points, 1 metrics, weights of best.ckpt", "")
    other = write_run(tmp_path / "other", loss=0.75, weight=1.5)
    assert compare_runs(one, other)[1] == (
        "the curves part at step 2: train/loss 0.5 there, 0.75 here (by 0.25); "
        "the last metrics differ: loss 0.5 there, 0.75 here (by 0.25); the weights of best.ckpt differ by up to 0.5"
    )
    (other / "csv" / "metrics.csv").write_text("step,val/loss\n3,0.5\n")
    only = "; curves only there: val/acc (csv/metrics.csv); curves only here: val/loss (csv/metrics.csv); the last"
    assert only in compare_runs(one, other)[1]
    (same / "checkpoints" / "best.ckpt").unlink()
    assert compare_runs(one, same)[1] == "checkpoints/best.ckpt is only there"


def test_what_cannot_be_trained_again_is_told(tmp_path: Path) -> None:
    start: dict[str, list[str]] = {"overrides": [], "config_dirs": []}
    write_status(tmp_path, "interrupted", start)
    for value, reason in {
        None: "run=None: expected the folder of a run",
        str(tmp_path / "nowhere"): "expected the folder of a run or of a sweep",
        str(tmp_path): "interrupted; expected a run that has finished",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            find_run(value)
    write_status(tmp_path, "finished", start)
    with pytest.raises(ConfigError, match="its record has no commit"):
        find_run(str(tmp_path))
    write_status(tmp_path, "finished", {"commit": LOST})
    with pytest.raises(ConfigError, match=f"its commit, {LOST}, is not in this clone"):
        find_run(str(tmp_path))
    (tmp_path / "sweep.json").touch()
    with pytest.raises(ConfigError, match="no job of this sweep has finished"):
        find_run(str(tmp_path))


class Project:
    """A clone of this project, with the code as it is here, committed or not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        subprocess.run(["git", "clone", "-q", str(ROOT), str(root)], check=True)
        for room in ("src", "conf", "tests", "hydra_plugins"):
            shutil.copytree(
                ROOT / room, root / room, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "local")
            )
        self.own = (f"--config-dir={root}/tests/engine/conf", *TINY[1:], "trainer.log_every_n_steps=1")

    def run(self, verb: str, *arguments: str, status: int = 0) -> str:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PROJECT_ROOT": str(self.root), "PYTHONPATH": ""}
        command = [sys.executable, "-m", f"src.{verb}", *arguments]
        result = subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, check=False)
        assert result.returncode == status, result.stderr[-3000:]
        return result.stdout + result.stderr

    def count_worktrees(self) -> int:
        listed = subprocess.run(["git", "worktree", "list"], cwd=self.root, capture_output=True, text=True, check=True)
        return len(listed.stdout.splitlines())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("clone") / "project")


@pytest.mark.slow
def test_a_run_of_changed_code_is_trained_again_to_the_bit_or_its_patch_is_told(project: Project) -> None:
    """The code is changed, trained; then the changes are taken back. Then the patch is damaged."""
    tiny = project.root / "tests" / "engine" / "tiny.py"
    was = tiny.read_text()
    tiny.write_text(
        was.replace("nn.ReLU()", "Bent()").replace("import torch\n", "import torch\nfrom tests.bent import Bent\n", 1)
    )
    bent = project.root / "tests" / "bent.py"
    bent.write_text("from torch import nn\n\n\nclass Bent(nn.Softplus):\n    pass\n")
    project.run("train", *project.own, "trainer.max_epochs=2", "seed=null", "hydra.run.dir=logs/train/first")
    tiny.write_text(was)
    bent.unlink()
    said = project.run("reproduce", "run=logs/train/first")
    assert "trains like logs/train/first" in said
    assert "equal to the bit" in said
    assert "weights of best.ckpt, last.ckpt" in said
    assert project.count_worktrees() == 1
    assert "first" in project.run("test", project.own[0], "accelerator=cpu")  # not the repetition, which is newer

    patch = project.root / "logs" / "train" / "first" / "changes.patch"
    for damaged, reason in {"no patch": "error: ", None: "error: can't open patch"}.items():
        patch.unlink() if damaged is None else patch.write_text(damaged)
        (line,) = project.run("reproduce", "run=logs/train/first", status=1).splitlines()
        assert line.startswith(f"error: {patch}: does not apply to ")
        assert reason in line.removeprefix("error: ")
    assert project.count_worktrees() == 1


@pytest.mark.slow
def test_a_run_of_two_processes_is_trained_again_to_the_bit(project: Project) -> None:
    both = ("trainer=ddp_cpu", "trainer.max_epochs=1", "logger=csv", "hydra.run.dir=logs/train/both")
    project.run("train", *project.own, *both)
    said = project.run("reproduce", "run=logs/train/both")
    assert "trains like logs/train/both" in said
    assert "equal to the bit" in said


@pytest.mark.slow
def test_of_a_sweep_the_winner_is_trained_again(project: Project) -> None:
    swept = ("trainer.max_epochs=1", "logger=csv", "optimizer.lr=1e-9,0.01", "hydra.sweep.dir=logs/multirun/rates")
    project.run("train", "-m", *project.own, *swept)
    said = project.run("reproduce", "run=logs/multirun/rates")
    assert "trains like logs/multirun/rates/optimizer.lr=0.01" in said
    assert "equal to the bit" in said
