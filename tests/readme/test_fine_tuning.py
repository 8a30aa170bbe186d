"""The YAML blocks of conf/README.md, Fine-tuning, in a run of the net that they are about."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from src.engine.runs.build import build_module
from src.engine.settings.check import check, check_values
from tests.compose import compose_cfg
from tests.readme.table import READMES

torchvision = pytest.importorskip("torchvision")
SECTION = READMES["conf/README.md"].split("### Fine-tuning\n")[1].split("\n### ")[0]
ADDED = re.findall(r"\| `(.*)` \|$", READMES["conf/README.md"].split("What researchers add")[1], re.MULTILINE)
BLOCKS = [OmegaConf.create(block) for block in re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)]


def test_each_yaml_block_does_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = torchvision.models.resnet18(num_classes=7).state_dict()
    torch.save(weights, "resnet18.pth")
    cfg = compose_cfg(tmp_path, "optimizer=sgd", "optimizer.weight_decay=0.1")
    OmegaConf.set_struct(cfg, False)
    for block in BLOCKS:
        cfg.merge_with(block)
    cfg.model.net = {"_target_": "torchvision.models.resnet18", "num_classes": 3}
    cfg.model.num_classes = 3
    check(cfg)
    module: Any = build_module(cfg)
    assert torch.equal(module.net.layer4[1].bn2.weight, weights["layer4.1.bn2.weight"])
    assert module.net.fc.weight.shape == (3, 512)
    assert set(module.val_metrics.keys()) == {"val/f1", "val/ece"}
    assert module.loss.weight.tolist() == [1, 1, 5]
    module.scheduler = None
    optimizer = module.configure_optimizers()
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {
        "net.fc": (1e-3, 0.1), "net.fc/no_decay": (1e-3, 0.0), "net.layer4": (1e-4, 0.1), "bias": (0.1, 0.0),
        "rest": (0.1, 0.1),
    }  # fmt: skip


def test_weights_of_classes_are_a_word_on_the_command_line(tmp_path: Path) -> None:
    cfg = compose_cfg(tmp_path, "model.loss.weight=[1,1,1,1,1,1,1,1,1,5]")
    check(cfg)
    check_values(cfg)
    module: Any = build_module(cfg)
    assert module.loss.weight.tolist() == [1] * 9 + [5]


def test_another_loss_needs_no_weight_of_classes(tmp_path: Path) -> None:
    cfg = compose_cfg(tmp_path, "+model.loss={_target_: torch.nn.MultiMarginLoss, margin: 2, weight: null, beta: null}")
    check_values(cfg)
    module: Any = build_module(cfg)
    assert isinstance(module.loss, torch.nn.MultiMarginLoss)


@pytest.mark.parametrize("settings", ADDED)
def test_what_researchers_add_is_taken(settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "backbone.ckpt").touch()
    words = re.split(r" (?=[a-z_]+[.=])(?![^{[]*[}\]])", settings)
    cfg = compose_cfg(tmp_path, *words)
    check(cfg)
    check_values(cfg)
    assert cfg != compose_cfg(tmp_path)
