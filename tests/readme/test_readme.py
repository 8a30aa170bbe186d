"""Every command and every code block of the READMEs does what it says."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from src.engine.settings.check import CONF, ROOT
from tests.conftest import free_port
from tests.readme.table import READMES, read_commands, read_table, words_of

COMMANDS = read_commands()
# A tenth of a second each; a command's own settings stay, as later ones win.
SHORT = ["data.source=package", "trainer.max_epochs=1", "trainer.limit_train_batches=3", "trainer.log_every_n_steps=1"]
# That of the default tests: the README's own model and data. The others are slow tests.
QUICK = "python -m src.train model=digits data=digits"
# The table "From laptop to cluster": who runs the rows that are not among the commands above.
HERE = {
    "whatever is there": [],
    "two processes on the CPU": [],
    "a sweep of such runs": ["test=false"],
}
ON_GPU = ("one GPU", "a Mac's GPU", "all GPUs of a machine", "the same, with the model divided among them")
TORCHRUN = "two machines, on each"
ELSEWHERE = {
    "Slurm, a run": "engine/runs/test_slurm.py",
    "Slurm, a sweep as a job array": "engine/runs/test_slurm.py",
    "Ray, a sweep": "engine/runs/test_ray.py",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, in a path with spaces, with the files that the READMEs show."""
    project = tmp_path_factory.mktemp("my project")
    for name in ("src", "hydra_plugins", "conf", "logs"):
        shutil.copytree(
            ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__", "train", "multirun", "test")
        )
    pattern = r"```(?:python|yaml)\n((?:# @package _global_\n)?# ((?:src|conf)/\S+)\n.*?)```"
    blocks = re.findall(pattern, "".join(READMES.values()), re.DOTALL)
    assert len(blocks) == 5
    for content, path in blocks:  # whole, as they are pasted
        assert not (project / path).exists()
        (project / path).write_text(content)
    return project


