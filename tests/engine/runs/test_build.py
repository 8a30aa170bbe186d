"""What a config builds, and what a checkpoint gives back; modules that are written as their communities write them."""

import functools
import io
import pickle
from argparse import Namespace
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from src.engine.errors import CheckpointError, ConfigError
from src.engine.runs.build import build_datamodule, build_module, load_checkpoint, restore, restore_datamodule
from src.engine.runs.checkpoints import newest_checkpoint
from src.engine.runs.evaluate import test_checkpoint as run_test
from src.engine.runs.trainer import build_trainer
from src.engine.settings.check import CONF, check, check_values
from src.engine.settings.explain import explain, is_refusal
from src.train import train
from tests.compose import compose_cfg
from tests.engine.tiny import TINY, TinyData, TinyNet, TinyTask, compose_tiny
from tests.forks import run_command
from tests.marks import by_default

ME = "tests.engine.runs.test_build"
TRACKERS = ("wandb", "mlflow")  # test_loggers.py has these
# Files of these groups are independent of each other: several are tested at a time.
INDEPENDENT = ("callbacks", "data", "debug", "logger", "model", "optimizer", "paths", "scheduler")
OTHERS = [
    f"{path.parent.name}={path.stem}"
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name not in ("hydra", "local", *INDEPENDENT)
]


def list_choices() -> list[tuple[str, ...]]:
    """Choices of options which together have each one."""
    groups = [
        [f"{group}={path.stem}" for path in sorted((CONF / group).glob("*.yaml")) if path.stem not in TRACKERS]
        for group in INDEPENDENT
    ]
    together = [tuple(filter(None, options)) for options in zip_longest(*groups)]
    return [*together, ("scheduler=[]", "logger=[]", "callbacks=[]"), *((option,) for option in OTHERS)]


NEEDED = {"data=idx": ("data.name=Letters",), "data=emnist_letters": ("model.num_classes=26",)}


@pytest.mark.parametrize("options", list_choices(), ids=" ".join)
def test_every_yaml_file_composes_and_builds(options: tuple[str, ...], tmp_path: Path) -> None:
    needed = chain.from_iterable(NEEDED.get(option, ()) for option in options)
    cfg = compose_cfg(tmp_path, *options, *needed)
    if cfg.trainer.accelerator in ("gpu", "mps"):  # right config, wrong machine; test_train.py tests it on a GPU
        with pytest.raises(MisconfigurationException, match=r"backend found|can not run on your system"):
            build_trainer(cfg)
        cfg.trainer.accelerator = "cpu"
    cfg.init.weights = None  # those of a recipe do not ship
    check(cfg)
    check_values(cfg)
    datamodule: Any = build_datamodule(cfg)
    assert datamodule.batch_size == cfg.data.batch_size
    module = build_module(cfg)
    if "trainer=fsdp" in options:
        with pytest.raises(ValueError, match="requires a GPU"):
            build_trainer(cfg)
        return
    module.trainer = trainer = build_trainer(cfg)
    assert trainer.max_epochs == cfg.trainer.max_epochs


