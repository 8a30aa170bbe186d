"""Seven modules and data modules as their communities write them, through every verb. None needs an edit of src/."""

import csv
import json
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities import CombinedLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import binary_cross_entropy_with_logits

from src.engine.runs.build import load_checkpoint, restore, restore_datamodule
from src.engine.settings.check import check, check_values
from src.engine.settings.trust import admit
from src.train import train
from tests.compose import run_command as run_alone
from tests.configs import compose_fast
from tests.engine.equality import assert_equal, content, weights
from tests.forks import run_command

TASKS = Path(__file__).parent
SHORT = ("trainer.max_epochs=2", "trainer.log_every_n_steps=5")
# What the command line says for a short run of each.
CHOSEN = {
    "upstream": ("model=upstream", "data=upstream", *SHORT),
    "regression": ("model=regression", "data=regression", *SHORT),
    "vae": ("model=vae", "data=vae", *SHORT),
    "gan": ("model=gan", "data=gan", *SHORT),
    "text": ("experiment=text",),
    "multilabel": ("model=multilabel", "data=multilabel", *SHORT),
    "memmap": (
        "model=memmap",
        "data=memmap",
        "data.num_rows=2000",
        "data.batch_size=100",
        "data.num_workers=0",
        *SHORT,
    ),
}
MONITORED = {
    "upstream": "val/acc", "regression": "val_loss", "vae": "val/loss", "gan": None, "text": "val/loss",
    "multilabel": "val/f1/dataloader_idx_0", "memmap": "val/acc",
}  # fmt: skip

# What Lightning tells users of such modules; the runs go on.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of"),
]


def compose_task(task: str, output_dir: Path, *overrides: str) -> DictConfig:
    paths = [f"output_dir={output_dir}", f"root_dir={output_dir}", f"hydra.searchpath=[file://{TASKS / task / 'conf'}]"]
    chosen = (*CHOSEN[task], "trainer=cpu", "callbacks=minimal", "logger=[]")
    return compose_fast("train", *paths, *chosen, *overrides)


@pytest.mark.parametrize("task", CHOSEN)
def test_a_task_trains_and_comes_back_from_its_checkpoint(task: str, tmp_path: Path) -> None:
    cfg = compose_task(task, tmp_path)
    check(cfg)
    check_values(cfg)
    metrics = train(cfg)
    monitor = MONITORED[task]
    assert cfg.monitor == monitor
    assert monitor is None or monitor in metrics
    assert cfg.test is any(name.startswith("test") for name in metrics)
    for name in ("best", "last"):
        checkpoint = tmp_path / "checkpoints" / f"{name}.ckpt"
        module = restore(checkpoint)
        assert f"{type(module).__module__}.{type(module).__qualname__}" == cfg.model._target_
        for key, tensor in load_checkpoint(checkpoint)["state_dict"].items():
            assert torch.equal(module.state_dict()[key], tensor)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as the command ignores it
def test_a_module_that_compiles_its_net_comes_back_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # a machine may have no compiler
    cfg = compose_task("upstream", tmp_path / "first", "model.compile=true", "trainer.max_epochs=1")
    train(cfg)
    checkpoint = tmp_path / "first" / "checkpoints" / "last.ckpt"
    saved = load_checkpoint(checkpoint)["state_dict"]
    assert any("_orig_mod." in name for name in saved)  # upstream's way: the compiled net takes the plain one's place
    restored = {name: values for name, values in restore(checkpoint).state_dict().items() if name.startswith("net.")}
    assert_equal(restored, {name.replace("_orig_mod.", ""): saved[name] for name in saved if name.startswith("net.")})
    cfg = compose_task("upstream", tmp_path / "second", "model.compile=true", f"ckpt_path={checkpoint}")
    assert 0 <= train(cfg)["val/acc"] <= 1
    assert load_checkpoint(tmp_path / "second" / "checkpoints" / "last.ckpt")["global_step"] == 24


