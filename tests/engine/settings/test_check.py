"""The rules: what each value must be, which nodes and keys must be there, and which go together."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from src.engine.errors import ConfigError
from src.engine.settings.check import check
from src.engine.settings.rules import RULES
from tests.compose import compose_cfg


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.mirrors=[5]", "data.mirrors=[5]: expected a list of URLs"),
        ("data.md5.train-images-idx3-ubyte=5", "data.md5={"),
        ("model.input_size=[1,32]", "model.input_size=[1, 32]: expected three whole numbers of 1 or more, or null"),
        ("model.net=5", "model.net=5: expected a node with a _target_, the class to build"),
        ("scheduler.interval=day", "scheduler.interval=day: expected one of step, epoch"),
        ("scheduler.scheduler=null", "scheduler.scheduler: expected a node with a _target_"),
        ("optimizer._partial_=false", "optimizer._partial_=False: expected true"),
        ("~optimizer._partial_", "optimizer._partial_=None: expected true"),
        ("+model._partial_=true", "model._partial_=True: expected false"),
        ("~model.net", "model.net: is missing; expected a node with a _target_, the class to build"),
        ("~data.root", "data.root: is missing; expected text"),
        ("~test", "test: is missing; expected true, false, or all"),
        ("~trainer", "trainer: expected a node with a _target_, the class to build; found None"),
        ("accelerator.precision=32", "accelerator.precision=32: expected one of 32-true, 16-mixed, bf16-mixed"),
        ("trainer.plugins=5", "trainer.plugins=5: expected a list of nodes with a _target_"),
        ("+trainer.strategy=[]", "trainer.strategy=[]: expected text or a node with a _target_"),
        ("callbacks.checkpoint.mode=best", "callbacks.checkpoint.mode=best: expected one of min, max"),
        ("callbacks.last.every_n_steps=0", "callbacks.last.every_n_steps=0: expected a whole number of 1 or more, or"),
        ("logger.tensorboard.save_dir=5", "logger.tensorboard.save_dir=5: expected text"),
        ("+callbacks/extra=minimal", "callbacks/extra: no such group in conf/"),
    ],
)
def test_a_bad_value_is_said_with_its_key_and_what_was_expected(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose_cfg(tmp_path, override))
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.timeout=0.5", "data.md5=null", "data.mirrors=[]"],
        ["model.input_size=null"],
        ["optimizer.lr=1", "optimizer.fused=null"],
        ["trainer.devices=[0]", "trainer.limit_train_batches=0.5", "trainer.limit_val_batches=3"],
        ["+trainer.strategy=auto", "trainer.profiler=simple"],
        ["logger.tensorboard.version=3", "logger.tensorboard.name=null"],
        ["callbacks=[]", "logger=[]", "scheduler=[]"],
        ["callbacks.summary=null", "~callbacks.lr"],
        ["+optimizer.amsgrad=true", "+note=anything"],
    ],
    ids=" ".join,
)
def test_what_the_classes_take_is_let_through(overrides: list[str], tmp_path: Path) -> None:
    check(compose_cfg(tmp_path, "trainer=cpu", *overrides))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.batch_size=0", "data.batch_size=0: expected a whole number of 1 or more, or null"),
        ("accelerator.devices=none", "accelerator.devices=none: expected a whole number of 1 or more, a list"),
        ("~accelerator", "accelerator: is missing; expected accelerator, devices and precision"),
        ("root_dir=null", "root_dir=None: expected text"),
    ],
)
def test_the_test_command_has_rules_of_its_own(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose_cfg(tmp_path, override, config_name="test"))
    assert str(caught.value).startswith(said)


def test_clipping_mixed_gradients_of_a_fused_optimizer_is_said(tmp_path: Path) -> None:
    overrides = ["trainer=cpu", "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1"]
    with pytest.raises(ConfigError, match=r"trainer\.gradient_clip_val=1: a fused .*set optimizer\.fused=false"):
        check(compose_cfg(tmp_path, *overrides))
    for fewer in (overrides[:2], [overrides[0], overrides[2]], [*overrides, "optimizer.fused=false"]):
        check(compose_cfg(tmp_path, *fewer))


@pytest.mark.parametrize("key", ["monitor", "callbacks.checkpoint.monitor", "callbacks.early_stopping.monitor"])
def test_a_metric_that_nobody_logs_is_said_ahead_of_the_first_epoch(key: str, tmp_path: Path) -> None:
    overrides = ["trainer=cpu", "callbacks=[default,early_stopping]"]
    for wrong in ("val/accuracy", "acc", "test/acc"):
        with pytest.raises(
            ConfigError, match=rf"^{key}={wrong}: no metric of that name; expected one of train/acc, .*"
        ):
            check(compose_cfg(tmp_path, *overrides, f"{key}={wrong}"))
    check(compose_cfg(tmp_path, *overrides, f"{key}=train/images_per_second"))
    check(compose_cfg(tmp_path, *overrides, f"{key}=val/f1", "model._target_=torch.nn.Identity"))


def test_a_model_of_another_kind_needs_no_rules(tmp_path: Path) -> None:
    cfg = compose_cfg(tmp_path, "trainer=cpu")
    norm = {"_target_": "torch.nn.BatchNorm2d", "_partial_": True}
    cfg.model = {"_target_": "src.classifier.ImageClassifier", "net": {"_target_": "torch.nn.Flatten", "norm": norm}}
    check(cfg)


def _keys(node: Any, path: str = "") -> list[tuple[str, str, str]]:
    """Of each key its node's path, its node's target and its name."""
    keys = []
    for key, value in node.items():
        keys.append((path, str(node.get("_target_", "")), str(key)))
        for child in [value] if isinstance(value, dict) else []:
            keys += _keys(child, f"{path}.{key}".lstrip("."))
    return keys


@pytest.mark.parametrize("verb", ["train", "test"])
def test_every_key_of_the_config_has_a_rule(verb: str, tmp_path: Path) -> None:
    config = OmegaConf.to_container(compose_cfg(tmp_path, config_name=verb))
    nodes = {"resume", "data", "model", "optimizer", "scheduler", "accelerator", "trainer", "callbacks", "logger"}
    without = []
    for path, target, key in _keys(config):
        prefixes = [name for name in RULES if "." in name and target.startswith(name)] or [path or verb]
        known = key in RULES.get(prefixes[0], {}) or key in ("_target_", "_partial_") or path.startswith("data.md5")
        if not known and not (path == "" and key in nodes) and path not in ("callbacks", "logger"):
            without.append(f"{path}.{key}")
    assert without == (["scheduler.scheduler"] if verb == "train" else [])  # a node that has a check of its own


def test_nodes_of_the_users_own_classes_have_no_rules_but_their_own(tmp_path: Path) -> None:
    check(compose_cfg(tmp_path, "~data.root", "data._target_=src.data.loader.BatchLoader", "trainer=cpu"))
