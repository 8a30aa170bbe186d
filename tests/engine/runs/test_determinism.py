"""The same seed gives the same weights, bit for bit, whatever is logged, shown and validated beside."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.engine.runs.build import load_checkpoint
from src.train import train
from tests.compose import compose_cfg, run_command


def weights(folder: Path, data: Path, *overrides: str) -> Tensor:
    """Train for two epochs with augmentation, and read the weights at the end."""
    train(
        compose_cfg(
            folder, f"data.root={data}", "data.source=files", "data.md5=null", "data.val_size=50",
            "data.augment=affine", "data.batch_size=16", "trainer=cpu", "trainer.max_epochs=2", "logger=[]",
            "callbacks=minimal", "test=false", *overrides,
        )
    )  # fmt: skip
    return flat(folder / "checkpoints" / "last.ckpt")


def flat(checkpoint: Path) -> Tensor:
    """All weights of a checkpoint in a row."""
    return torch.cat([tensor.flatten() for tensor in load_checkpoint(checkpoint)["state_dict"].values()])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Tensor:
    """The weights of the run that the others are compared with: seed 0, and nothing beside the training."""
    return weights(tmp_path_factory.mktemp("plain"), mnist_root, "seed=0", "callbacks.progress=null")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["logger=tensorboard", "callbacks=default", "trainer.log_every_n_steps=1"],
        ["logger=csv", "trainer.log_every_n_steps=1"],
        ["logger=[tensorboard,csv]", "callbacks=default", "trainer.log_every_n_steps=3"],
        ["trainer.check_val_every_n_epoch=2"],
        ["trainer.num_sanity_val_steps=2", "data.eval_batch_size=7"],
        ["trainer.limit_val_batches=0.5", "data.eval_batch_size=10"],
        ["callbacks.last.every_n_steps=3"],
        ["trainer.profiler=simple", "trainer.enable_model_summary=true"],
        ["test=true"],
        ["trainer.deterministic=true"],
    ],
    ids=" ".join,
)
def test_what_is_beside_the_training_does_not_change_it(
    overrides: list[str], plain: Tensor, mnist_root: Path, tmp_path: Path
) -> None:
    assert torch.equal(plain, weights(tmp_path, mnist_root, "seed=0", *overrides))


def test_another_seed_gives_other_weights(plain: Tensor, mnist_root: Path, tmp_path: Path) -> None:
    assert not torch.equal(plain, weights(tmp_path / "one", mnist_root, "seed=1"))
    # The order of the batches alone follows data.seed, weights and augmentation the seed: both count.
    assert not torch.equal(plain, weights(tmp_path / "order", mnist_root, "seed=0", "data.seed=1"))
    assert not torch.equal(plain, weights(tmp_path / "rest", mnist_root, "seed=1", "data.seed=0"))


@pytest.mark.slow
def test_a_command_comes_to_the_weights_of_a_call(tmp_path: Path) -> None:
    common = ("data=mnist5k", "trainer=cpu", "trainer.max_epochs=1", "callbacks=minimal", "logger=[]", "test=false")
    train(compose_cfg(tmp_path / "call", *common))
    result = run_command("train", *common, f"hydra.run.dir={tmp_path / 'command'}")
    assert result.returncode == 0, result.stderr
    found = [flat(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("call", "command")]
    assert torch.equal(*found)


@pytest.mark.slow
def test_two_processes_come_to_the_same_weights(tmp_path: Path) -> None:
    found = []
    for name, overrides in {"a": ["logger=[]", "callbacks=minimal"], "b": ["logger=[tensorboard,csv]"]}.items():
        result = run_command(
            "train", "seed=0", "data=mnist5k", "data.augment=affine", "trainer=cpu", "trainer.max_epochs=2",
            f"hydra.run.dir={tmp_path / name}", *overrides,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        found.append(flat(tmp_path / name / "checkpoints" / "last.ckpt"))
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_deterministic_on_a_gpu_gives_the_same_weights(precision: str, tmp_path: Path) -> None:
    found = []
    for name, overrides in {"a": ["logger=[]", "callbacks=minimal"], "b": []}.items():
        result = run_command(
            "train", "seed=0", "data=mnist5k", "data.augment=affine", "trainer=gpu", "trainer.deterministic=true",
            f"trainer.precision={precision}", "trainer.max_epochs=3", f"hydra.run.dir={tmp_path / name}", *overrides,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        found.append(flat(tmp_path / name / "checkpoints" / "last.ckpt"))
    assert torch.equal(*found)
