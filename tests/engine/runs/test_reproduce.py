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


@pytest.mark.slow
def test_a_run_of_changed_code_is_trained_again_to_the_bit(tmp_path: Path) -> None:
    """The project is cloned, changed, trained; then the changes are taken back, and other ones made."""
    project = tmp_path / "project"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(project)], check=True)
    for room in ("src", "conf", "tests", "hydra_plugins"):  # as it is here, committed or not
        shutil.copytree(
            ROOT / room, project / room, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "local")
        )
    tiny = project / "tests" / "engine" / "tiny.py"
    was = tiny.read_text()
    tiny.write_text(
        was.replace("nn.ReLU()", "Bent()").replace("import torch\n", "import torch\nfrom tests.bent import Bent\n", 1)
    )
    bent = project / "tests" / "bent.py"
    bent.write_text("from torch import nn\n\n\nclass Bent(nn.Softplus):\n    pass\n")

    def run(verb: str, *arguments: str, status: int = 0) -> str:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PROJECT_ROOT": str(project), "PYTHONPATH": ""}
        command = [sys.executable, "-m", f"src.{verb}", *arguments]
        result = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False)
        assert result.returncode == status, result.stderr[-3000:]
        return result.stdout + result.stderr

    own = f"--config-dir={project}/tests/engine/conf"
    logged = ("trainer.max_epochs=2", "trainer.log_every_n_steps=1", "seed=null")
    run("train", own, *TINY[1:], *logged, "hydra.run.dir=logs/train/first")
    tiny.write_text(was)
    bent.unlink()
    said = run("reproduce", "run=logs/train/first")
    assert "trains like logs/train/first" in said
    assert "equal to the bit" in said
    assert "weights of best.ckpt, last.ckpt" in said
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=project, capture_output=True, text=True, check=True)
    assert len(worktrees.stdout.splitlines()) == 1
    assert "first" in run("test", own, "accelerator=cpu")  # not the repetition, which is newer