class UpstreamTask(TinyTask):
    """Keeps all its arguments as hyper-parameters, and makes optimizer and scheduler of them."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: Any,
        scheduler: Any,
        compile: bool,
        splits: list[int],
        where: Path | None = None,
    ) -> None:
        super().__init__(net)
        self.save_hyperparameters(logger=False)

    def configure_optimizers(self) -> Any:
        assert type(self.hparams["splits"]) is list
        assert isinstance(self.hparams["net"], TinyNet)
        optimizer = self.hparams["optimizer"](params=self.parameters())
        scheduler = self.hparams["scheduler"](optimizer=optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class OwnOptimizer(TinyTask):
    """Takes neither an optimizer nor a scheduler."""

    def __init__(self, net: nn.Module, lr: float, cfg: dict[str, Any]) -> None:
        super().__init__(net)
        self.save_hyperparameters(ignore="net")
        assert type(cfg["sizes"]) is list

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.hparams["lr"])


class PassesOn(TinyTask):
    """Hands all but its own argument over to its base class."""

    def __init__(self, own: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)


UPSTREAM = (
    f"model._target_={ME}.UpstreamTask", "+model.compile=false", "+model.splits=[8,2]",
    "+model.optimizer={_target_: torch.optim.SGD, _partial_: true, lr: 0.05}",
    "+model.scheduler={_target_: torch.optim.lr_scheduler.OneCycleLR, _partial_: true, max_lr: 0.1, total_steps: null}",
)  # fmt: skip
OWN = (f"model._target_={ME}.OwnOptimizer", "+model.lr=0.03", "+model.cfg={sizes: [1, 2]}")


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of")  # as upstream's modules have it
def test_a_module_with_its_own_optimizer_and_scheduler_trains_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "src.engine")
    cfg = compose_tiny(tmp_path, *UPSTREAM, "trainer.max_epochs=1", "scheduler=onecycle", "trainer.log_every_n_steps=1")
    train(cfg)
    assert cfg.optimizer is None  # so that the record does not tell of one that was not used
    assert cfg.scheduler is None
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["lr_schedulers"][0]["total_steps"] == 12  # 240 rows in batches of 20, though the config says null
    assert last["hyper_parameters"] == {"compile": False, "splits": [8, 2], "where": None}  # what is plain
    assert caplog.text.count("not in the checkpoints: net, optimizer, scheduler; the config rebuilds them") == 1
    module = restore(tmp_path / "checkpoints" / "best.ckpt")
    assert isinstance(module, UpstreamTask)
    assert isinstance(module.hparams["net"], TinyNet)
    for name, values in torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"].items():
        assert torch.equal(module.state_dict()[name], values)


def test_a_module_that_takes_no_optimizer_makes_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "src.engine.runs.build")
    cfg = compose_tiny(tmp_path, *OWN, "trainer.max_epochs=1", "trainer.log_every_n_steps=1")
    train(cfg)
    assert f"optimizer: not used: {ME}.OwnOptimizer has its own" in caplog.text
    last = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert last["optimizer_states"][0]["param_groups"][0]["lr"] == 0.03
    assert last["hyper_parameters"] == {"lr": 0.03, "cfg": {"sizes": [1, 2]}}
    assert last["config"]["optimizer"] is None


@pytest.mark.slow
def test_a_setting_of_a_group_that_is_not_used_is_told(tmp_path: Path) -> None:
    own = (*OWN, "trainer.max_epochs=1", "logger=[]", "optimizer.lr=0.5")
    result = run_command("train", *TINY, *own, PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 0, result.stderr
    said = f"optimizer: not used: {ME}.OwnOptimizer has its own, so optimizer.lr=0.5 has no effect"
    assert said in result.stderr.splitlines()


def test_keyword_arguments_that_are_passed_on_count_as_taken(tmp_path: Path) -> None:
    cfg = compose_tiny(tmp_path, f"model._target_={ME}.PassesOn", "+model.own=3", "optimizer.lr=0.02")
    module = build_module(cfg)
    assert isinstance(module.optimizer, functools.partial)
    assert module.optimizer.keywords["lr"] == 0.02


@pytest.mark.parametrize("more", [["optimizer=[]"], ["optimizer=[]", "scheduler=[]"]])
def test_without_an_optimizer_a_module_is_built(more: list[str], tmp_path: Path) -> None:
    module = build_module(compose_tiny(tmp_path, *more))
    assert isinstance(module, TinyTask)
    assert module.optimizer is None


class ByName(TinyTask):
    """Makes its optimizer by a name, as many published modules do."""

    def __init__(self, net: nn.Module, optimizer: str = "adam", scheduler: str | None = None) -> None:
        super().__init__(net)
        self.given = optimizer, scheduler


class ByDefault(ByName):
    """The same, without annotations."""

    def __init__(self, net, optimizer="adam", scheduler=None) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        super().__init__(net, optimizer, scheduler)


class ByClass(ByName):
    """Makes its optimizer of a class."""

    def __init__(self, net: nn.Module, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        super().__init__(net, optimizer)  # type: ignore[arg-type]


class BySettings(ByName):
    """Makes its optimizer of settings of its own."""

    def __init__(self, net: nn.Module, optimizer: dict[str, Any], scheduler: dict[str, Any] | None = None) -> None:
        super().__init__(net, optimizer, scheduler)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "more", "given"),
    [
        (ByName, (), "adam"),
        (ByDefault, (), "adam"),
        (ByClass, (), torch.optim.SGD),
        (BySettings, ("+model.optimizer={name: SGD, lr: 0.1}",), {"name": "SGD", "lr": 0.1}),
    ],
)
def test_a_module_that_takes_a_name_a_class_or_settings_keeps_its_own(
    kind: type, more: tuple[str, ...], given: Any, tmp_path: Path
) -> None:
    cfg = compose_tiny(tmp_path, f"model._target_={ME}.{kind.__name__}", "scheduler=onecycle", *more)
    assert build_module(cfg).given == (given, None)  # nor a schedule whose peak is that of the group
    assert (cfg.optimizer, cfg.scheduler) == (None, None)


def test_a_schedule_that_follows_a_misspelt_key_is_not_left_out(tmp_path: Path) -> None:
    cfg = compose_tiny(tmp_path, "scheduler=onecycle", "scheduler.scheduler.max_lr=${optimizer.lrr}")
    with pytest.raises(InterpolationResolutionError, match=r"optimizer\.lrr"):
        build_module(cfg)


@dataclass
class Optim:
    """Part of Sizes."""

    lr: float = 0.5


@dataclass
class Sizes:
    """Settings of a module, as a dataclass."""

    num_hidden: int = 8
    optim: Optim = field(default_factory=Optim)


class ByConfig(TinyTask):
    """Takes its settings as objects with attributes."""

    def __init__(self, cfg: DictConfig, args: Namespace, where: Path, sizes: Sizes | None = None, shape=(1, 1)) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        super().__init__(TinyNet(cfg.net.num_hidden))
        self.save_hyperparameters(args)
        self.cfg, self.args, self.sizes, self.shape, self.where = cfg, args, sizes, shape, where

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.args.lr)


def test_settings_that_are_annotated_as_objects_are_these_objects(tmp_path: Path) -> None:
    own = (
        "+model.cfg={net: {num_hidden: 4}}", "+model.args={lr: 0.1}", "+model.sizes={optim: {lr: 0.25}}",
        "+model.shape=[2,3]", "+model.where=rows",
    )  # fmt: skip
    cfg = compose_tiny(tmp_path, f"model._target_={ME}.ByConfig", "~model.net", *own, "trainer.max_epochs=1")
    check(cfg)
    check_values(cfg)
    train(cfg)
    module = restore(tmp_path / "checkpoints" / "last.ckpt")
    assert module.cfg == {"net": {"num_hidden": 4}}
    assert module.args == Namespace(lr=0.1)
    assert module.hparams == {"lr": 0.1}
    assert module.sizes == Sizes(8, Optim(0.25))
    assert (module.shape, module.where) == ((2, 3), Path("rows"))


class Unannotated(TinyTask):
    """Expects a DictConfig, and does not say so."""

    def __init__(self, cfg) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        super().__init__(TinyNet(cfg.net.num_hidden))


def test_a_module_that_expects_a_dictconfig_without_a_word_is_told_how_to_get_it(tmp_path: Path) -> None:
    own = (f"model._target_={ME}.Unannotated", "~model.net", "+model.cfg={net: {num_hidden: 4}}")
    with pytest.raises(Exception, match="'dict' object has no attribute 'net'") as caught:
        build_module(compose_tiny(tmp_path, *own))
    assert "annotate its argument so, or set +model._convert_=none" in explain(caught.value)
    module = build_module(compose_tiny(tmp_path, *own, "+model._convert_=none"))
    assert module.get_parameter("net.0.weight").shape == (4, 4)


class OwnLoaders(TinyTask):
    """Has its loaders itself."""

    def _loader(self) -> DataLoader:
        rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(rows, (rows.sum(dim=1) > 0).long()), 10)

    train_dataloader = val_dataloader = test_dataloader = _loader


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_run_needs_no_data_module(tmp_path: Path) -> None:
    cfg = compose_tiny(
        tmp_path, f"model._target_={ME}.OwnLoaders", "data=[]", "trainer.max_epochs=2", "trainer.log_every_n_steps=1"
    )
    assert train(cfg)["test/loss"] > 0
    assert restore_datamodule(tmp_path / "checkpoints" / "best.ckpt") is None


class Pretrained(TinyTask):
    """Reads weights from a file when it is built, as a backbone does."""

    def __init__(self, net: nn.Module, weights: str, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__(net, optimizer, scheduler)
        state = torch.load(weights, weights_only=True)["state_dict"]
        self.net.load_state_dict({name.removeprefix("net."): values for name, values in state.items()})


def test_weights_that_the_constructor_read_from_a_file_that_is_gone_stop_no_restore(
    checkpoint: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "backbone.pth"
    weights.write_bytes(checkpoint.read_bytes())
    target = (f"model._target_={ME}.Pretrained", f"+model.weights={weights}")
    train(compose_tiny(tmp_path / "run", *target, "trainer.max_epochs=1", "trainer.log_every_n_steps=1"))
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    state = restore(path).state_dict()
    weights.unlink()
    module, load = restore(path), torch.load
    assert all(torch.equal(module.state_dict()[name], values) for name, values in state.items())
    assert torch.load is load
    assert nn.Linear(2, 2).load_state_dict(nn.Linear(2, 2).state_dict()).missing_keys == []


class Hooked(TinyTask):
    """Makes its head in configure_model, has words of its own, leaves a part out: by Lightning's means for that."""

    def __init__(self, net: nn.Module, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__(net, optimizer, scheduler)
        self.head: Any = None
        self.words: list[str] = []
        self.given = nn.Linear(4, 4).requires_grad_(False)
        self.strict_loading = False

    def configure_model(self) -> None:
        self.head = self.head or nn.Linear(2, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(super().forward(rows))
        return logits

    def on_train_start(self) -> None:
        self.words = ["learned"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["words"] = self.words

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.words = checkpoint["words"]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {name: values for name, values in state.items() if not name.startswith("given")}


def test_a_module_that_needs_lightnings_hooks_comes_back(tmp_path: Path) -> None:
    cfg = compose_tiny(tmp_path, f"model._target_={ME}.Hooked", "trainer.max_epochs=1", "trainer.log_every_n_steps=1")
    train(cfg)
    path = tmp_path / "checkpoints" / "best.ckpt"
    module = restore(path)
    assert module.words == ["learned"]
    saved = load_checkpoint(path)["state_dict"]
    assert {"head.weight", "head.bias"} < saved.keys()
    assert all(torch.equal(module.state_dict()[name], values) for name, values in saved.items())


class MadeInSetup(TinyTask):
    """Makes a layer in setup, by its data, each time anew."""

    def setup(self, stage: str) -> None:
        self.late = nn.Linear(2, self.trainer.datamodule.batch_size // 10)  # type: ignore[attr-defined]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.late(self.net(rows))
        return logits


def test_a_module_that_makes_layers_in_setup_comes_back_and_is_tested_with_its_weights(tmp_path: Path) -> None:
    target = f"model._target_={ME}.MadeInSetup"
    trained = train(compose_tiny(tmp_path, target, "trainer.max_epochs=1", "trainer.log_every_n_steps=1"))
    path = tmp_path / "checkpoints" / "best.ckpt"
    assert torch.equal(restore(path).late.weight, load_checkpoint(path)["state_dict"]["late.weight"])
    tested = run_test(path, tmp_path / "tested", {"accelerator": "cpu"})["metrics"]
    assert tested["test/loss"] == pytest.approx(trained["test/loss"], rel=1e-6)


class Unpicklable(UpstreamTask):
    """Makes its scheduler of a hyper-parameter, and has a function that cannot be pickled."""

    def __init__(self, net: nn.Module, optimizer: Any, scheduler: Any, compile: bool, splits: list[int]) -> None:
        super().__init__(net, optimizer, scheduler, compile, splits)
        self.key = lambda row: row.sum()


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of")
def test_a_module_that_cannot_be_pickled_keeps_its_scheduler(tmp_path: Path) -> None:
    target = (*UPSTREAM, f"model._target_={ME}.Unpicklable", "trainer.max_epochs=1", "trainer.log_every_n_steps=1")
    train(compose_tiny(tmp_path, *target))
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["lr_schedulers"][0]["total_steps"] == 12


def test_a_strategy_that_would_pickle_the_run_is_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.strategy=ddp_spawn: .*use trainer=ddp$"):
        build_trainer(compose_tiny(tmp_path, "+trainer.strategy=ddp_spawn"))


class Unreadable(TinyTask):
    """Puts an object into its checkpoints that only pickle could read."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["extra"] = {"path": Path("somewhere")}


def test_a_checkpoint_that_could_not_be_read_back_is_found_before_the_first_step(tmp_path: Path) -> None:
    cfg = compose_tiny(tmp_path, f"model._target_={ME}.Unreadable")
    with pytest.raises(CheckpointError, match=r"its part 'extra' holds .* \(pathlib\.PosixPath\); convert"):
        train(cfg)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_drawn_seed_is_recorded_and_gives_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    short = ("trainer.max_epochs=1", "trainer.log_every_n_steps=1")
    cfg = compose_tiny(tmp_path / "drawn", "seed=null", *short)
    drawn = train(cfg)
    seed = load_checkpoint(tmp_path / "drawn" / "checkpoints" / "last.ckpt")["config"]["seed"]
    assert isinstance(seed, int)
    assert train(compose_tiny(tmp_path / "given", f"seed={seed}", *short)) == drawn


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(compose_tiny(folder, "trainer.max_epochs=2", "trainer.log_every_n_steps=1"))
    return folder / "checkpoints" / "best.ckpt"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": {}}, r"lacks the config; src\.train with train=false, .* init\.weights="),
        ({}, "lacks the weights$"),
    ],
)
def test_a_checkpoint_of_another_kind_is_told_with_what_can_be_done(
    content: dict[str, Any], said: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "theirs.ckpt")
    with pytest.raises(CheckpointError, match=f"theirs.ckpt: not of a run of this project: it {said}"):
        restore(tmp_path / "theirs.ckpt")


def test_restore_rebuilds_the_module_from_the_file_alone(checkpoint: Path) -> None:
    module = restore(checkpoint)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {key: tensor.tolist() for key, tensor in module.state_dict().items()} == {
        key: tensor.tolist() for key, tensor in saved.items()
    }
    assert not module.training
    assert module(torch.zeros(3, 4)).shape == (3, 2)


def test_restore_rebuilds_the_data_module_with_the_runs_settings_and_those_asked_for(checkpoint: Path) -> None:
    datamodule = restore_datamodule(checkpoint, batch_size=5, num_rows=None, root=None)
    assert isinstance(datamodule, TinyData)
    assert (datamodule.batch_size, datamodule.num_rows) == (5, 240)
    with pytest.raises(ConfigError, match=r"data\.num_row: .*TinyData takes no such argument; did you mean"):
        restore_datamodule(checkpoint, num_row=3)
    with pytest.raises(ConfigError, match=r"data\.batch_size=many: expected int"):
        restore_datamodule(checkpoint, batch_size="many")


def test_a_checkpoint_holds_the_config_beside_the_modules_own_hyper_parameters(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    assert content["config"]["optimizer"]["lr"] == 4e-3
    assert content["config"]["model"]["_target_"] == "tests.engine.tiny.TinyTask"
    assert "hyper_parameters" not in content  # TinyTask keeps none


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickled_payload_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    torch.save({"state_dict": {}, "config": _Payload(victim)}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"bad\.ckpt"):
        load_checkpoint(tmp_path / "bad.ckpt")
    assert not victim.exists()


@pytest.mark.slow
def test_a_hostile_checkpoint_runs_nothing_with_any_command(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    victim, bad = tmp_path / "victim", tmp_path / "bad.ckpt"
    target = {"_target_": "os.system", "command": f"touch {victim}"}
    for config in (_Payload(victim), content["config"] | {"model": target}):
        torch.save(content | {"config": config}, bad)
        commands = [
            ["predict", f"inputs={checkpoint}"], ["export"], ["test"],
            ["train", "trainer=cpu", "test=false"], ["train", "trainer=cpu", "trainer.max_epochs=3"],
        ]  # fmt: skip
        for verb, *more in commands:
            result = run_command(verb, f"ckpt_path={bad}", *more, PROJECT_ROOT=str(tmp_path))
            assert result.returncode == 1
            assert result.stderr.splitlines()[-1].startswith("error: ")
            assert "Traceback" not in result.stderr
            assert not victim.exists()


@pytest.mark.parametrize("content", ["truncated", "text", "pickle", "foreign"])
def test_what_is_no_checkpoint_is_named(content: str, checkpoint: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, buffer)
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(
        {
            "truncated": checkpoint.read_bytes()[:5000],
            "text": b"this is no checkpoint",
            "pickle": pickle.dumps([1, 2]),
            "foreign": buffer.getvalue(),
        }[content]
    )
    with pytest.raises(CheckpointError, match=r"bad\.ckpt"):
        restore(bad)


MISSING = object()
SHAPES: dict[str, Any] = {
    "a number": 5, "a list": [1, 2], "a text": "text", "null": None, "a truth": True, "empty": {},
    "nested": {"a": {"b": [{"c": None}]}}, "missing": MISSING,
}  # fmt: skip
PARTS = ["loops", "config", "config.model", "config.model.net", "config.data", "config.optimizer", "config.scheduler",
         "state_dict", "callbacks", "callbacks.ModelCheckpoint", "optimizer_states", "lr_schedulers",
         "loops.fit_loop", "loops.fit_loop.epoch_progress", "TinyData", "TinyData.loader",
         "pytorch-lightning_version"]  # fmt: skip
# What is legal: a run without them, or one that has more than it reads.
LEGAL = {"null", "empty", "missing", "nested"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(compose_tiny(folder, "trainer.max_epochs=1", "data.num_rows=40", "scheduler=plateau"))
    return folder / "checkpoints" / "last.ckpt"


def _raised(function: Any, *arguments: Any) -> Exception | None:
    try:
        function(*arguments)
    except Exception as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore")  # Lightning warns of what the file lacks
@pytest.mark.parametrize("part", [PARTS[0], *(pytest.param(part, marks=pytest.mark.slow) for part in PARTS[1:])])
def test_a_malformed_part_is_told_with_the_file(part: str, whole: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.ckpt"
    for name, shape in SHAPES.items():
        content = torch.load(whole, weights_only=True)
        *above, last = part.split(".")
        node = functools.reduce(lambda node, key: node[key], above, content)
        last = next(key for key in node if key.startswith(last))
        node[last] = shape
        if shape is MISSING:
            del node[last]
        torch.save(content, bad)
        cfg = compose_tiny(
            tmp_path / name, "trainer.max_epochs=2", "data.num_rows=40", "scheduler=plateau", f"ckpt_path={bad}"
        )
        raised = list(filter(None, (_raised(restore, bad), _raised(restore_datamodule, bad), _raised(train, cfg))))
        for error in raised:  # whatever it is, a user sees what is explained
            said = explain(error, cfg=cfg)
            assert is_refusal(error, cfg)
            assert said.startswith(f"error: ckpt_path={bad}: ") or "the run so far has" in said, said
            assert len(said.splitlines()) == 1
        assert raised or name in LEGAL, name


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_an_optimizers_state_that_does_not_fit_is_told_with_the_remedy(whole: Path, tmp_path: Path) -> None:
    bad, content = tmp_path / "bad.ckpt", torch.load(whole, weights_only=True)
    content["optimizer_states"][0]["param_groups"][0]["params"].pop()
    torch.save(content, bad)
    cfg = compose_tiny(tmp_path, "trainer.max_epochs=2", "data.num_rows=40", "scheduler=plateau", f"ckpt_path={bad}")
    error = _raised(train, cfg)
    assert error
    said = explain(error, cfg=cfg)
    assert said.startswith(f"error: ckpt_path={bad}: does not fit this run: loaded state dict contains a parameter")
    assert said.endswith("; init.weights=<file> takes only its weights")
    assert len(said.splitlines()) == 1


def test_weights_that_do_not_fit_are_named(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["config"]["model"]["net"]["num_hidden"] = 3
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"bad\.ckpt: its weights do not fit its model.*net\.0\.weight"):
        restore(tmp_path / "bad.ckpt")


def test_no_run_yet_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train first"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("is_compiled", [(True, False), (False, True), (True, True)])
def test_compiled_and_plain_nets_load_each_others_weights(is_compiled: tuple[bool, bool], tmp_path: Path) -> None:
    modules: list[Any] = []
    for seed, compile_it in enumerate(is_compiled):
        torch.manual_seed(seed)
        module: Any = build_module(compose_tiny(tmp_path))
        if compile_it:
            module.net = torch.compile(module.net, backend="eager")
        modules.append(module)
    trained, fresh = modules
    assert ("net._orig_mod.0.weight" in trained.state_dict()) == is_compiled[0]
    fresh.load_state_dict(trained.state_dict())
    rows = torch.randn(5, 4)
    assert torch.equal(fresh.eval()(rows), trained.eval()(rows))


class MaybeCompiled(TinyTask):
    """Compiles its net when it is built, if it is told to."""

    compiles = False

    def __init__(self, net: nn.Module, optimizer: Any = None, scheduler: Any = None) -> None:
        compiled: Any = torch.compile(net, backend="eager") if self.compiles else net
        super().__init__(compiled, optimizer, scheduler)


@pytest.mark.parametrize("compiled_first", by_default([True, False]))
def test_a_run_of_a_compiled_net_resumes_with_a_plain_one_and_the_other_way_round(
    compiled_first: bool, tmp_path: Path
) -> None:
    def fit(name: str, epochs: int, is_compiled: bool, *more: str) -> Path:
        cfg = compose_tiny(
            tmp_path / name, f"model._target_={ME}.MaybeCompiled", f"trainer.max_epochs={epochs}", "test=false",
            "trainer.log_every_n_steps=1", "model.net.dropout=0", "callbacks.checkpoint=null", *more,
        )  # fmt: skip
        MaybeCompiled.compiles = is_compiled
        train(cfg)
        return tmp_path / name / "checkpoints" / "last.ckpt"

    first = fit("first", 1, compiled_first)
    assert any("_orig_mod" in key for key in load_checkpoint(first)["state_dict"]) == compiled_first
    resumed, whole = fit("resumed", 2, not compiled_first, f"ckpt_path={first}"), fit("whole", 2, False)
    weights = [list(load_checkpoint(path)["state_dict"].values()) for path in (resumed, whole)]
    torch.testing.assert_close(*weights)


def test_names_that_do_not_fit_are_still_refused(tmp_path: Path) -> None:
    module = build_module(compose_tiny(tmp_path))
    state = module.state_dict()
    state["net._orig_mod.7.weight"] = state.pop("net.0.weight")
    with pytest.raises(RuntimeError, match=r'Missing key.*"net\.0\.weight"'):
        module.load_state_dict(state)