def _run(project: Path, command: str, *more: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[0] == "python"
    return _run_words(project, [sys.executable, *words[1:]], *more)


def _run_words(project: Path, words: list[str], *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*words, *more], cwd=project, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(project: Path) -> None:
    """The newest run is one of LeNet-5, short, and interrupted by nothing."""
    result = _run(project, "python -m src.train scheduler=step", *SHORT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "command",
    [
        command if command == QUICK or "make" in command else pytest.param(command, marks=pytest.mark.slow)
        for command in COMMANDS
    ],
)
def test_each_command_does_what_it_says(command: str, project: Path, request: pytest.FixtureRequest) -> None:
    if command.startswith("make "):
        target = command.split()[1]
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr  # CI runs them
        assert "-m" in dry.stdout
    elif command.startswith("tensorboard "):
        request.getfixturevalue("trained")
        _assert_tensorboard_serves(command, project)
    elif "digits" in command and "src.train" in command:
        result = _run(project, command, "trainer.max_epochs=1")
        assert result.returncode == 0, result.stderr
        assert "test_loss" in result.stdout
    elif "src.train -m" in command:
        short = {"optuna": ["hydra.sweeper.n_trials=2"], "process": ["optimizer.lr=0.001,0.01"], "": []}
        result = _run(project, command, *SHORT, *next(short[word] for word in short if word in command))
        assert result.returncode == 0, result.stderr
        assert re.search(r"^  best: .*, val/acc 0\.\d+$", result.stdout, re.MULTILINE)
        assert "test/acc" in result.stdout
    elif "resume=latest" in command:
        _run(project, "python -m src.train scheduler=step", *SHORT)  # other commands may have trained since
        result = _run(project, command, "trainer.max_epochs=2")
        assert result.returncode == 0, result.stderr
        assert "epoch 2/2" in result.stderr
        assert "epoch 1/" not in result.stderr
    elif "src.train" in command:
        result = _run(project, command, *SHORT)
        assert result.returncode == 0, result.stderr
        assert "test/acc" in result.stdout
    elif "src.predict" in command:
        request.getfixturevalue("trained")
        (project / "digits").mkdir()
        one = Image.new("L", (28, 28), 255)
        ImageDraw.Draw(one).line([(14, 5), (14, 22)], fill=0, width=3)
        one.save(project / "digits" / "one.png")
        result = _run(project, command)
        assert result.returncode == 0, result.stderr
        assert "digits/one.png" in result.stdout
    elif "src.export" in command:
        request.getfixturevalue("trained")
        result = _run(project, command, "data.root=null")
        assert result.returncode == 0, result.stderr
        assert list(project.glob("logs/**/model.onnx"))
    elif "src.reproduce" in command:
        request.getfixturevalue("trained")
        runs = (project / "logs" / "train").glob("*/metrics.json")
        newest = max(runs, key=lambda path: path.stat().st_mtime).parent.name
        result = _run(project, command.replace("<date_time>", newest))
        assert "its record has no commit" in result.stderr  # this project is in no repository
    elif "src.demo" in command:
        request.getfixturevalue("trained")
        _assert_demo_serves(command, project)
    else:
        assert command == "python -m src.test"
        request.getfixturevalue("trained")
        result = _run(project, command)
        assert result.returncode == 0, result.stderr
        assert "test" in result.stdout


def _assert_demo_serves(command: str, project: Path) -> None:
    port = free_port()
    with _serving([sys.executable, *command.split()[1:], f"port={port}"], project):
        about = json.loads(_wait_for(f"http://127.0.0.1:{port}/about", "model"))
    assert about["classes"] == [str(digit) for digit in range(10)]


def _assert_tensorboard_serves(command: str, project: Path) -> None:
    port = free_port()
    with _serving([sys.executable, "-m", "tensorboard.main", *command.split()[1:], "--port", str(port)], project):
        runs = _wait_for(f"http://127.0.0.1:{port}/data/runs", "train/")
    assert runs.startswith("[")


@contextmanager
def _serving(words: list[str], project: Path) -> Iterator[None]:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    server = subprocess.Popen(words, cwd=project, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def _wait_for(url: str, *parts: str) -> str:
    """What a server answers when it answers with all of these parts."""
    deadline = time.monotonic() + 300
    answer = ""
    while not (answer and all(part in answer for part in parts)):
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)
        with suppress(OSError), urllib.request.urlopen(url, timeout=30) as response:
            answer = response.read().decode()
    return answer


def test_a_machines_own_settings_go_before_the_defaults(project: Path) -> None:
    local = project / "conf" / "local" / "default.yaml"
    local.parent.mkdir()
    local.write_text("# @package _global_\ndefaults:\n  - override /accelerator: cpu\ndata:\n  root: elsewhere\n")
    shown = OmegaConf.create(_run(project, "python -m src.train --cfg job --resolve").stdout)
    local.unlink()
    assert shown.data.root == "elsewhere"
    assert shown.trainer.accelerator == "cpu"


def test_the_groups_and_options_are_those_of_conf() -> None:
    section = READMES["conf/README.md"].split("## Groups\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (`[^|]*`) \|", section, re.MULTILINE)
    listed = {group: set(re.findall(r"`([\w]+)`", options)) for group, options in rows}
    there = {
        folder.name: {path.stem for path in folder.glob("*.yaml")}
        for folder in CONF.iterdir()
        if folder.is_dir() and folder.name not in ("hydra", "local")
    }
    assert listed == there


def test_the_other_name_of_lightning_is_replaced(tmp_path: Path) -> None:
    (command,) = re.findall(r"^ *(find .*)$", READMES["conf/README.md"], re.MULTILINE)
    (tmp_path / "src").mkdir()
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "csv.yaml").write_text("_target_: lightning.pytorch.loggers.CSVLogger\nproject: lightning-x\n")
    (tmp_path / "src" / "net.py").write_text("import lightning as L\nfrom lightning.pytorch.loggers import Logger\n")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "conf" / "csv.yaml").read_text() == (
        "_target_: pytorch_lightning.loggers.CSVLogger\nproject: lightning-x\n"
    )
    assert (tmp_path / "src" / "net.py").read_text() == (
        "import pytorch_lightning as L\nfrom pytorch_lightning.loggers import Logger\n"
    )


