"""The same seed gives LeNet-5 the same weights, bit for bit, whatever is shown beside."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.train import train
from tests.compose import compose_cfg, run_command
from tests.engine.equality import weights


def trained_weights(folder: Path, data: Path, *overrides: str) -> Tensor:
    """Train for two epochs with augmentation, and read the weights at the end."""
    train(
        compose_cfg(
            folder, f"data.root={data}", "data.source=files", "data.md5=null", "data.val_size=50",
            "data.augment=affine", "data.batch_size=16", "trainer=cpu", "trainer.max_epochs=2", "logger=[]",
            "callbacks=minimal", "test=false", *overrides,
        )
    )  # fmt: skip
    return weights(folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    "overrides",
    [
        ["logger=[tensorboard,csv]", "callbacks=default", "trainer.log_every_n_steps=3"],
        ["trainer.num_sanity_val_steps=2", "data.eval_batch_size=7", "test=true"],
    ],
    ids=" ".join,
)
def test_what_is_beside_the_training_does_not_change_it(overrides: list[str], mnist_root: Path, tmp_path: Path) -> None:
    plain = trained_weights(tmp_path / "plain", mnist_root, "callbacks.progress=null")
    assert torch.equal(plain, trained_weights(tmp_path / "beside", mnist_root, *overrides))


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
        found.append(weights(tmp_path / name / "checkpoints" / "last.ckpt"))
    assert torch.equal(*found)
