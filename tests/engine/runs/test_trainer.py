"""The Trainer of a config."""

from pathlib import Path

import torch

from src.engine.runs import evaluate
from src.engine.runs.trainer import build_trainer
from src.train import train
from tests.engine.tiny import compose_tiny


def test_without_a_checkpoint_callback_lightning_adds_none_of_its_own(tmp_path: Path) -> None:
    cfg = compose_tiny(tmp_path, "callbacks.checkpoint=null", "callbacks.last=null", "trainer.log_every_n_steps=1")
    train(cfg)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_each_logger_gets_the_config(tmp_path: Path) -> None:
    train(compose_tiny(tmp_path, "logger=csv", "trainer.max_epochs=1", "trainer.log_every_n_steps=1"))
    logged = (tmp_path / "csv" / "hparams.yaml").read_text()
    assert "max_epochs: 1" in logged


def test_the_precision_of_matrix_products_is_a_setting_of_the_run(tmp_path: Path) -> None:
    for given, expected in (("medium", "medium"), ("null", "highest")):  # on a CPU; high on Tensor Cores
        build_trainer(compose_tiny(tmp_path, f"float32_matmul_precision={given}"))
        assert torch.get_float32_matmul_precision() == expected
    train(compose_tiny(tmp_path, "float32_matmul_precision=medium", "trainer.max_epochs=1", "test=false"))
    torch.set_float32_matmul_precision("highest")
    evaluate.test_checkpoint(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "test", {"accelerator": "cpu"})
    assert torch.get_float32_matmul_precision() == "medium"  # a test keeps it
