"""What a project brings along that was made with another template: imports, keys, folders, ``.env``."""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from omegaconf import ListConfig
from pytorch_lightning import LightningModule

from src.engine.errors import ConfigError
from src.engine.runs.build import build_datamodule, build_module, load_checkpoint, restore
from src.engine.runs.command_line import read_env
from src.engine.settings.check import check, check_values
from src.train import train
from tests.engine.tiny import TINY, TinyData, TinyTask, compose_tiny
from tests.forks import run_command

SHORT = ("trainer.max_epochs=1", "trainer.log_every_n_steps=1")


def test_an_import_of_lightning_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grown.py").write_text("from lightning import LightningModule\nclass Net(LightningModule): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = compose_tiny(tmp_path, "model._target_=grown.Net")
    with pytest.raises(ConfigError, match=r"model\._target_=grown\.Net: it imports .* import from pytorch_lightning"):
        check_values(cfg)


@pytest.mark.parametrize(("group", "mine"), [("model", TinyTask), ("data", TinyData)])
def test_a_base_class_of_another_package_is_told_with_the_remedy(
    group: str, mine: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the package lightning has it: the same code, and classes that are not those of pytorch_lightning.
    base = type(mine.__mro__[1].__name__, (torch.nn.Module,), {"__module__": "lightning.pytorch"})
    module = ModuleType("grown")
    vars(module)["Mine"] = type("Mine", (base,), {})
    monkeypatch.setitem(sys.modules, "grown", module)
    cfg = compose_tiny(tmp_path)
    cfg[group] = {"_target_": "grown.Mine"}
    with pytest.raises(ConfigError, match=rf"{group}\._target_=grown\.Mine: its base class is lightning\.pytorch"):
        build_module(cfg) if group == "model" else build_datamodule(cfg)


def test_a_plain_net_as_the_module_is_told(tmp_path: Path) -> None:
    cfg = compose_tiny(tmp_path)
    cfg.model = {"_target_": "torch.nn.Flatten"}
    with pytest.raises(ConfigError, match=r"model\._target_=torch\.nn\.Flatten: a Flatten; expected a pytorch"):
        build_module(cfg)


class NetAndOptimizer(LightningModule):
    """Takes a net and an optimizer, and nothing else; validates and tests by one method."""

    def __init__(self, net: torch.nn.Module, optimizer: Any) -> None:
        super().__init__()
        self.net, self.make_optimizer = net, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


# Of the five kinds that did not train, four are tasks beside this file: upstream's conventions (upstream), a regressor
# with its own optimizer (regression), a GAN (gan), two validation loaders (multilabel).
def test_a_module_with_a_net_and_an_optimizer_only_trains_and_comes_back(tmp_path: Path) -> None:
    own = f"model._target_={__name__}.NetAndOptimizer"
    assert train(compose_tiny(tmp_path, own, "monitor=val_loss", "mode=min", *SHORT))["val_loss"] > 0
    module = restore(tmp_path / "checkpoints" / "best.ckpt")
    assert isinstance(module, NetAndOptimizer)


class Saves(TinyTask):
    """Keeps whatever it is given as hyper-parameters."""

    def __init__(self, net: torch.nn.Module, sizes: Any, optimizer: Any) -> None:
        super().__init__(net, optimizer)
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of")
@pytest.mark.parametrize("convert", ["object", "none"])  # none: the module keeps a ListConfig, which nothing may load
def test_a_module_that_saves_a_list_as_hyper_parameter_comes_back(convert: str, tmp_path: Path) -> None:
    own = (f"model._target_={__name__}.Saves", "+model.sizes=[8,2]", f"+model._convert_={convert}")
    cfg = compose_tiny(tmp_path, *own, *SHORT)
    assert isinstance(build_module(cfg).hparams["sizes"], list if convert == "object" else ListConfig)
    train(cfg)
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    saved = load_checkpoint(checkpoint)["hyper_parameters"]
    assert saved == ({"sizes": [8, 2]} if convert == "object" else {})
    assert list(restore(checkpoint).hparams["sizes"]) == [8, 2]


def test_tags_a_name_and_folders_are_part_of_a_run(tmp_path: Path) -> None:
    cfg = compose_tiny(tmp_path, "task_name=first", "tags=[small,quick]", "data.num_rows=40", *SHORT)
    check(cfg)
    train(cfg)
    config = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["config"]
    assert (config["task_name"], config["tags"]) == ("first", ["small", "quick"])
    assert {name: Path(path) for name, path in config["paths"].items()} == {
        "root_dir": tmp_path, "data_dir": tmp_path / "data", "log_dir": tmp_path / "logs", "output_dir": tmp_path,
        "work_dir": Path(),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as the command ignores it
def test_train_false_only_tests_the_checkpoint(tmp_path: Path) -> None:
    trained = train(compose_tiny(tmp_path / "trained", *SHORT))
    best = tmp_path / "trained" / "checkpoints" / "best.ckpt"
    tested = train(compose_tiny(tmp_path / "tested", "train=false", f"ckpt_path={best}"))
    assert tested == {name: value for name, value in trained.items() if name.startswith("test/")}
    assert not list((tmp_path / "tested").rglob("*.ckpt"))


def test_an_env_file_is_read_and_never_overrides_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"ENV_FILE_{number}" for number in range(6)]
    for name in names:
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv(names[0], "the shell's")
    lines = ("=the file's", "=plain value  # a comment", "='# quoted'", '="a=b"  # quoted, too', "=", " = with spaces")
    text = "\n".join(f"{name}{line}" for name, line in zip(names, lines, strict=True))
    (tmp_path / ".env").write_text(f"# a comment\n\nexport {text}\nno value\n")
    read_env(tmp_path / ".env")
    assert [os.environ[name] for name in names] == ["the shell's", "plain value", "# quoted", "a=b", "", "with spaces"]
    read_env(tmp_path / "missing")


@pytest.mark.slow
def test_a_commands_config_uses_the_env_file_of_the_root(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MY_NAME=first\nMY_API_KEY=nobody-may-see-this\n")
    result = run_command(
        "train", *TINY, *SHORT, "task_name=${oc.env:MY_NAME}", "tags=['${oc.env:MY_API_KEY}']",
        "hydra.run.dir=${root_dir}/run", PROJECT_ROOT=str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert load_checkpoint(checkpoint)["config"]["task_name"] == "first"
    for path in tmp_path.rglob("*"):
        assert path.name == ".env" or not path.is_file() or b"nobody-may-see-this" not in path.read_bytes(), path


@pytest.mark.slow
def test_groups_are_off_with_null_on_the_command_line(tmp_path: Path) -> None:
    own = "model._target_=tests.tasks.test_contract.SelfMade"
    result = run_command(
        "train", *TINY, *SHORT, own, "optimizer=null", "scheduler=null", "data=null", "logger=null",
        "hydra.run.dir=${root_dir}/run", PROJECT_ROOT=str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    config = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["config"]
    assert [config.get(group) for group in ("optimizer", "scheduler", "data", "logger")] == [None] * 4


class SelfMade(TinyTask):
    """Has its optimizer and its loaders itself."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__(net)
        self.data = TinyData(num_rows=40)

    def train_dataloader(self) -> Any:
        return self.data.train_dataloader()

    def val_dataloader(self) -> Any:
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        return self.data.test_dataloader()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)
