"""What is known without imports: own keys, names of keys, nodes and modules; then what the targets' signatures know."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from src.engine.errors import ConfigError
from src.engine.settings.check import check, check_values
from tests.compose import compose_cfg, needs_mnist
from tests.engine.tiny import compose_tiny


def _check(cfg: DictConfig) -> None:
    check(cfg)
    check_values(cfg)


def _said(folder: Path, *overrides: str, config_name: str = "train") -> str:
    cfg = compose_cfg(folder, *overrides, config_name=config_name)
    with pytest.raises(ConfigError) as caught:
        _check(cfg)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=-1", "seed=-1: expected a whole number from 0 to 4294967295 or null"),
        ("seed=1.5", "seed=1.5: expected a whole number from 0"),
        ("seed=true", "seed=True: expected a whole number from 0"),
        ("monitor=None", "monitor=None: expected text or null"),
        (
            "tags=${oc.env:NO_SUCH}",
            "tags: \"Environment variable 'NO_SUCH' not found\"; set it in the shell or in .env",
        ),
        ("seed=${no.such}", "seed: Interpolation key 'no.such' not found"),
        ("monitor=[]", "monitor=[]: expected text or null"),
        ("mode=best", "mode=best: expected min or max"),
        ("test=some", "test=some: expected true or false or all"),
        ("ckpt_path=5", "ckpt_path=5: expected text or null"),
        ("resume=/elsewhere", "resume=/elsewhere: resumes a run from the command line only, not from a file"),
        ("root_dir=null", "root_dir=None: expected text"),
        ("~test", "test: is missing; expected true or false or all"),
        ("~trainer", "trainer: expected a node with a _target_, the class to build; found None"),
        ("~model", "model: expected a node with a _target_, the class to build; found None"),
        ("+callbacks.mine.targt=x", "callbacks.mine: expected a node with a _target_, the class to build; found targt"),
        ("scheduler.scheduler=null", "scheduler.scheduler: expected a node with a _target_"),
        ("+data._partial_=true", "data._partial_=True: makes no object; leave it out"),
        (
            "+callbacks.mine={_target_:torch.nn.Flatten,_partial_:true}",
            "callbacks.mine._partial_=True: makes no object",
        ),
        ("+callbacks/extra=minimal", "callbacks/extra: no such key; did you mean callbacks?"),
        ("+monitr=val/acc", "monitr: no such key; did you mean monitor?"),
        ("optimizer._target_=Adam", "optimizer._target_=Adam: expected the dotted name of a class"),
        ("optimizer._target_=tork.optim.Adam", "optimizer._target_=tork.optim.Adam: no package tork is installed"),
        ("optimizer._target_=torch.optm.Adam", "optimizer._target_=torch.optm.Adam: torch has no optm; did you mean"),
        (
            "model.net._target_=src.models.lenet6.LeNet5",
            "model.net._target_=src.models.lenet6.LeNet5: src.models has no",
        ),
    ],
)
def test_what_needs_no_import_is_told(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose_cfg(tmp_path, *override.split()))
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.batch_size=0", "data.batch_size=0: expected a whole number of 1 or more or null"),
        ("root_dir=null", "root_dir=None: expected text"),
        ("accelerator.devices=1.5", "accelerator.devices=1.5: expected Union[list[int], str, int]"),
        (
            "+accelerator.device=1",
            "accelerator.device: pytorch_lightning.Trainer takes no such argument",
        ),
    ],
)
def test_the_test_command_has_keys_of_its_own(override: str, said: str, tmp_path: Path) -> None:
    assert _said(tmp_path, override, config_name="test").startswith(said)


def test_an_unknown_key_in_a_file_is_refused_but_for_declared_ones(tmp_path: Path) -> None:
    def compose_experiment(name: str, text: str) -> DictConfig:
        path = tmp_path / "experiment" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return compose_cfg(tmp_path, f"experiment={name}", f"hydra.searchpath=[file://{tmp_path}]")

    for key, said in (("monitr", "monitr: no such key; did you mean monitor?"), ("note", "note: no such key")):
        with pytest.raises(ConfigError) as caught:
            check(compose_experiment(key, f"# @package _global_\n{key}: 5\n"))
        assert str(caught.value).startswith(said)
    check(compose_experiment("declared", "# @package _global_\nnote: 5\n"), declared=["note"])
    known = "train: false\ntask_name: mine\ntags: [dev]\nextras: {anything: 1}\npaths: {data_dir: x}\n"
    check(compose_experiment("known", f"# @package _global_\n{known}"))
    with pytest.raises(
        ConfigError, match="experiment: nothing reads its keys; the file's first line must be '# @package"
    ):
        check(compose_experiment("elsewhere", "seed: 3\n# @package _global_\n"), declared=["experiment"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.batch_size=1.5", "data.batch_size=1.5: expected int"),
        ("data.batch_size=many", "data.batch_size=many: expected int"),
        ("data.batch_size=true", "data.batch_size=True: expected int"),
        ("data.batch_size=null", "data.batch_size=None: expected int"),
        ("model.net=5", "model.net=5: expected torch.nn.modules.module.Module"),
        ("~model.net", "model.net: is missing; src.classifier.ImageClassifier needs it (torch.nn"),
        ("model.input_size=[1,32]", "model.input_size=[1, 32]: expected"),
        ("model.loss=mse", "model.loss=mse: expected Callable"),
        ("optimizer.lr=fast", "optimizer.lr=fast: expected float | torch.Tensor"),
        ("optimizer.lr='1e-3'", "optimizer.lr=1e-3: expected float"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: expected tuple[float"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9: expected tuple[float"),
        ("+model._recursive_=maybe", "model._recursive_=maybe: expected bool"),
        (
            "+model.net._partail_=true",
            "model.net._partail_: src.models.lenet5.LeNet5 takes no such argument; did you mean",
        ),
        (
            "optimizer._partial_=false",
            "optimizer.params: is added by the run, for which optimizer._partial_=true is need",
        ),
        ("optimizer.fused=5", "optimizer.fused=5: expected bool | None"),
        (
            "optimizer._target_=torch.optim.Adamm",
            "optimizer._target_=torch.optim.Adamm: torch.optim has no Adamm; did you",
        ),
        ("scheduler.scheduler.pct_start=x", "scheduler.scheduler.pct_start=x: expected float"),
        ("+scheduler.frequency=x", "scheduler.frequency=x: expected int"),
        (
            "+scheduler.montor=val/loss",
            "scheduler.montor: pytorch_lightning.utilities.types.LRSchedulerConfig takes no",
        ),
        ("trainer.precision=31", "trainer.precision=31: expected Union[Literal[64, 32, 16]"),
        (
            "callbacks.checkpoint.monitor=None",
            "callbacks.checkpoint.monitor=None: expected Optional[str]; None is w",
        ),
        ("trainer.plugins=5", "trainer.plugins=5: expected Union["),
        ("+trainer.strategy=[]", "trainer.strategy=[]: expected Union[str, "),
        (
            "+trainer.max_step=5",
            "trainer.max_step: pytorch_lightning.Trainer takes no such argument; did",
        ),
        ("callbacks.last.every_n_steps=x", "callbacks.last.every_n_steps=x: expected int | None"),
        ("+callbacks.mine={_target_:torch.nn.Linear,in_features:1}", "callbacks.mine.out_features: is missing"),
        (
            "+callbacks.mine._target_=torch.no_such_thing",
            "callbacks.mine._target_=torch.no_such_thing: torch has",
        ),
        ("+callbacks.mine._target_=os.sep", "callbacks.mine._target_=os.sep: a str; expected a class or function"),
    ],
)
def test_what_only_the_targets_signature_knows_is_told(override: str, said: str, tmp_path: Path) -> None:
    assert _said(tmp_path, "trainer=cpu", override).startswith(said)


@needs_mnist
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.mirrors=http://x", "data.mirrors=http://x: expected Sequence[str]"),
        ("data.mirrors=[5]", "data.mirrors=[5]: expected Sequence[str]"),
        ("~data.root", "data.root: is missing; src.data.mnist.MNISTDataModule needs it (str)"),
        ("+data.num_wrkers=2", "data.num_wrkers: src.data.mnist.MNISTDataModule takes no such argument"),
        (
            "+data.batchsize=2",
            "data.batchsize: src.data.mnist.MNISTDataModule takes no such argument; did you mean data.ba",
        ),
        ("+model.net.foo=1", "model.net.foo: src.models.lenet5.LeNet5 takes no such argument"),
    ],
)
def test_the_templates_own_classes_are_asked_likewise(override: str, said: str, tmp_path: Path) -> None:
    assert _said(tmp_path, "trainer=cpu", override).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "class Net: pass\nimport no_such_package\n",
            "ModuleNotFoundError: No module named 'no_such_package' ({}, line 2)",
        ),
        ("x = 1 / 0\n", "ZeroDivisionError: division by zero ({}, line 1)"),
        ("class Net:\n    def f(self:\n", "SyntaxError: '(' was never closed (broken.py, line 2)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_with_its_place(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = _said(tmp_path, "trainer=cpu", "model.net={_target_:broken.Net}")
    assert found == f"model.net._target_=broken.Net: its import fails: {said.format(path)}"


LAYER = torch.nn.Flatten()


def test_an_object_that_can_be_called_is_a_target(tmp_path: Path) -> None:
    check_values(compose_cfg(tmp_path, "trainer=cpu", f"+callbacks.mine={{_target_:{__name__}.LAYER,input:1}}"))


def test_a_key_that_is_a_number_is_told(tmp_path: Path) -> None:
    cfg = compose_cfg(tmp_path, "trainer=cpu")
    OmegaConf.set_struct(cfg, False)
    cfg.optimizer[1] = 2
    with pytest.raises(ConfigError, match=r"optimizer\.1: torch\.optim\.Adam takes no such argument"):
        check_values(cfg)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["data.timeout=5", "data.md5=null", "data.mirrors=[]"], marks=needs_mnist),
        ["model.input_size=null", "optimizer.lr=1", "optimizer.fused=null"],
        ["trainer.devices=[0]", "trainer.limit_train_batches=0.5", "trainer.limit_val_batches=3"],
        ["+trainer.strategy=auto", "trainer.profiler=simple", "trainer.max_epochs=1e1"],
        ["logger.tensorboard.version=3", "logger.tensorboard.name=null"],
        ["callbacks=[]", "logger=[]", "scheduler=[]", "optimizer=[]"],
        ["callbacks.summary=null", "~callbacks.lr", "+optimizer.amsgrad=true"],
        [
            "~model.net",
            "~model.num_classes",
            "~model.input_size",
            "~model.loss",
            "model._target_=torch.nn.Flatten",
            "+model.start_dim=0",
        ],
        ["+callbacks.mine={_target_:torch.nn.Sequential,_args_:[{_target_:torch.nn.ReLU}]}"],
        ["+callbacks.mine={_target_:datetime.timedelta,seconds:3}"],
    ],
    ids=" ".join,
)
def test_what_the_classes_take_is_let_through(overrides: list[str], tmp_path: Path) -> None:
    cfg = compose_cfg(tmp_path, "trainer=cpu", *overrides)
    check(cfg)
    check_values(cfg)


def test_a_users_own_classes_are_asked_as_ours_are(tmp_path: Path) -> None:
    for override, said in {
        "data.num_rows=few": "data.num_rows=few: expected int",
        "+data.rows=3": "data.rows: tests.engine.tiny.TinyData takes no such argument; did you mean data.num_rows?",
        "model.net.num_hidden=0.5": "model.net.num_hidden=0.5: expected int",
        "~model.net": "model.net: is missing; tests.engine.tiny.TinyTask needs it (torch.nn",
    }.items():
        with pytest.raises(ConfigError) as caught:
            check_values(compose_tiny(tmp_path, override))
        assert str(caught.value).startswith(said)
