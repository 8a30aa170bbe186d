"""What a checkpoint may have built: what the user's own config names, and the libraries' layers."""

import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import pytest
import torch
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import OmegaConf
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn

from src.engine.errors import CheckpointError, ConfigError
from src.engine.settings.arguments import check_arguments
from src.engine.settings.check import ROOT
from src.engine.settings.trust import RENAMED, admit, instantiate, plain_config, recall, remember, renamed, tame
from src.train import train
from tests import forks
from tests.compose import needs_mnist
from tests.engine.tiny import TINY, TINY_CONF, TinyData, compose_tiny


def instantiate_stranger(path: str, key: str, node: Any, **own: Any) -> Any:
    return instantiate(tame(path, key, node, **own))


FOREIGN = [
    "os.system", "subprocess.run", "pathlib.Path", "builtins.eval", "torch.load", "torch.hub.load",
    "torch.utils.cpp_extension.load", "torch.ops.load_library", "hydra.utils.get_method", "hydra.utils.instantiate",
    "hydra_plugins.process_launcher.ProcessLauncher", "pytorch_lightning.Trainer", "srcfoo.Thing", "torch.nnfoo.Thing",
    "lightning_utilities.core.imports.LazyModule", "torchvision.datasets.utils.download_url",
    "torchvision.io.write_file",
    "src.engine.runs.loggers.MLFlowLogger", "src.engine.runs.report.write_text", "src.callbacks.speed.Speed",
    "pytorch_lightning.callbacks.ModelCheckpoint", "src.engine.runs.preflight.Preflight",
]  # fmt: skip
# Out of a library by way of what it has imported, or by what is no class of its own.
WALKS = [
    "torch.nn.functional.torch.hub.load", "torch.nn.modules.module.OrderedDict", "torch.nn.Linear.__init__.__globals__",
    "torch.nn.functional.relu", "torch.optim.lr_scheduler.partial", "torchvision.models.resnet.partial",
    "torchvision.models._api.Weights", "src.classifier.ImageClassifier.load_from_checkpoint",
]  # fmt: skip


@pytest.mark.parametrize("target", [*FOREIGN, *WALKS, 5, None, ""])
def test_what_conf_does_not_name_is_not_built(target: Any) -> None:
    within: list[Any] = [[{"a": {"_target_": target}}], [({"_target_": target},)]]  # a tuple is built like a list
    for node in ({"_target_": target}, *({"_target_": "torch.nn.Sequential", "_args_": each} for each in within)):
        with pytest.raises(CheckpointError, match=r"^ckpt_path=best\.ckpt: model.*_target_"):
            instantiate_stranger("best.ckpt", "model", node)


def test_what_may_not_be_built_is_not_imported_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strangers_module.py").write_text("Thing = int\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match="a checkpoint may build what conf/ names"):
        tame("x", "model", {"_target_": "strangers_module.Thing"})
    assert "strangers_module" not in sys.modules


def test_what_is_built_later_is_checked_too() -> None:
    node = {"_target_": "torch.nn.Sequential", "_recursive_": False, "_args_": [{"_target_": "os.getcwd"}]}
    with pytest.raises(CheckpointError, match=r"model\._args_\[0\]\._target_=os\.getcwd"):
        instantiate_stranger("best.ckpt", "model", node)


@pytest.mark.parametrize("node", [None, 5, "text", [], {}, {"a": 1}])
def test_what_is_no_node_is_told_with_the_file(node: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^ckpt_path=best\.ckpt: its data is no node"):
        instantiate_stranger("best.ckpt", "data", node)


def test_an_argument_that_its_class_does_not_take_is_told_with_the_file() -> None:
    with pytest.raises(CheckpointError, match=r"^ckpt_path=best\.ckpt: "):
        instantiate_stranger("best.ckpt", "model", {"_target_": "torch.nn.NoSuchLayer"})


@needs_mnist
def test_what_conf_names_is_built() -> None:
    lenet = {"_target_": "src.models.lenet5.LeNet5", "activation": "tanh"}
    model = {"_target_": "src.classifier.ImageClassifier", "net": lenet, "num_classes": 10}
    assert type(instantiate_stranger("x", "model", model)).__name__ == "ImageClassifier"


def test_a_checkpoint_of_a_class_that_has_moved_is_built_from_where_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED, "gone.", "tests.")
    net = {"_target_": "gone.engine.tiny.TinyNet", "num_hidden": 3}
    node = {"_target_": "torch.nn.Sequential", "_args_": [net, {"_target_": "torch.nn.ReLU"}]}
    admit(TINY_CONF)
    assert type(instantiate_stranger("x", "model", renamed(node))[0]).__name__ == "TinyNet"
    assert renamed({"model": node, "note": "gone.", "seed": 1})["note"] == "gone."


