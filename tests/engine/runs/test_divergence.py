from pathlib import Path

import pytest

from src.engine.errors import DivergenceError
from src.train import train
from tests.engine.tiny import compose_tiny


@pytest.mark.parametrize("every", [1, 5, 100])
def test_a_run_whose_loss_is_no_longer_finite_ends(every: int, tmp_path: Path) -> None:
    cfg = compose_tiny(tmp_path, "optimizer=sgd", "optimizer.lr=1e30", f"trainer.log_every_n_steps={every}")
    with pytest.raises(DivergenceError, match=r"the training loss is (nan|inf) in epoch 1, by step \d+: try a lower"):
        train(cfg)


def test_a_loss_of_the_validation_counts_too(tmp_path: Path) -> None:
    short = ("trainer.limit_train_batches=1", "trainer.log_every_n_steps=1")  # the step's own loss is still finite
    with pytest.raises(DivergenceError, match=r"val/loss is (nan|inf) in epoch 1, by step 1"):
        train(compose_tiny(tmp_path, "optimizer=sgd", "optimizer.lr=1e38", *short))


def test_a_loss_that_stays_finite_ends_nothing(tmp_path: Path) -> None:
    assert train(compose_tiny(tmp_path, "trainer.max_epochs=1", "trainer.log_every_n_steps=1"))["val/loss"] < 1
