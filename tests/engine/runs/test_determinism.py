"""The same seed gives the same weights, bit for bit, whatever is logged, shown and validated beside."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.train import train
from tests.compose import run_command
from tests.engine.equality import weights
from tests.engine.tiny import TINY, compose_tiny

COMMON = ("data.noise=0.1", "trainer.max_epochs=2", "callbacks=minimal", "logger=[]", "test=false")


def trained_weights(folder: Path, *overrides: str) -> Tensor:
    """Train for two epochs with noise, and read the weights at the end."""
    train(compose_tiny(folder, *COMMON, *overrides))
    return weights(folder / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """The weights of the run that the others are compared with: seed 0, and nothing beside the training."""
    return trained_weights(tmp_path_factory.mktemp("plain"), "seed=0", "callbacks.progress=null")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["logger=[tensorboard,csv]", "trainer.log_every_n_steps=1"],
        ["+callbacks.lr._target_=pytorch_lightning.callbacks.LearningRateMonitor", "logger=csv"],
        ["trainer.check_val_every_n_epoch=2"],
        ["trainer.num_sanity_val_steps=2"],
        ["trainer.limit_val_batches=0.5"],
        ["callbacks.last.every_n_steps=3"],
        ["trainer.profiler=simple", "trainer.enable_model_summary=true"],
        ["test=true"],
        ["trainer.deterministic=true"],
    ],
    ids=" ".join,
)
def test_what_is_beside_the_training_does_not_change_it(overrides: list[str], plain: Tensor, tmp_path: Path) -> None:
    assert torch.equal(plain, trained_weights(tmp_path, "seed=0", *overrides))


def test_another_seed_gives_other_weights(plain: Tensor, tmp_path: Path) -> None:
    assert not torch.equal(plain, trained_weights(tmp_path / "one", "seed=1"))
    # Only the order of the batches follows data.seed; weights, dropout and noise follow the seed: both count.
    assert not torch.equal(plain, trained_weights(tmp_path / "order", "seed=0", "data.seed=1"))
    assert not torch.equal(plain, trained_weights(tmp_path / "rest", "seed=1", "data.seed=0"))


@pytest.mark.slow
def test_a_command_comes_to_the_weights_of_a_call(plain: Tensor, tmp_path: Path) -> None:
    shown = ("callbacks=minimal", "logger=[tensorboard,csv]")
    result = run_command("train", *TINY, *COMMON, *shown, "seed=0", f"hydra.run.dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert torch.equal(plain, weights(tmp_path / "checkpoints" / "last.ckpt"))