def test_a_demo_of_lightnings_is_built_if_a_model_of_the_users_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.engine.settings.trust._targets", set())
    node = {"_target_": "pytorch_lightning.demos.boring_classes.BoringModel"}
    with pytest.raises(CheckpointError, match="a checkpoint may build what conf/ names"):
        instantiate_stranger("x", "model", node)
    admit({"model": node})
    assert isinstance(instantiate_stranger("x", "model", node), BoringModel)


def test_the_libraries_layers_are_built() -> None:
    layers = [{"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2}, {"_target_": "torch.nn.ReLU"}]
    assert len(instantiate_stranger("x", "model", {"_target_": "torch.nn.Sequential", "_args_": layers})) == 2
    assert isinstance(
        instantiate_stranger("x", "model", {"_target_": "torchvision.models.resnet18", "num_classes": 3}), nn.Module
    )


def test_a_users_own_folder_of_configs_is_trusted() -> None:
    node = {"_target_": "tests.engine.tiny.TinyNet", "num_hidden": 3}
    admit(TINY_CONF)
    assert instantiate_stranger("x", "model", node)[0].out_features == 3


DATA = {"_target_": "src.data.mnist.MNISTDataModule", "name": "MNIST"}


@needs_mnist
def test_a_checkpoint_reads_no_environment_and_sends_nothing_to_its_own_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    node = {**DATA, "root": "data", "mirrors": ["http://127.0.0.1:9/${oc.env:SECRET}"]}
    assert list(instantiate_stranger("x", "data", node).mirrors) == []
    for address in ("http://127.0.0.1:9/x", " http://127.0.0.1:9/x", "file:/etc"):
        assert list(instantiate_stranger("x", "data", {**node, "mirrors": [address]}).mirrors) == []
    with pytest.raises(CheckpointError, match=r"data\.root=\$\{oc\.env:SECRET\}: a checkpoint may not choose"):
        instantiate_stranger("x", "data", {**DATA, "root": "${oc.env:SECRET}"})


@needs_mnist
def test_a_checkpoint_chooses_no_folder_outside_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT_ROOT", str(ROOT))
    for root in (str(tmp_path / "victim"), "../../victim", "~/victim", "${oc.env:HOME}", f"{ROOT}/../victim",
                 f"file:{tmp_path}", "C:\\victim"):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"^ckpt_path=x: data\.root=.*: a checkpoint may not choose a folder"):
            instantiate_stranger("x", "data", {**DATA, "root": root})
    assert instantiate_stranger("x", "data", {**DATA, "root": "/x"}, root=str(tmp_path)).folder.is_relative_to(tmp_path)
    assert instantiate_stranger("x", "data", {**DATA, "root": f"{ROOT}/mine"}).folder.is_relative_to(ROOT / "mine")


@needs_mnist
def test_what_a_run_has_named_is_remembered_for_later_commands(tmp_path: Path) -> None:
    memory = tmp_path / "logs" / ".places"
    cfg = {"data": {"root": str(tmp_path / "a"), "mirrors": ["http://x"]}, "logger": {"x": {"dir": "/l"}}, "out": "/o"}
    for _ in range(2):
        remember(OmegaConf.create(cfg), memory)
        assert recall(memory) == {str(tmp_path / "a")}
    remember(OmegaConf.create({"data": {"root": "/b"}}), memory)
    assert recall(memory) == {str(tmp_path / "a"), "/b"}
    assert tame("x", "data", {**DATA, "root": "/b"})["root"] == "/b"
    memory.unlink()
    assert recall(memory) == set()


@needs_mnist
@pytest.mark.slow
def test_data_outside_of_the_project_are_used_again_and_a_strangers_folder_is_not(
    tmp_path: Path, mnist_root: Path
) -> None:
    project, data = tmp_path / "project", tmp_path / "data"
    project.mkdir()
    data.symlink_to(mnist_root)
    said = {"PROJECT_ROOT": str(project)}
    short = ("trainer=cpu", "debug=fast", "logger=[]", "callbacks=minimal", "test=false", "data.md5=null",
             "data.val_size=60")  # fmt: skip
    trained = forks.run_command("train", *short, f"data.root={data}", f"hydra.run.dir={project}/run", **said)
    assert trained.returncode == 0, trained.stderr
    path = project / "run" / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    tested = forks.run_command("test", f"ckpt_path={path}", "accelerator=cpu", **said)
    assert tested.returncode == 0, tested.stderr
    checkpoint["config"]["data"]["root"] = str(tmp_path / "other")
    torch.save(checkpoint, path)
    refused = forks.run_command("test", f"ckpt_path={path}", "accelerator=cpu", **said)
    assert refused.returncode == 1
    assert f"data.root={tmp_path}/other: a checkpoint may not choose a folder" in refused.stderr


class Borrowed(TinyData):
    """Needs a folder."""

    def __init__(self, data_dir: str, num_rows: int = 40) -> None:
        super().__init__(num_rows)
        self.data_dir = data_dir


@pytest.mark.slow
def test_a_colleagues_checkpoint_is_used_with_ones_own_folder(tmp_path: Path) -> None:
    """His run has named his folder, which this project does not know."""
    conf = tmp_path / "conf"
    shutil.copytree(TINY_CONF, conf)
    text = f"_target_: {Borrowed.__module__}.Borrowed\ndata_dir: ???\nnum_rows: 40\n"
    (conf / "data" / "borrowed.yaml").write_text(text)
    his, mine = tmp_path / "his", tmp_path / "mine"
    trained = forks.run_command(
        "train", f"--config-dir={conf}", *TINY[1:], "data=borrowed", f"data.data_dir={his}", "trainer.max_epochs=1",
        "logger=[]", "hydra.run.dir=${root_dir}/run", PROJECT_ROOT=str(his),
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr

    def test(*arguments: str) -> "subprocess.CompletedProcess[str]":
        checkpoint = f"ckpt_path={his}/run/checkpoints/best.ckpt"
        return forks.run_command("test", f"--config-dir={conf}", checkpoint, *arguments, PROJECT_ROOT=str(mine))

    refused = test()
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert f"data.data_dir={his}: a checkpoint may not choose a folder or address; set ++data.data_dir=<yours>" in line
    assert not (mine / "logs").exists()
    tested = test(f"++data.data_dir={mine}")
    assert tested.returncode == 0, tested.stderr
    misspelt = test(f"++data.data_dirr={mine}")
    assert "data.data_dir=" in misspelt.stderr


def test_a_checkpoint_of_a_gpu_is_tested_without_one(tmp_path: Path) -> None:
    """Its config says gpu, and its tensors lie in cuda:0, as the file has it."""
    said = {"PROJECT_ROOT": str(tmp_path)}
    trained = forks.run_command(
        "train", *TINY, "trainer.max_epochs=1", "logger=[]", "test=false", "hydra.run.dir=${root_dir}/run", **said
    )
    assert trained.returncode == 0, trained.stderr
    plain, path = tmp_path / "run" / "checkpoints" / "best.ckpt", tmp_path / "run" / "checkpoints" / "gpu.ckpt"
    content = torch.load(plain, weights_only=True)
    content["config"]["trainer"] |= {"accelerator": "gpu", "devices": 1, "precision": "16-mixed"}
    torch.save(content, plain)
    place = pickle.dumps("cpu", protocol=2)[2:-3], pickle.dumps("cuda:0", protocol=2)[2:-3]  # without memo and end
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            part = source.read(name)
            target.writestr(name, part.replace(*place) if name.endswith("data.pkl") else part)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)
    tested = forks.run_command("test", f"--config-dir={TINY_CONF}", f"ckpt_path={path}", **said)
    assert tested.returncode == 0, tested.stderr


@needs_mnist
def test_a_folder_that_the_users_config_names_is_used(tmp_path: Path) -> None:
    admit({"data": {"root": str(tmp_path / "mine")}})
    assert instantiate_stranger("x", "data", {**DATA, "root": str(tmp_path / "mine")}).folder.is_relative_to(tmp_path)


def test_a_place_that_nobody_but_the_checkpoint_knows_is_told_where_it_is_needed() -> None:
    node = {"_target_": "torch.nn.Linear", "in_features": "/etc/passwd", "out_features": 2}
    with pytest.raises(CheckpointError, match=r"model\.in_features=/etc/passwd: a checkpoint may not choose a folder"):
        instantiate_stranger("x", "model", node)
    weights = {"_target_": "torchvision.models.resnet18", "weights": "/etc/passwd", "num_classes": 3}
    assert isinstance(instantiate_stranger("x", "model", weights), nn.Module)


def test_the_users_own_config_may_name_anything(tmp_path: Path) -> None:
    node = OmegaConf.create({"_target_": "os.mkdir", "_args_": [str(tmp_path / "made")]})
    instantiate(node)
    assert (tmp_path / "made").is_dir()
    assert os.sep in str(tmp_path)


def test_instantiate_builds_what_hydra_builds() -> None:
    assert instantiate(None) is None
    config = OmegaConf.create({"size": 3, "net": {"_target_": "torch.nn.Linear", "in_features": "${size}"}})
    torch.manual_seed(0)
    ours = instantiate(config.net, out_features=2)
    torch.manual_seed(0)
    assert torch.equal(ours.weight, hydra_instantiate(config.net, out_features=2).weight)
    assert instantiate({"_target_": "datetime.timedelta", "seconds": 300}).total_seconds() == 300


def test_a_list_becomes_a_tensor_where_the_annotation_says_tensor() -> None:
    config = OmegaConf.create({"loss": {"_target_": "torch.nn.CrossEntropyLoss", "weight": [1, 2.5]}, "lr": 1e-3})
    assert torch.equal(instantiate(config.loss).weight, torch.tensor([1.0, 2.5]))
    assert config.loss.weight == [1, 2.5]
    adam = {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.1, "betas": [0.9, 0.99]}
    assert instantiate(adam).keywords == {"lr": 0.1, "betas": (0.9, 0.99)}  # as Adam annotates them


def test_a_null_that_a_target_does_not_take_takes_an_argument_back(caplog: pytest.LogCaptureFixture) -> None:
    base = OmegaConf.create({"loss": {"_target_": "torch.nn.CrossEntropyLoss", "weight": None, "label_smoothing": 0.1}})
    with pytest.raises(ConfigError, match=r"loss\.label_smoothing: torch\.nn.*NLLLoss takes no such argument"):
        check_arguments(
            {"model": OmegaConf.to_container(OmegaConf.merge(base, {"loss": {"_target_": "torch.nn.NLLLoss"}}))}
        )
    config = OmegaConf.merge(base, {"loss": {"_target_": "torch.nn.NLLLoss", "label_smoothing": None}})
    check_arguments({"model": OmegaConf.to_container(config)})
    assert type(instantiate(config.loss)) is torch.nn.NLLLoss
    assert instantiate({"_target_": "builtins.dict", "kept": None}) == {"kept": None}
    assert not caplog.records
    instantiate({"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 2, "in_feature": None})
    (said,) = caplog.messages
    assert said.startswith("in_feature=null: torch.nn.Linear takes no such argument")
    assert said.endswith("did you mean in_features?")


def test_a_whole_number_may_be_written_with_a_power_of_ten() -> None:
    layer = instantiate({"_target_": "torch.nn.Linear", "in_features": 1e1, "out_features": 2})
    assert layer.weight.shape == (2, 10)


def test_secrets_stay_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@host")
    monkeypatch.setenv("MY_PROJECT", "mnist")
    monkeypatch.setenv("NUM_ROWS", "7")
    monkeypatch.setenv("PROJECT_ROOT", "/project")
    monkeypatch.delenv("NOT_SET", raising=False)
    cfg = OmegaConf.create(
        {
            "uri": "${oc.env:MLFLOW_TRACKING_URI}",
            "root_dir": "${oc.env:PROJECT_ROOT,.}",
            "data": {"rows": "${oc.decode:${oc.env:NUM_ROWS}}", "root": "${root_dir}/mnist"},
            "logger": {
                "mlflow": {
                    "tracking_uri": "${oc.env:MLFLOW_TRACKING_URI,'x'}",
                    "uri": "${uri}/a",
                    "name": "${root_dir}/b",
                },
                "other": {"project": "${oc.env:MY_PROJECT}", "place": "${oc.env:NOT_SET,'${root_dir}/c'}"},
            },
        }
    )
    plain = plain_config(cfg)
    assert "hunter2" not in str(plain)
    assert plain == {
        "uri": "${oc.env:MLFLOW_TRACKING_URI}",
        "root_dir": "/project",
        "data": {"rows": 7, "root": "/project/mnist"},
        "logger": {
            "mlflow": {
                "tracking_uri": "${oc.env:MLFLOW_TRACKING_URI}",
                "uri": "${oc.env:MLFLOW_TRACKING_URI}/a",
                "name": "/project/b",
            },
            "other": {"project": "${oc.env:MY_PROJECT}", "place": "/project/c"},
        },
    }
    assert cfg.uri == "https://me:hunter2@host"
    assert OmegaConf.to_container(OmegaConf.create(plain), resolve=True)["uri"] == cfg.uri  # type: ignore[index,call-overload]


class Tracker(DummyLogger):
    """A logger of the user's."""

    used: ClassVar[list[str]] = []

    def __init__(self, address: str) -> None:
        super().__init__()
        self.used.append(address)


def test_a_loggers_secret_is_in_none_of_a_runs_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = uuid4().hex  # of which no file of the tests knows
    monkeypatch.setenv("MY_TRACKER", f"me:{secret}@host")
    monkeypatch.setenv("MY_TOKEN", secret)
    tracker = f"+logger.mine={{_target_:{__name__}.Tracker,address:'${{oc.env:MY_TRACKER}}'}}"
    loggers = ("logger=tensorboard", tracker, "tags=['${oc.env:MY_TOKEN}']")
    train(compose_tiny(tmp_path, "trainer.max_epochs=1", *loggers))
    assert Tracker.used == [f"me:{secret}@host"]
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"config.yaml", "last.ckpt", "metrics.json"} <= files.keys()
    assert any(name.startswith("events.") for name in files)
    assert [name for name, content in files.items() if secret.encode() in content] == []
    assert b"${oc.env:MY_TRACKER}" in files["config.yaml"]


def test_callbacks_loggers_and_trainers_of_the_users_are_no_permission() -> None:
    """They write where they are told to."""
    groups = {"callbacks": {"x": {"_target_": "a.Writer"}}, "logger": {"x": {"_target_": "a.Logger"}}}
    admit(OmegaConf.create({**groups, "trainer": {"_target_": "a.Trainer"}, "model": {"_target_": "a.Net"}}))
    for name in ("Writer", "Logger", "Trainer"):
        with pytest.raises(CheckpointError, match=f"a\\.{name}: a checkpoint may build what conf/ names"):
            tame("x", "model", {"_target_": f"a.{name}"})
    with pytest.raises(CheckpointError, match="a has no Net"):  # this one is looked for
        tame("x", "model", {"_target_": "a.Net"})


def test_a_text_of_a_checkpoint_is_no_permission() -> None:
    """What was built from a checkpoint adds nothing to what the next one may have built."""
    bait = {
        "_target_": "torch.nn.Conv2d",
        "in_channels": 1,
        "out_channels": 1,
        "kernel_size": 1,
        "padding_mode": "os.system",
    }
    with pytest.raises(Exception, match=r"os\.system"):
        instantiate_stranger("x", "model", bait)
    with pytest.raises(CheckpointError, match=r"data\._target_=os\.system"):
        tame("x", "data", {"_target_": "os.system", "command": "true"})


def test_a_scheduler_and_its_settings_are_looked_at_too() -> None:
    step = {"_target_": "torch.optim.lr_scheduler.StepLR", "_partial_": True, "step_size": 3}
    assert tame("x", "scheduler", {"interval": "epoch", "scheduler": step})["scheduler"] == step
    for bad in ({"interval": "${oc.env:HOME}", "scheduler": step}, {"scheduler": {"_target_": "os.system"}}):
        with pytest.raises(CheckpointError, match=r"ckpt_path=x: scheduler\."):
            tame("x", "scheduler", bad)
