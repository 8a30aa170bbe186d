"""Bad input, from the command line: one or two lines, a non-zero exit, nothing left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from src.engine.settings.check import ROOT
from tests import forks
from tests.compose import needs_mnist, run_command
from tests.engine.tiny import TINY
from tests.marks import by_default

REJECTED_BEFORE_TORCH = {
    "optimizer.lrr=0.1": "optimizer.lrr: no such key; did you mean optimizer.lr?",
    "modell=mine": "modell: no such key; did you mean model?",
    "optimizer=addam": "optimizer=addam: no such file in conf/optimizer/; did you mean adam?",
    "data.batch_size=1.5": "data.batch_size=1.5: expected int",
    "data.batch_size=true": "data.batch_size=True: expected int",
    "optimizer.lr=fast": "optimizer.lr=fast: expected float",
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9]: expected tuple[",
    "trainer.max_epochs=abc": "trainer.max_epochs=abc: expected Optional[int]",
    "monitor=[]": "monitor=[]: expected text",
    "mode=best": "mode=best: expected min or max",
    "sweep=lr": "sweep=lr: a sweep needs -m: python -m src.train -m sweep=lr",
    "seed=-1": "seed=-1: expected a whole number from 0",
    "ckpt_path=nowhere.ckpt": "ckpt_path=nowhere.ckpt: no such file",
    f"ckpt_path={Path(__file__).as_posix()}": "not a checkpoint, or a truncated one",
    "optimizer.lr=${foo}": "optimizer.lr: Interpolation key 'foo' not found",
    "~optimizer": "optimizer",
    "~optimizer._target_": "optimizer: expected a node with a _target_",
    "+callbacks.mine.targt=x": "callbacks.mine: expected a node with a _target_",
    "optimizer.lr=[": "optimizer.lr=[: expected key=value, with quotes as in",
    "optimizer": "optimizer: expected key=value",
    "~ckpt_path": "ckpt_path: cannot be deleted; ckpt_path=null may do",
    "debuug=fast": "debuug: no such key; did you mean debug?",
    "callbacks=[default,early_stop]": "callbacks=early_stop: no such file in conf/callbacks/; did you mean early",
    "+optimizer/mine=adam": "optimizer/mine: no such key; did you mean optimizer?",
    "output_dir=here": "output_dir: follows hydra.run.dir; set hydra.run.dir=<folder> instead",
    "callbacks.lr._target_=os.sep": "callbacks.lr._target_=os.sep: a str; expected a class or function",
    "optimizer._target_=torch.optim.Adamm": "torch.optim has no Adamm; did you mean Adam?",
    f"mode={'x' * 5000}": f"mode={'x' * 95}... expected min or max",
}


def _lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.strip()]


@pytest.mark.parametrize("override", by_default(REJECTED_BEFORE_TORCH))
def test_a_bad_override_is_one_clear_message(override: str, tmp_path: Path) -> None:
    result = forks.run_command("train", override, PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    assert REJECTED_BEFORE_TORCH[override] in result.stderr
    assert len(_lines(result.stdout + result.stderr)) <= 2
    assert list(tmp_path.iterdir()) == []


SAY_WHETHER_TORCH_IS_IMPORTED = """
import runpy, sys
sys.argv[0] = "train"
try:
    runpy.run_module("src.train", run_name="__main__")
except SystemExit:
    pass
print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "argument", by_default(["optimizer.lrr=1", "--help", "--cfg=job", "seed=-1", "optimizer=addam"], 2)
)
def test_what_does_not_train_does_not_import_torch(argument: str) -> None:
    command = [sys.executable, "-c", SAY_WHETHER_TORCH_IS_IMPORTED, argument]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"
    if argument.startswith("--"):
        assert "optimizer" in result.stdout


