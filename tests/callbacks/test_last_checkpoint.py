"""src/callbacks/random_state.py: a continued run draws what the uninterrupted one does."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.train import train
from tests.compose import compose_cfg

SHORT = (
    "data=mnist5k", "data.augment=affine", "trainer=cpu", "trainer.limit_train_batches=4", "test=false",
    "scheduler=step",
    "callbacks=minimal", "trainer.log_every_n_steps=1", "logger=[]",
)  # fmt: skip


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    train(compose_cfg(folder, *SHORT, *overrides))
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_continued_run_ends_as_the_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "trainer.max_epochs=3")
    run(tmp_path / "part", "trainer.max_epochs=1")
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    rest = run(tmp_path / "part", "trainer.max_epochs=3", f"ckpt_path={tmp_path}/part/checkpoints/last.ckpt")

    for name, weights in whole["state_dict"].items():
        assert torch.equal(weights, rest["state_dict"][name]), name
    (states,), (rest_states,) = whole["random_states"], rest["random_states"]
    assert torch.equal(states["torch"], rest_states["torch"])
    assert states["python"] == rest_states["python"]
    assert states["numpy"] == rest_states["numpy"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_without_it_the_augmentations_would_differ(tmp_path: Path) -> None:
    off = "callbacks.random_state=null"
    whole = run(tmp_path / "whole", "trainer.max_epochs=2", off)
    run(tmp_path / "part", "trainer.max_epochs=1", off)
    rest = run(tmp_path / "part", "trainer.max_epochs=2", off, f"ckpt_path={tmp_path}/part/checkpoints/last.ckpt")

    assert not all(torch.equal(weights, rest["state_dict"][name]) for name, weights in whole["state_dict"].items())
