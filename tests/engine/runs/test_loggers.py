"""Experiment trackers: the same metrics everywhere, a run of its own each, ended and gone on with."""

import csv
import importlib.util
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

from src.engine.runs.build import build_datamodule, build_module, load_checkpoint
from src.engine.runs.loggers import TensorBoardLogger
from src.engine.runs.trainer import build_trainer
from src.engine.settings.check import ROOT
from tests import forks
from tests.compose import run_command
from tests.engine.equality import assert_equal, scalars
from tests.engine.tiny import TINY, TinyTask, compose_tiny
from tests.processes import wait_until

Curves = dict[str, list[tuple[int, float]]]

STEPS = 20  # an epoch
SHORT = (
    "data=mnist5k", "trainer=cpu", "trainer.max_epochs=2", f"trainer.limit_train_batches={STEPS}",
    "trainer.log_every_n_steps=1", "callbacks.summary=null",
)  # fmt: skip
ALL = ("logger=[tensorboard,csv,wandb,mlflow]", "logger.wandb.offline=true")
BOTH = ("logger=[wandb,mlflow]", "logger.wandb.offline=true")

# MLflow 3.17 calls what SQLAlchemy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


def trackers(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs both packages."""
    is_missing = not all(map(importlib.util.find_spec, ("wandb", "mlflow")))
    skip = pytest.mark.skipif(is_missing, reason="needs pip install -e '.[trackers]'")
    marked: Callable[..., None] = pytest.mark.trackers(skip(test))
    return marked


def train(root: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Train with a home directory and a working directory of its own, in which nobody may write."""
    for name in ("home", "cwd"):
        (root / name).mkdir(parents=True, exist_ok=True)
    folders = {"HOME": str(root / "home"), "MPLCONFIGDIR": str(root / "matplotlib"), "PROJECT_ROOT": str(root)}
    result = forks.run_command("train", *arguments, cwd=root / "cwd", **{**folders, **env})
    assert list((root / "cwd").iterdir()) == []
    assert [path for path in (root / "home").rglob("*") if path.is_file()] == []
    return result


def tensorboard_curves(folder: Path) -> Curves:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def csv_curves(folder: Path) -> Curves:
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    curves = {key: [(int(row["step"]), float(row[key])) for row in rows if row[key]] for key in rows[0]}
    return {key: points for key, points in curves.items() if key != "step"}


def mlflow_runs(root: Path) -> dict[str, Any]:
    """The runs of the database by their names, with the client as ``client``."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/logs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'lenet5'")
    runs = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {"client": client, **{run.info.run_name: run for run in runs}}


def mlflow_curves(root: Path, name: str) -> Curves:
    runs = mlflow_runs(root)
    run, client = runs[name], runs["client"]
    histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {key: sorted((point.step, point.value) for point in history) for key, history in histories.items()}


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined,unused-ignore]

    content, place, data = path.read_bytes(), 7, b""
    while place < len(content):
        if 0 < (left := -place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(data)
            yield record
            data = b""


def wandb_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def wandb_curves(path: Path) -> Curves:
    curves: Curves = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = [item for item in record.history.item if len(item.nested_key) < 2]  # no pictures
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            step = row.pop("trainer/global_step")
            assert record.history.step.num == step
            for key, value in row.items():
                if not key.startswith("_"):
                    curves.setdefault(key, []).append((step, value))
    return curves


def exit_codes(folder: Path) -> list[int]:
    records = [record for path in wandb_files(folder) for record in wandb_records(path)]
    return [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]


def ids(folder: Path) -> list[str]:
    return [path.stem for path in wandb_files(folder)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trackers")


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """A run that nothing stops, in all trackers."""
    result = train(root, *SHORT, *ALL, f"hydra.run.dir={root}/logs/train/whole")
    assert result.returncode == 0, result.stderr
    return root / "logs" / "train" / "whole"


@trackers
def test_every_tracker_has_the_same_curves(root: Path, whole: Path) -> None:
    expected = csv_curves(whole)
    shown = {name: points for name, points in tensorboard_curves(whole).items() if name in expected}  # it has more
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "test/acc", "train/lr"} <= expected.keys()
    (wandb_file,) = wandb_files(whole)
    for curves in (expected, shown, mlflow_curves(root, "whole"), wandb_curves(wandb_file)):
        assert curves.keys() == expected.keys() - ({"epoch"} if curves is shown else set())
        assert [step for step, _ in curves["train/lr"]] == list(range(2 * STEPS))
        for name, points in curves.items():  # compared as dicts: W&B, which has a row a step, has "epoch" twice
            assert dict(points) == pytest.approx(dict(expected[name])), name


@trackers
def test_trackers_know_the_settings_the_name_and_the_end(root: Path, whole: Path) -> None:
    run = mlflow_runs(root)["whole"]
    assert run.data.params["optimizer/lr"] == "0.004"
    assert run.data.params["data/source"] == "package"
    assert run.data.tags["group"] == "train"
    assert run.data.tags["output_dir"] == str(whole)
    assert run.info.status == "FINISHED"
    records = list(wandb_records(wandb_files(whole)[0]))
    (described,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (described.display_name, described.run_group, described.project) == ("whole", "train", "lenet5")
    updates = [update for record in records for update in record.config.update]
    config = {"/".join(update.nested_key) or update.key: json.loads(update.value_json) for update in updates}
    assert config["optimizer"]["lr"] == 0.004
    assert exit_codes(whole) == [0]


@trackers
def test_all_that_trackers_write_lies_in_the_runs_folder_or_the_common_database(root: Path, whole: Path) -> None:
    files = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    places = {("logs", "train"), ("logs", "mlflow")}
    strange = {path for path in files if path.parts[0] != "matplotlib" and path.parts[:2] not in places}
    assert strange == {Path("logs/mlflow.db"), Path("logs/mlflow.db.lock"), Path("logs/.clock")}  # the last is ours


@trackers
def test_trackers_have_the_pictures_at_the_steps_of_tensorboard(root: Path, whole: Path) -> None:
    events = EventAccumulator(str(whole), size_guidance={"images": 0})
    events.Reload()
    steps = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert {"val/confusion", "val/hardest_images", "net/feature_maps", "net/filters"} == steps.keys()
    assert steps["val/confusion"] == [STEPS - 1, 2 * STEPS - 1]
    runs = mlflow_runs(root)
    listed = [item.path for item in runs["client"].list_artifacts(runs["whole"].info.run_id, "images")]
    for tag, expected in steps.items():
        for step in expected:
            group, name = tag.split("/")
            media = list(whole.glob(f"wandb/offline-run-*/files/media/images/{group}/{name}_{step}_*.png"))
            assert [np.asarray(Image.open(path)).shape[2] for path in media] == [3]
            pattern = rf"{group}.{name}\Wstep\W{step}\W.*\.png$"  # MLflow has its own marks between the words
            assert any(re.search(pattern, path) for path in listed), (tag, step, listed)


@trackers
def test_name_tags_notes_and_group_are_ones_own(root: Path) -> None:
    own = {"notes": "with a small net", "tags": "[small,first]"}
    settings = [f"logger.{name}.{key}={value}" for name in ("wandb", "mlflow") for key, value in own.items()]
    names = ("logger.wandb.name=mine", "logger.wandb.group=ours", "logger.mlflow.run_name=mine")
    folder = root / "logs" / "train" / "named"
    short = ("trainer.max_epochs=1", "scheduler=[]", "callbacks=minimal")
    result = train(root, *SHORT[:2], SHORT[3], *short, *BOTH, *settings, *names, f"hydra.run.dir={folder}")
    assert result.returncode == 0, result.stderr
    tags = mlflow_runs(root)["mine"].data.tags
    assert (tags["tags"], tags["mlflow.note.content"], tags["group"]) == ("small, first", own["notes"], "train")
    (file,) = wandb_files(folder)
    (described,) = (record.run for record in wandb_records(file) if record.WhichOneof("record_type") == "run")
    assert (described.display_name, described.run_group) == ("mine", "ours")
    assert (list(described.tags), described.notes) == (["small", "first"], own["notes"])


@trackers
def test_trackers_do_not_change_the_training(root: Path, whole: Path) -> None:
    folder = root / "logs" / "train" / "plain"
    assert train(root, *SHORT, "logger=[]", "test=false", f"hydra.run.dir={folder}").returncode == 0
    one, other = (load_checkpoint(path / "checkpoints" / "last.ckpt")["state_dict"] for path in (whole, folder))
    assert_equal(one, other)


@trackers
def test_a_killed_run_goes_on_without_logging_a_step_twice(root: Path, whole: Path) -> None:
    folder = root / "logs" / "train" / "killed"
    kill = f"+callbacks.kill={{_target_: tests.engine.faults.KillAt, step: {STEPS + 9}}}"
    result = train(root, *SHORT, *ALL, kill, "callbacks.last.every_n_steps=5", f"hydra.run.dir={folder}")
    assert result.returncode == -signal.SIGKILL
    assert mlflow_runs(root)["killed"].info.status == "RUNNING"
    assert mlflow_curves(root, "killed")["train/lr"][-1][0] > STEPS + 5  # more than the checkpoint has
    result = train(root, f"resume={folder}", "callbacks.kill=null")
    assert result.returncode == 0, result.stderr
    assert mlflow_runs(root)["killed"].info.status == "FINISHED"
    clocks: Curves = {"train/samples_per_second": []}
    assert mlflow_curves(root, "killed") | clocks == mlflow_curves(root, "whole") | clocks
    assert csv_curves(folder) | clocks == csv_curves(whole) | clocks
    one, other = ids(folder)
    assert one == other  # W&B itself leaves out the steps that it has by then, when it is told of the second file
    second = wandb_curves(wandb_files(folder)[1])
    assert second["train/lr"] == wandb_curves(wandb_files(whole)[0])["train/lr"][STEPS + 5 :]


@trackers
def test_a_run_that_goes_on_with_other_settings_keeps_its_first_ones(root: Path) -> None:
    folder = root / "logs" / "train" / "longer"
    short = (*SHORT, "trainer.max_epochs=1", "scheduler=[]", "logger=mlflow")
    assert train(root, *short, f"hydra.run.dir={folder}").returncode == 0
    result = train(root, f"resume={folder}", "trainer.max_epochs=2")
    assert result.returncode == 0, result.stderr
    assert mlflow_runs(root)["longer"].data.params["trainer/max_epochs"] == "1"
    assert len(mlflow_curves(root, "longer")["val/acc"]) == 2


@trackers
@pytest.mark.parametrize("key", ["id", "version"])
def test_wandb_keeps_an_id_of_ones_own(key: str, root: Path) -> None:
    folder = root / "logs" / "train" / f"own {key}"
    wandb = ("logger=wandb", "logger.wandb.offline=true", f"+logger.wandb.{key}=our-own-{key}")
    short = (*SHORT, "trainer.max_epochs=1", "scheduler=[]")
    result = train(root, *short, *wandb, f"hydra.run.dir='{folder}'")
    assert result.returncode == 0, result.stderr
    result = train(root, f"resume='{folder}'", "trainer.max_epochs=2")
    assert result.returncode == 0, result.stderr
    assert ids(folder) == [f"run-our-own-{key}"] * 2


@trackers
def test_a_signal_ends_the_run_as_killed(root: Path) -> None:
    folder = root / "logs" / "train" / "stopped"
    go = root / "go"
    wait = f"+callbacks.wait={{_target_: tests.engine.faults.WaitAt, step: 7, path: '{go}'}}"
    command = [sys.executable, "-m", "src.train", *SHORT, *BOTH, wait, f"hydra.run.dir={folder}"]
    env = {**os.environ, "PROJECT_ROOT": str(root), "HOME": str(root / "home")}
    with (root / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said)
    wait_until(lambda: "waiting in" in (root / "said").read_text(), seconds=120)
    process.terminate()
    go.touch()  # it is in the step when the signal comes, however slow it is
    assert process.wait(120) == 128 + signal.SIGTERM
    assert mlflow_runs(root)["stopped"].info.status == "KILLED"
    assert exit_codes(folder) == [1]


@trackers
@pytest.mark.parametrize("launcher", ["basic", "process"])
def test_each_job_of_a_sweep_is_a_run_of_its_own(launcher: str, tmp_path: Path) -> None:
    sweep = tmp_path / "logs" / "multirun" / "rates"
    result = train(
        tmp_path, "-m", *SHORT, *BOTH, "optimizer.lr=0.001,1e30,0.002", f"hydra/launcher={launcher}",
        f"hydra.sweep.dir={sweep}",
    )  # fmt: skip
    assert result.returncode == 1
    runs = mlflow_runs(tmp_path)
    statuses = {name: run.info.status for name, run in runs.items() if name != "client"}
    assert statuses == {
        "optimizer.lr=0.001": "FINISHED",
        "optimizer.lr=1e+30": "FAILED",
        "optimizer.lr=0.002": "FINISHED",
    }
    for name, status in statuses.items():
        assert runs[name].data.tags["group"] == "rates"
        assert exit_codes(sweep / name) == [int(status == "FAILED")]
        if status == "FINISHED":
            (wandb_file,) = wandb_files(sweep / name)
            assert wandb_curves(wandb_file)["val/acc"] == mlflow_curves(tmp_path, name)["val/acc"]
    assert len({name for job in statuses for name in ids(sweep / job)}) == 3


@trackers
def test_wandb_without_a_key_is_said_in_a_line(tmp_path: Path) -> None:
    result = train(tmp_path, *SHORT, "logger=wandb", WANDB_API_KEY="")
    assert result.returncode == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert re.match(r"error: logger\.wandb: No API key configured.*\. Or set logger\.wandb\.offline=true\.", line)
    assert "Traceback" not in result.stderr


# What an environment without a package is like: no finder finds it.
WITHOUT = """
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, PackageNotFoundError

find_spec = PathFinder.find_spec


def find_others(name, path=None, target=None):
    return None if name in ("wandb", "mlflow") else find_spec(name, path, target)


PathFinder.find_spec = find_others
from_name = Distribution.from_name


def name_others(name):
    if name in ("wandb", "mlflow"):
        raise PackageNotFoundError(name)
    return from_name(name)


Distribution.from_name = name_others
"""


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.slow
def test_a_tracker_that_is_not_installed_is_said_in_a_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PROJECT_ROOT": str(tmp_path)}
    result = run_command("train", *TINY, f"logger=[tensorboard,{name}]", **environment)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: logger.{name}: ")
    assert "pip install" in line
    assert not (tmp_path / "logs").exists()


def test_a_run_of_its_own_has_a_row_in_tensorboards_hparams_and_no_chart_of_epochs(tmp_path: Path) -> None:
    cfg = compose_tiny(tmp_path, "logger=tensorboard", "trainer.max_epochs=2", "optimizer.lr=0.02", "seed=7")
    build_trainer(cfg).fit(build_module(cfg), build_datamodule(cfg))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "train/loss" in events.Tags()["scalars"]
    assert "epoch" not in events.Tags()["scalars"]
    metadata = events.PluginTagToContent("hparams")
    assert metadata.keys() == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    start = HParamsPluginData.FromString(metadata["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["optimizer.lr"].number_value == 0.02
    assert start.hparams["seed"].number_value == 7
    assert start.hparams["model._target_"].string_value.endswith("TinyTask")
    end = HParamsPluginData.FromString(metadata["_hparams_/session_end_info"]).session_end_info
    assert end.status == 1  # of success


class Kept(TinyTask):
    """Keeps its arguments as hyper-parameters, a factory of optimizers among them, as most modules do."""

    def __init__(self, net: nn.Module, optimizer: Any, model: str = "small", scheduler: Any = None) -> None:
        super().__init__(net, optimizer, scheduler)
        self.save_hyperparameters(ignore=["net"])


def test_hyper_parameters_that_are_called_as_groups_are_logged(tmp_path: Path) -> None:
    cfg = compose_tiny(tmp_path, f"model._target_={Kept.__module__}.Kept", "logger=tensorboard", "trainer.max_epochs=1")
    build_trainer(cfg).fit(build_module(cfg), build_datamodule(cfg))
    assert EventAccumulator(str(tmp_path)).Reload().PluginTagToContent("hparams")


def test_a_clock_that_goes_back_in_training_leaves_the_tests_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="", purge_step=0)
    now = time.time()
    for ahead, name in ((3600, "train/loss"), (0, "test/loss")):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: now + ahead)
        logger.log_metrics({name: 0.5}, 7)
        if ahead:
            monkeypatch.setattr(time, "time", lambda: now)
        logger.finalize("success")
    assert scalars(tmp_path) == {"train/loss": [(7, 0.5)], "test/loss": [(7, 0.5)]}
