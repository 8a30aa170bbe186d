"""The Makefile passes settings on, or says where they belong; without an environment the commands say so."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from src.engine.settings.check import ROOT

ENV = {
    name: value
    for name, value in os.environ.items()
    if name not in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHONPATH")
}


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-n", *words], cwd=ROOT, env=ENV, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("target", "verb"),
    [("train", "train"), ("eval", "test"), ("predict", "predict"), ("export", "export"), ("demo", "demo")],
)
def test_settings_reach_the_command_as_they_were_typed(target: str, verb: str) -> None:
    settings = [
        "trainer=gpu", "optimizer.lr=0.1", "callbacks=[default,compile]", "inputs=my photos/*.png", "name=it's (so)",
        "+tag={a: 1}", "++model.x=\\d",
    ]  # fmt: skip
    words = shlex.split(make(target, *settings, "ARGS=-m seed=1,2").stdout.splitlines()[-1])
    assert words[:5] == [".venv/bin/python", "-m", f"src.{verb}", "-m", "seed=1,2"]
    assert sorted(words[5:]) == sorted(settings)


@pytest.mark.parametrize("target", ["test", "lint", "tensorboard", "help"])
def test_other_targets_say_who_takes_settings(target: str) -> None:
    result = make(target, "port=7000")
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert "port=7000: only train eval predict export demo take settings" in line


def test_help_lists_every_target() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, env=ENV, capture_output=True, text=True, check=True).stdout
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):(?!=)", text, re.MULTILINE))
    assert set(re.findall(r"^  make (\S+) +\S", listed, re.MULTILINE)) == targets
    assert len(max(listed.splitlines(), key=len)) <= 120


@pytest.mark.parametrize("verb", ["train", "test", "predict", "export", "demo"])
def test_a_python_without_the_packages_says_so_in_a_line(verb: str) -> None:
    command = [sys.executable, "-S", "-m", f"src.{verb}"]  # without site-packages
    result = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable}: this Python has no Hydra; ")