def test_the_stack_trace_is_printed_on_request(tmp_path: Path) -> None:
    result = run_command("train", "seed=-1", PROJECT_ROOT=str(tmp_path), HYDRA_FULL_ERROR="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "seed=-1: expected" in result.stderr


@pytest.mark.parametrize("override", by_default(["trainer=gpu", "accelerator=gpu"]))
def test_a_gpu_that_is_not_there_is_said(override: str, tmp_path: Path) -> None:
    result = forks.run_command("train", override, PROJECT_ROOT=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1
    assert _lines(result.stderr) == ["error: trainer: No supported gpu backend found; use trainer=cpu"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has MPS")
def test_mps_off_a_mac_is_said(tmp_path: Path) -> None:
    result = forks.run_command("train", "trainer=mps", PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    (line,) = _lines(result.stderr)
    assert line.startswith("error: trainer: `MPSAccelerator` can not run on your system")


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = forks.run_command("train", f"hydra.run.dir={tmp_path}/file/run")
    assert result.returncode == 1
    assert f"{tmp_path}/file/run" in result.stderr
    assert "hydra.run.dir=<folder>" in result.stderr
    assert len(_lines(result.stderr)) == 1


@needs_mnist
def test_damaged_data_are_named(tmp_path: Path, mnist_root: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (mnist_root / "MNIST" / "raw").iterdir():
        (raw / file.name).write_bytes(file.read_bytes()[:-20] if "train-images" in file.name else file.read_bytes())
    result = forks.run_command(
        "train", f"data.root={tmp_path}", "data.source=files", "data.md5=null", PROJECT_ROOT=str(tmp_path)
    )
    assert result.returncode == 1
    assert "train-images-idx3-ubyte.gz is damaged" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("logs/train/*/checkpoints"))


@pytest.mark.slow
@needs_mnist
def test_no_network_is_said_where_a_download_was_asked_for(tmp_path: Path) -> None:
    result = forks.run_command(
        "train", "data.source=download", "data.mirrors=[http://127.0.0.1:9/mnist]", PROJECT_ROOT=str(tmp_path)
    )
    assert result.returncode == 1
    assert "http://127.0.0.1:9/mnist: " in result.stderr
    assert "Connection refused" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    by_default([
        ("train --lr 0.1", "error: --lr: settings are written key=value, as in optimizer.lr=0.1"),
        ("train epochs=3", "error: epochs: no such key; did you mean trainer.max_epochs?"),
        ("train --lr=0.1", "error: lr: no such key; did you mean optimizer.lr"),
        ("train lr=0.1", "error: lr: no such key; did you mean optimizer.lr"),
        ("train optimizer.lr=0.1,0.2", "error: optimizer.lr=0.1,0.2: several values need -m: python -m src.train -m"),
        (
            "train trainer=cuda",
            "error: trainer=cuda: no such file in conf/trainer/; there are: cpu, ddp, ddp_cpu, default",
        ),
        ("train data=1", "error: data=1: no such file in conf/data/; there are: "),
        ("train --config-name nope", "error: --config-name=nope: no such file in conf/; there are: "),
        (
            "test optimizer=sgd",
            "error: optimizer: python -m src.test reads this from the checkpoint; there are: ckpt_path",
        ),
        ("train optimizer=sgd optimizer.betas=1", "error: optimizer.betas: optimizer=sgd has no such key"),
    ], 2),
)  # fmt: skip
def test_what_misleads_elsewhere_is_told_with_its_remedy(command: str, said: str, tmp_path: Path) -> None:
    result = forks.run_command(*command.split(), PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    (line,) = _lines(result.stdout + result.stderr)
    assert line.startswith(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("header", "setting", "said"),
    by_default([
        ("# @package _global_", "model.num_hiden=3", "model=mine has no such key; did you mean model.num_hidden?"),
        ("# @package _global_", "model.net.activation=relu", "has no such key; there are: model.num_hidden (+"),
        ("# mine", "model.num_hidden=3", "model=mine has no such key; the first line of a file that sets keys of"),
        ("# mine", "+model.num_hidden=3", "expected a node with a _target_, the class to build; found monitor, model"),
    ]),
)  # fmt: skip
def test_a_slip_is_looked_up_in_the_model_that_was_chosen(header: str, setting: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        f"{header}\n\nmonitor: f1\nmodel:\n  _target_: tests.engine.tiny.TinyTask\n  num_hidden: 8\n"
    )
    result = forks.run_command(
        "train", f"--config-dir={tmp_path}", "model=mine", setting, PROJECT_ROOT=str(tmp_path / "project")
    )
    (line,) = _lines(result.stdout + result.stderr)
    assert said in line


@pytest.mark.parametrize("option", by_default(["stdout", "none", "disabled"]))
def test_hydras_own_logging_may_be_chosen(option: str, tmp_path: Path) -> None:
    arguments = (*TINY, "debug=fast", "callbacks=minimal", "logger=[]")
    result = forks.run_command("train", *arguments, f"hydra/job_logging={option}", PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 0, result.stderr