class Project:
    """A project's root, in which a task is run by commands, as its user would."""

    def __init__(self, task: str, root: Path) -> None:
        self.task, self.root = task, root
        admit(TASKS / task / "conf")  # what this process restores, as --config-dir does for a command

    def run(self, verb: str, *arguments: str) -> "CompletedProcess[str]":
        conf = f"--config-dir={TASKS / self.task / 'conf'}"
        return run_command(verb, conf, *arguments, PROJECT_ROOT=str(self.root), OMP_NUM_THREADS="1")

    def train(self, name: str, *overrides: str) -> "CompletedProcess[str]":
        chosen = (*CHOSEN[self.task], "trainer=cpu", f"hydra.run.dir={self.path(name)}")
        return self.run("train", *chosen, *overrides)

    def path(self, name: str) -> Path:
        return self.root / "logs" / "train" / name

    def last(self, name: str) -> Path:
        return self.path(name) / "checkpoints" / "last.ckpt"

    def record(self, verb: str) -> dict[str, Any]:
        """What the newest run of a verb has written."""
        path = max((self.root / "logs" / verb).glob("*/metrics.json"), key=lambda path: path.stat().st_mtime)
        content: dict[str, Any] = json.loads(path.read_text())
        return content


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    """A project with a task's run, ``whole``, which each test of it shares."""

    @cache
    def make(task: str) -> Project:
        project = Project(task, tmp_path_factory.mktemp(task))
        result = project.train("whole")
        assert result.returncode == 0, result.stderr
        assert "?" not in result.stdout.partition("trained")[2]  # nothing is shown that is not there
        return project

    return make


KILL = "+callbacks.kill={_target_: tests.engine.faults.KillAt, step: %s}"
# A step within the second epoch, whose beginning last.ckpt holds; of the stream, a step that it holds.
KILLED_AT = {"gan": 34, "text": 27, "memmap": 25}


