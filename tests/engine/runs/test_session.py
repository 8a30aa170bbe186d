"""What the engine adds to every training: random numbers by process, weighed shares, a checkpoint tried out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, LambdaCallback
from pytorch_lightning.profilers import SimpleProfiler
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from src.engine.runs.session import OF_STEP, Session
from tests.engine.runs.test_last_checkpoint import interrupt, last, run
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
    accumulate_grad_batches, num_training_batches = 1, 4


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


class Line(pl.LightningModule):
    """Fits a line without an offset, by plain steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        return (self.weight * batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("limit", [None, 5])
def test_the_last_window_of_accumulated_gradients_counts_in_full(limit: int | None, tmp_path: Path) -> None:
    rows = torch.arange(1.0, 14.0)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", accumulate_grad_batches=3, limit_train_batches=limit, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[Session({"seed": 0})],
    )  # fmt: skip
    module = Line()
    trainer.fit(module, DataLoader(TensorDataset(rows), batch_size=2))

    weight = 1.0
    for window in 2 * [*rows[: 10 if limit else 13].split(6)]:
        # The gradient of the mean over a window's batches of their means.
        weight -= (
            0.01 * sum(2 * weight * float(batch.square().mean()) for batch in window.split(2)) / len(window.split(2))
        )
    assert float(module.weight.detach()) == pytest.approx(weight)


class Stream(IterableDataset):
    """One row, which has no length."""

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        return iter([(torch.ones(1),)])


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_you_are_warned_where_the_last_window_is_not_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", accumulate_grad_batches=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Session({"seed": 0})],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(Stream()))
    assert "trainer.accumulate_grad_batches=3: the train loader has no length" in caplog.text


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_epochs_of_a_stream_without_a_length_end_with_their_validation(tmp_path: Path) -> None:
    class Validated(Line):
        def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
            self.log("val/loss", self.training_step(batch, batch_idx))

    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[session := Session({"seed": 0})], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Validated(), DataLoader(Stream()), DataLoader(Stream()))
    assert session.logged["val/loss"] == {"epoch": 2, "step": 2}


class Mine(Callback):
    """Notes that it was called."""

    called: list[str]

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.called.append("mine")


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_step_calls_callbacks_only_for_what_they_do(tmp_path: Path) -> None:
    called: list[str] = []
    mine, theirs = Mine(), LambdaCallback(on_train_batch_end=lambda *_: called.append("theirs"))
    mine.called = called
    profiler = SimpleProfiler()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, profiler=profiler,
        callbacks=[mine, theirs, Session({"seed": 0})],
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(TensorDataset(torch.ones(2))))
    assert called == ["mine", "theirs"] * 2
    timed = [name.removeprefix("[Callback]") for name in profiler.recorded_durations if name.startswith("[Callback]")]
    assert {name for name in timed if name.rpartition(".")[2] in OF_STEP} == {
        "Mine.on_after_backward", "LambdaCallback.on_train_batch_end", "Session.on_train_batch_start",
        "Session.on_before_backward",
    }  # fmt: skip


class Talker(Callback):
    """Logs a metric now and then."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == 14:
            pl_module.log("rare", 1.0)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_metrics_have_the_epoch_and_step_in_which_they_were_logged(tmp_path: Path) -> None:
    settings = (
        "logger=[]", "trainer.max_epochs=-1", "+trainer.max_steps=42", "trainer.check_val_every_n_epoch=2",
        f"+callbacks.talker._target_={ME}.Talker", "callbacks.last.every_n_steps=5",
    )  # fmt: skip
    expected = {  # an epoch has 12 steps
        "rare": {"epoch": 2, "step": 24},
        "val/acc": {"epoch": 2, "step": 24},
        "val/loss": {"epoch": 2, "step": 24},
        "train/loss": {"epoch": 4, "step": 42},
    }

    def logged(folder: Path) -> Any:
        return json.loads((folder / "metrics.json").read_text())["logged"]

    assert logged(run(tmp_path / "whole", *settings)) == expected
    assert logged(interrupt(tmp_path / "killed", 17, *settings)) == expected  # resumed after step 15
    folder = tmp_path / "whole"
    assert logged(run(folder, *settings, f"ckpt_path={last(folder)}")) == expected  # it had come to its end