@pytest.mark.slow
def test_tab_completes_options_and_keys(project: Path) -> None:
    (install,) = re.findall(r'`(eval "[^`]*")`', READMES["conf/README.md"])
    lines = [install.replace("python", "$PYTHON")]
    for line in ("python src/train.py optimizer=sg", "python src/train.py optimizer.l"):
        words = f"COMP_WORDS=({line}); COMP_CWORD=2; COMP_LINE='{line}'; COMP_POINT={len(line)}"
        lines.append(f'{words}; hydra_bash_completion; echo "${{COMPREPLY[@]}}"')
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"PATH": path, "PYTHON": sys.executable, "PYTHONPATH": str(project)}
    result = _run_words(project, ["bash", "-c", "\n".join(lines)], **env)
    assert result.stdout.split("\n")[:2] == ["optimizer=sgd optimizer=sgd_1998", "optimizer.lr="]


def test_the_error_shown_is_the_one_said(project: Path) -> None:
    command, shown = re.findall(r"```\n\$ (python .*)\n(.*)\n```", READMES["conf/README.md"])[0]
    assert _run(project, command).stderr.strip() == shown


def test_each_row_from_laptop_to_cluster_is_run() -> None:
    others = {row for row, command in read_table().items() if command not in COMMANDS}
    assert others - {*ON_GPU, TORCHRUN} == {*HERE, *ELSEWHERE}
    for row, file in ELSEWHERE.items():
        assert f'words_of("{row}"' in (ROOT / "tests" / file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("row", HERE)
def test_a_row_for_this_machine_trains(row: str, project: Path) -> None:
    result = _run_words(project, words_of(row), *SHORT, *HERE[row], OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert ("best: optimizer.lr=" if "sweep" in row else "test/acc") in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("row", ON_GPU)
def test_a_row_for_gpus_says_that_there_is_none(row: str, project: Path) -> None:
    result = _run_words(project, words_of(row), *SHORT)
    if sys.platform == "darwin" and result.returncode == 0:
        pytest.skip("a Mac with a GPU")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(r"error: trainer: .*(gpu backend|MPSAccelerator).*; use trainer=cpu", line)


@pytest.mark.gpu
@pytest.mark.parametrize("row", [row for row in ON_GPU if "Mac" not in row])
def test_a_row_for_gpus_trains(row: str, project: Path) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    result = _run_words(project, words_of(row), *SHORT, CUDA_VISIBLE_DEVICES=visible)
    assert result.returncode == 0, result.stderr
    assert "test/acc" in result.stdout


@pytest.mark.slow
def test_the_row_for_two_machines_trains_one_model_on_loopback(project: Path, tmp_path: Path) -> None:
    port = free_port()
    hosts = []
    for rank in range(2):
        words = words_of(TORCHRUN, **{"0_or_1": rank, "the_first": "127.0.0.1", "name": "two"})
        (number,) = [index for index, word in enumerate(words) if word.startswith("--master-port=")]
        words[number] = f"--master-port={port}"
        with (tmp_path / f"log{rank}").open("w") as log:
            env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            hosts.append(subprocess.Popen([*words, *SHORT], cwd=project, env=env, stdout=log, stderr=log))
    try:
        codes = [host.wait(300) for host in hosts]
    finally:
        for host in hosts:
            host.terminate()  # which ends its processes, too
            try:
                host.wait(30)
            except subprocess.TimeoutExpired:
                host.kill()
                host.wait()
    said = [(tmp_path / f"log{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], said
    assert "test/acc" in said[0]
    assert "test/acc" not in said[1]
    assert (project / "logs" / "train" / "two" / "metrics.json").is_file()
