"""What the commands print on terminals: a first line at once, a bar unless CI is set, the same in black and white."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from src.engine.settings.check import ROOT
from tests.engine.tiny import TINY
from tests.terminal import train_on_terminal

ARGUMENTS = (*TINY, "trainer.max_epochs=2", "data.num_rows=4000", "logger=[]")
FIRST = re.compile(r"run (\S+) · cpu, \d+ threads? · loading torch")


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_terminal_of_any_width_has_a_bar_and_a_line_an_epoch(columns: int, tmp_path: Path) -> None:
    shown = train_on_terminal(*ARGUMENTS, PROJECT_ROOT=str(tmp_path), COLUMNS=str(columns), CI="").decode()
    first, *rest = shown.replace("\r\n", "\n").split("\n")
    assert FIRST.fullmatch(first)
    bars = [part.rstrip() for line in rest for part in line.split("\r")[:-1]]
    assert max(map(len, bars)) < columns
    running = [bar for bar in bars if bar.startswith("epoch 2/2")]
    assert running
    assert all(re.match(r"epoch 2/2  \[#*\.*\]  loss \d.*  0:0\d left$", bar) for bar in running)
    lines = [line.split("\r")[-1] for line in rest]
    for epoch in (1, 2):
        (line,) = (line for line in lines if line.startswith(f"epoch {epoch}/2"))
        assert re.fullmatch(r"epoch ./2  train/loss \d.*  val/acc \d.*  val/loss \d.*  \d+\.\d s", line)
    (log,) = tmp_path.glob("logs/train/*/train.log")
    assert log.read_text().count("- epoch ") == 2


@pytest.mark.slow
def test_under_ci_a_terminal_gets_a_line_an_epoch_and_no_bar(tmp_path: Path) -> None:
    quiet = train_on_terminal(*ARGUMENTS, PROJECT_ROOT=str(tmp_path), CI="1")
    assert b"\r" not in quiet.replace(b"\r\n", b"")
    assert quiet.count(b"epoch 1/2  train/loss") == 1


def test_the_first_line_comes_before_torch_is_imported(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-X", "importtime", "-m", "src.train", *ARGUMENTS]
    environment = {**os.environ, "PROJECT_ROOT": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        before = []
        for line in process.stdout:
            if FIRST.fullmatch(line.strip()):
                break
            before.append(line.rpartition("|")[2].strip())
        process.kill()
    assert "hydra" in before
    assert not {name.partition(".")[0] for name in before} & {"torch", "pytorch_lightning", "rich", "numpy"}
