"""What the engine adds to every training: random numbers by process, weighed shares, a checkpoint tried out."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from src.engine.runs.session import Session
from tests.engine.tiny import TINY
from tests.engine.together import train_together

ME = "tests.engine.runs.test_session"


class NoteDraw(Callback):
    """Writes down the first random number of each process."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        path = Path(trainer.default_root_dir) / f"drawn{trainer.global_rank}"
        if not path.exists():
            path.write_text(str(torch.rand(()).item()))


@pytest.mark.slow
def test_each_process_draws_random_numbers_of_its_own(tmp_path: Path) -> None:
    def draw(root: Path) -> list[str]:
        note = f"+callbacks.note._target_={ME}.NoteDraw"
        run = train_together(
            root, *TINY, "trainer=ddp_cpu", "trainer.max_epochs=1", "trainer.log_every_n_steps=1", "logger=[]", note,
            "callbacks=minimal",
        )  # fmt: skip
        return [(run.path / f"drawn{rank}").read_text() for rank in range(2)]

    drawn = draw(tmp_path / "one")
    assert drawn[0] != drawn[1]
    assert draw(tmp_path / "again") == drawn


class Loader:
    """Gives this process a third of each image of the last batch more than its share."""

    def share(self, batch_idx: int) -> float:
        return 1.0 if batch_idx < 3 else 4 / 3


class OfTwo:
    """As much of a Trainer as the loss is scaled by."""

    world_size = 2
    train_dataloader = Loader()


@pytest.mark.parametrize(("batch_idx", "factor"), [(0, 1.0), (3, 4 / 3)])
def test_a_loss_counts_by_the_processs_share_of_the_batch(batch_idx: int, factor: float) -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    loss: Tensor = weight**2
    trainer: Any = OfTwo()
    module: Any = None
    session = Session({"seed": 0})
    session.on_train_batch_start(trainer, module, None, batch_idx)
    session.on_before_backward(trainer, module, loss)
    loss.backward()
    assert loss.item() == pytest.approx(9 * factor)
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(6 * factor)