@pytest.mark.slow
@pytest.mark.parametrize("task", CHOSEN)
def test_a_killed_run_ends_as_the_uninterrupted_one_to_the_bit(task: str, trained: Callable[[str], Project]) -> None:
    project = trained(task)
    every = 25 if task == "text" else "null"
    killed = project.train("killed", KILL % KILLED_AT.get(task, 17), f"callbacks.last.every_n_steps={every}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = project.run("train", f"resume={project.path('killed')}", "callbacks.kill=null")
    assert resumed.returncode == 0, resumed.stderr
    assert_equal(content(project.last("whole")), content(project.last("killed")))
    records = [json.loads((project.path(name) / "metrics.json").read_text()) for name in ("whole", "killed")]
    assert records[0]["best"]["score"] == records[1]["best"]["score"]


@pytest.mark.slow
def test_a_loader_without_a_state_is_told_with_numbers(trained: Callable[[str], Project]) -> None:
    project = trained("regression")
    project.train("inexact", KILL % 17, "callbacks.last.every_n_steps=5")  # 12 steps an epoch; saved at 15
    resumed = project.run("train", f"resume={project.path('inexact')}", "callbacks.kill=null")
    assert resumed.returncode == 0, resumed.stderr
    assert "no state_dict: after 3 batches (60 samples) of the epoch's 12 it starts anew" in resumed.stderr
    assert "StatefulDataLoader" in resumed.stderr
    assert "not resumable" not in resumed.stderr  # Lightning's words for it
    assert not torch.equal(weights(project.last("inexact")), weights(project.last("whole")))


@pytest.mark.slow
def test_a_save_is_due_where_a_batch_takes_several_steps(trained: Callable[[str], Project]) -> None:
    project = trained("gan")
    project.train("due", KILL % 16, "callbacks.last.every_n_steps=9")
    assert load_checkpoint(project.last("due"))["global_step"] == 10  # steps 9 and 10 are of one batch


@pytest.mark.slow
@pytest.mark.parametrize("task", CHOSEN)
def test_the_test_shows_and_stores_what_it_logs(task: str, trained: Callable[[str], Project]) -> None:
    project = trained(task)
    result = project.run("test")
    if task == "gan":
        assert result.returncode == 1
        assert "GAN has no test_step: there is nothing to test" in result.stderr
        assert result.stderr.count("\n") == 2  # which checkpoint it took, and this
        return
    assert result.returncode == 0, result.stderr
    metrics = project.record("test")["metrics"]
    assert metrics
    at_the_end = project.record("train")["metrics"]
    for name, value in metrics.items():
        assert name.startswith("test")
        assert name in result.stdout
        # Of the VAE, other noise is drawn.
        assert value == pytest.approx(at_the_end[name], rel=0.1 if task == "vae" else 1e-5)


SWEPT = {"upstream": "model.optimizer.lr=1e-9,0.01", "memmap": "model.lr=1e-9,0.01"}


@pytest.mark.slow
@pytest.mark.parametrize("task", CHOSEN)
def test_a_sweep_ranks_by_what_the_task_monitors(task: str, trained: Callable[[str], Project]) -> None:
    project = trained(task)
    folder = project.root / "sweep"
    swept = SWEPT.get(task, "model.lr=1e-9,0.01")
    result = project.run("train", "-m", *CHOSEN[task], "trainer=cpu", "logger=[]", swept, f"hydra.sweep.dir={folder}")
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["finished", "finished"]
    if task == "gan":
        assert "monitor=null: jobs are not ranked" in result.stdout
    else:
        assert "0.01" in rows[0]["job"]  # the first has won: who does not learn loses


@pytest.mark.slow
@pytest.mark.parametrize("task", CHOSEN)
def test_predictions_are_those_of_the_module(task: str, trained: Callable[[str], Project]) -> None:
    project = trained(task)
    output = project.root / "predictions.json"
    result = project.run("predict", f"ckpt_path={project.path('whole')}", f"output={output}", "accelerator=cpu")
    if task == "gan":  # its data are only to train on
        assert result.returncode == 1
        assert "inputs=null: Ring has no predict_dataloader and no test_dataloader; name files" in result.stderr
        assert result.stderr.count("\n") == 1
        return
    assert result.returncode == 0, result.stderr
    rows = json.loads(output.read_text())
    best = project.path("whole") / "checkpoints" / "best.ckpt"
    module, datamodule = restore(best), restore_datamodule(best, f"{project.root}/data")
    datamodule.setup("test")
    batches = [batch for loader in CombinedLoader(datamodule.test_dataloader()).flattened for batch in loader]
    if task == "regression":
        assert [row["row"] for row in rows] == list(range(60))
    inputs = [batch["features"] if task == "regression" else batch if task == "vae" else batch[0] for batch in batches]
    with torch.no_grad():
        expected = [prediction for each in inputs for prediction in module(each).tolist()]
    found = [row["predicted" if task == "regression" else "prediction"] for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", CHOSEN)
def test_an_export_computes_what_the_module_does(task: str, trained: Callable[[str], Project]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    project = trained(task)
    output = project.root / "model.onnx"
    result = project.run("export", f"ckpt_path={project.path('whole')}", "format=onnx", f"output={output}")
    assert result.returncode == 0, result.stderr
    assert not {"logits", "accuracy", "test/acc"} & set(result.stdout.split())  # what only our classifier has
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.shape[0] == "batch"
    shape = [5, *given.shape[1:]]
    rng = np.random.default_rng(0)
    inputs: Any = rng.integers(0, 29, shape) if task == "text" else rng.standard_normal(shape, dtype=np.float32)
    (computed,) = session.run(None, {given.name: inputs})
    module = restore(project.path("whole") / "checkpoints" / ("last.ckpt" if task == "gan" else "best.ckpt"))
    with torch.no_grad():
        assert torch.allclose(module(torch.from_numpy(inputs)), torch.from_numpy(computed), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_pictures_that_a_module_logs_are_in_tensorboard(trained: Callable[[str], Project]) -> None:
    events = EventAccumulator(str(trained("vae").path("whole")), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("drawn")][-2:] == [12, 24]


@pytest.mark.slow
def test_the_rows_of_a_file_train_two_processes_with_two_workers_each_which_resume_to_the_bit(tmp_path: Path) -> None:
    project = Project("memmap", tmp_path)
    conf = f"--config-dir={TASKS / 'memmap' / 'conf'}"

    def run(*arguments: str) -> "CompletedProcess[str]":
        # Not forked: a forked command may not have workers.
        return run_alone("train", *arguments, PROJECT_ROOT=str(tmp_path), OMP_NUM_THREADS="1")

    chosen = (conf, "model=memmap", "data=memmap", "trainer=ddp_cpu", "trainer.max_epochs=2", "logger=[]")
    whole = run(*chosen, f"hydra.run.dir={project.path('whole')}")
    assert whole.returncode == 0, whole.stderr
    assert whole.stderr.count("optimizer: not used") == 1
    assert load_checkpoint(project.last("whole"))["global_step"] == 360  # 180,000 rows, 500 for each of two processes
    metrics = project.record("train")["metrics"]
    assert metrics["val/acc"] > 0.95
    assert metrics["test/acc"] > 0.95

    killed = run(*chosen, f"hydra.run.dir={project.path('killed')}", KILL % 200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert load_checkpoint(project.last("killed"))["global_step"] == 180
    resumed = run(f"resume={project.path('killed')}", "callbacks.kill=null")
    assert resumed.returncode == 0, resumed.stderr
    assert_equal(content(project.last("whole")), content(project.last("killed")))


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1260, 1220])
def test_two_processes_count_each_row_of_validation_and_test_once(num_rows: int, tmp_path: Path) -> None:
    """63 rows each: 32 and 31 a process, four batches of ten. Of 61, they would have four batches and three."""
    chosen = ("model=memmap", "data=memmap", f"data.num_rows={num_rows}", "data.batch_size=10", "data.num_workers=0")
    conf, env = f"--config-dir={TASKS / 'memmap' / 'conf'}", {"PROJECT_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    project = Project("memmap", tmp_path)
    run = f"hydra.run.dir={project.path('both')}"
    both = run_alone("train", conf, *chosen, "trainer=ddp_cpu", "trainer.max_epochs=1", "logger=[]", run, **env)
    assert both.returncode == 0, both.stderr
    told = [line for line in both.stderr.splitlines() if "twice" in line]
    assert "DistributedSampler" not in both.stderr
    metrics = project.record("train")["metrics"]
    module = restore(project.path("both") / "checkpoints" / "best.ckpt")
    rows = torch.from_numpy(np.load(tmp_path / "data" / f"rows-{num_rows}.npy"))
    counted = 0
    for split, first, last in (("val", 0.9, 0.95), ("test", 0.95, 1.0)):
        part = rows[int(first * num_rows) : int(last * num_rows)]
        labels = (part.sum(dim=1) > 0).float()
        with torch.no_grad():
            logits = module(part)
        accuracy, loss = (
            ((logits > 0) == labels.bool()).float().mean(),
            binary_cross_entropy_with_logits(logits, labels),
        )
        equal = metrics[f"{split}/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert equal is (num_rows == 1260)
        counted += equal and metrics[f"{split}/acc"] == pytest.approx(accuracy.item(), abs=1e-6)
    if num_rows == 1260:
        assert (counted, told) == (2, [])
    else:
        remedy = "1 of 61 samples count twice, so that 2 processes have as many batches; choose another batch size"
        assert [line.partition(":")[0] for line in told if remedy in line] == ["validation", "test"]
