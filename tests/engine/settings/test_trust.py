"""What a config may build: our classes and the libraries', and nothing that runs what a stranger wrote."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import OmegaConf

from src.engine.errors import TargetError
from src.engine.runs.build import restore
from src.engine.settings import trust
from src.engine.settings.check import CONF
from src.engine.settings.trust import check_targets, instantiate
from tests import forks
from tests.compose import run_command

FOREIGN = [
    "os.system",
    "subprocess.run",
    "pathlib.Path",
    "builtins.eval",
    "torch.load",
    "torch.hub.load",
    "torch.utils.cpp_extension.load",
    "torch.utils.collect_env.run",
    "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
    "torch.ops.load_library",
    "hydra.utils.get_method",
    "hydra._internal.utils._locate",
    "hydra_plugins.process_launcher._Process",
    "pytorch_lightning.cli.LightningCLI",
    "pytorch_lightning.strategies.launchers.subprocess_script._SubprocessScriptLauncher",
    "srcfoo.Thing",
    "torch.nnfoo.Thing",
    "datetime.datetime",
]
# Out of an allowed module by way of what it has imported.
WALKS = [
    "src.engine.runs.report.subprocess.run",
    "src.engine.runs.command.os.system",
    "src.engine.settings.check.Path",
    "src.engine.settings.trust.hydra_instantiate",
    "torch.nn.functional.torch.hub.load",
    "torch.nn.modules.module.OrderedDict",
    "torch.nn.Linear.__init__.__globals__",
]
# In src, but no class: these write, or call what they are given.
FUNCTIONS = ["src.engine.runs.report.write_json", "src.engine.runs.command.claim",
    "torch.utils.data.random_split", "torch.nn.functional.relu",
             "src.classifier.ImageClassifier.load_from_checkpoint"]  # fmt: skip


def _used_targets() -> set[str]:
    """What our own conf/ names."""
    found: set[str] = set()

    def collect(node: Any) -> None:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            if key == "_target_":
                found.add(child)
            elif isinstance(child, dict | list):
                collect(child)

    for path in CONF.rglob("*.yaml"):
        collect(OmegaConf.to_container(OmegaConf.load(path)))
    return {target for target in found if not target.startswith("hydra_plugins.")}


ALLOWED = ["torch.nn.Linear", "torchvision.models.resnet18", "torchvision.transforms.Compose", "torchmetrics.Accuracy",
           "pytorch_lightning.plugins.io.TorchCheckpointIO", "torch.utils.data.DataLoader",
           "optuna.samplers.GPSampler", *sorted(_used_targets())]  # fmt: skip


@pytest.mark.parametrize("target", ALLOWED)
def test_the_libraries_classes_and_all_of_conf_are_allowed(target: str) -> None:
    check_targets({"node": {"_target_": target}}, load=True)


@pytest.mark.parametrize("target", FOREIGN)
def test_what_is_foreign_is_refused_by_its_name(target: str) -> None:
    for node in ({"_target_": target}, [1, {"b": {"_target_": target}}]):
        with pytest.raises(TargetError, match=r"_target_=.*: not among what a config may build"):
            check_targets({"net": node})


@pytest.mark.parametrize("target", [*WALKS, *FUNCTIONS])
def test_what_leads_elsewhere_is_refused_before_it_is_called(target: str) -> None:
    for node in ({"_target_": target}, {"a": [1, {"b": {"_target_": target}}]}):
        with pytest.raises(TargetError, match=r"_target_="):
            instantiate(OmegaConf.create({"net": node}))


@pytest.mark.parametrize("target", ["", 5, None, True, "Adam", ".Adam", "torch..Adam", "torch.optim.Adam()", "a b.C"])
def test_what_is_no_name_of_a_class_is_said(target: Any) -> None:
    with pytest.raises(TargetError, match="expected the dotted name of a class"):
        check_targets({"optimizer": {"_target_": target}})


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("torch.optim.Adamm", "torch.optim has no Adamm; did you mean Adam?"),
        ("torch.nn.Linnear", "torch.nn has no Linnear; did you mean Linear?"),
        ("src.models.lenet5.LeNet", "src.models.lenet5 has no LeNet; did you mean LeNet5?"),
        ("src.models.lenet6.LeNet5", "src.models has no lenet6; did you mean lenet5?"),
        ("src.models.lenet5", "a module; expected a class in it"),
    ],
)
def test_a_misspelt_class_is_said_without_its_import(target: str, said: str) -> None:
    with pytest.raises(TargetError) as caught:
        check_targets({"model": {"net": {"_target_": target}}})
    assert str(caught.value) == f"model.net._target_={target}: {said}"


def test_a_module_that_cannot_be_imported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("class Net: pass\nimport no_such_package\n")
    monkeypatch.setattr("src.models.__path__", [*sys.modules["src.models"].__path__, str(tmp_path)])
    with pytest.raises(TargetError, match="No module named 'no_such_package'"):
        trust._check_definition("said", "src.models.broken.Net")


@pytest.mark.slow
def test_a_module_that_the_user_allows_is_built(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from pytorch_lightning import Callback\n"
        "class Mine(Callback):\n"
        "    def on_fit_end(self, trainer, pl_module): print('mine', 'was here')\n"
    )
    arguments = ("data=mnist5k", "debug=fast", "trainer=cpu", "logger=[]", "+callbacks.mine._target_=mine.Mine")
    env = {"PYTHONPATH": f"{CONF.parent}:{tmp_path}", "PROJECT_ROOT": str(tmp_path)}
    refused = run_command("train", *arguments, **env)
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: callbacks.mine._target_=mine.Mine: not among what a config may build; if it is yours, or you trust it, "
        "set ALLOWED_TARGETS=mine in your environment\n"
    )
    allowed = run_command("train", *arguments, **env, ALLOWED_TARGETS="other,mine")
    assert allowed.returncode == 0, allowed.stderr
    assert "mine was here" in allowed.stdout


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+hydra.callbacks.evil._target_=os.mkdir +hydra.callbacks.evil.path={path}", "hydra.callbacks.evil"),
        ("hydra.callbacks.preflight._target_=src.engine.runs.command.os.mkdir", "hydra.callbacks.preflight"),
        ("+hydra.launcher.evil._target_=os.mkdir +hydra.launcher.evil.path={path} -m", "hydra.launcher.evil"),
        ("+hydra.sweeper.evil._target_=os.mkdir +hydra.sweeper.evil.path={path} -m", "hydra.sweeper.evil"),
        ("+hydra.job_logging.handlers.evil.class=os.mkdir", "hydra.job_logging.handlers.evil.class"),
        ("+hydra.hydra_logging.handlers.evil.class=os.mkdir", "hydra.hydra_logging.handlers.evil.class"),
        ("+hydra.job.env_set.ALLOWED_TARGETS=os", "hydra.job.env_set"),
        ("+callbacks.evil._target_=os.mkdir +callbacks.evil.path={path}", "callbacks.evil"),
        ("+trainer.plugins.1._target_=os.mkdir", "trainer.plugins"),
        ("hydra.callbacks.preflight=null +trainer.evil._target_=os.mkdir +trainer.evil.path={path}", "trainer.evil"),
    ],
)
@pytest.mark.slow
def test_nothing_foreign_is_run_by_the_command(override: str, key: str, tmp_path: Path) -> None:
    arguments = override.format(path=tmp_path / "evil").split()
    result = forks.run_command(
        "train", "data=mnist5k", "trainer=cpu", "debug=fast", *arguments, PROJECT_ROOT=str(tmp_path)
    )
    assert result.returncode == 1
    assert key in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "evil").exists()


def test_a_strangers_file_cannot_run_what_it_likes(tmp_path: Path) -> None:
    experiment = tmp_path / "conf" / "experiment"
    experiment.mkdir(parents=True)
    (experiment / "good.yaml").write_text(
        "# @package _global_\n"
        "allowed_targets: [os]\n"
        "hydra: {callbacks: {preflight: null, evil: {_target_: os.mkdir, path: '" + str(tmp_path / "evil") + "'}}}\n"
    )
    result = run_command("train", f"--config-dir={tmp_path}/conf", "experiment=good", PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    assert "hydra.callbacks.evil._target_=os.mkdir: not among" in result.stderr
    assert not (tmp_path / "evil").exists()


def test_instantiate_builds_what_hydra_builds() -> None:
    assert instantiate(None) is None
    config = OmegaConf.create({"size": 3, "net": {"_target_": "torch.nn.Linear", "in_features": "${size}"}})
    torch.manual_seed(0)
    ours = instantiate(config.net, out_features=2)
    torch.manual_seed(0)
    assert torch.equal(ours.weight, hydra_instantiate(config.net, out_features=2).weight)
    assert instantiate({"_target_": "datetime.timedelta", "seconds": 300}).total_seconds() == 300


@pytest.mark.slow
def test_a_strangers_checkpoint_cannot_run_what_it_likes(tmp_path: Path) -> None:
    victim = tmp_path / "evil"
    config = {"model": {"_target_": "os.mkdir", "path": str(victim)}}
    torch.save({"state_dict": {}, "hyper_parameters": config}, tmp_path / "best.ckpt")
    with pytest.raises(TargetError, match=r"model\._target_=os\.mkdir"):
        restore(tmp_path / "best.ckpt")
    assert not victim.exists()
