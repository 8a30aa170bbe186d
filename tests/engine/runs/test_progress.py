"""The line an epoch: all metrics that any module logged in it, and no others; and what the bar shows."""

import io
import logging
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import Accuracy

from src.engine.runs import progress
from src.engine.runs.last_checkpoint import LastCheckpoint
from src.engine.runs.progress import Progress, Summary, draw_bar
from tests.engine.tiny import TinyLoader

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


def make_rows(num: int, drawn_by: int) -> TensorDataset:
    rows = torch.randn(num, 4, generator=torch.Generator().manual_seed(drawn_by))
    return TensorDataset(rows, (rows.sum(dim=1) > 0).long())


def make_trainer(callbacks: list[Callback], **arguments: Any) -> pl.Trainer:
    """A trainer of one epoch that leaves nothing."""
    common: dict[str, Any] = {
        "max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, "log_every_n_steps": 1, "logger": False, "callbacks": callbacks,
    }  # fmt: skip
    return pl.Trainer(**(common | arguments))


class Plain(pl.LightningModule):
    """Trains a layer, and logs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Rated(Callback):
    """Logs how fast the epoch was, as callbacks do."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("train/samples_per_second", 1e5)


class Talker(Plain):
    """Logs in every place that Lightning knows; the epoch's number, mostly."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", self.current_epoch + 0.5, on_step=True, on_epoch=True)
        if self.current_epoch == 0:
            self.log("warm/up", 1e-6)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val/acc", self.current_epoch + dataloader_idx / 10)

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", 123_456.0)

    def on_train_epoch_end(self) -> None:
        self.log("train/acc", torch.tensor(self.current_epoch + 0.25))


def lines(caplog: pytest.LogCaptureFixture, module: pl.LightningModule, **arguments: Any) -> list[str]:
    """The lines of a run with two validation loaders, without their seconds."""
    train, *validation = (DataLoader(make_rows(24, drawn_by=seed), 8) for seed in range(3))
    trainer = make_trainer([Rated(), Progress()], **arguments)
    with caplog.at_level(logging.INFO, logger="src"):
        trainer.fit(module, train, validation)
    found = [record.getMessage() for record in caplog.records if record.name == "src.engine.runs.progress"]
    assert all(re.search(r"  \d+\.\d s$", line) for line in found)
    return [line.rpartition("  ")[0] for line in found]


def test_a_line_has_whatever_was_logged_in_its_epoch(caplog: pytest.LogCaptureFixture) -> None:
    found = lines(caplog, Talker(), max_epochs=4, check_val_every_n_epoch=2, num_sanity_val_steps=1)
    first, second = (
        f"val/acc/dataloader_idx_0 {epoch}.0000  val/acc/dataloader_idx_1 {epoch}.1000  val_loss 1.235e+05"
        for epoch in (1, 3)
    )
    assert found == [
        "epoch 1/4  train/acc 0.2500  train_loss 0.5000  warm/up 1e-06",
        f"epoch 2/4  train/acc 1.2500  train_loss 1.5000  {first}",
        "epoch 3/4  train/acc 2.2500  train_loss 2.5000",
        f"epoch 4/4  train/acc 3.2500  train_loss 3.5000  {second}",
    ]


@pytest.mark.parametrize("max_epochs", [-1, None])
def test_a_run_of_some_steps_has_no_number_of_epochs(max_epochs: int | None, caplog: pytest.LogCaptureFixture) -> None:
    found = lines(caplog, Talker(), max_epochs=max_epochs, max_steps=5)
    assert [line.partition("  ")[0] for line in found] == [f"step {step}/5" for step in (1, 2, 3, 3, 4, 5)]
    assert "train_loss 0.5000  warm/up 1e-06" in found[0]
    assert "train/acc 0.2500  train_loss 0.5000" in found[3]  # the epoch's
    assert "train/acc 1.2500  train_loss 1.5000" in found[-1]


class Endless(IterableDataset[Any]):
    """Batches without end, of a length that nobody knows."""

    def __iter__(self) -> Any:
        while True:
            yield make_rows(1, drawn_by=0)[0]


def test_a_run_by_steps_on_data_without_a_length_has_a_line_every_tenth(caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer([Progress()], max_epochs=-1, max_steps=40, val_check_interval=15)
    with caplog.at_level(logging.INFO, logger="src"):
        trainer.fit(Plain(), DataLoader(Endless(), 8), DataLoader(make_rows(8, drawn_by=1), 8))
    found = [record.getMessage().partition("  ")[0] for record in caplog.records if record.name.startswith("src.")]
    assert found == [f"step {step}/40" for step in range(4, 41, 4)]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_line_of_a_resumed_epoch_lacks_what_an_earlier_one_has_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 4:
                raise KeyError

    def fit(*callbacks: Callback, **arguments: Any) -> None:
        loader = TinyLoader(make_rows(24, drawn_by=0).tensors[0], 8, None, (0, 1))
        last = LastCheckpoint(str(tmp_path), every_n_steps=1)
        trainer = make_trainer([Progress(), last, *callbacks], max_epochs=2, enable_checkpointing=True)
        trainer.fit(Talker(), loader, loader, **arguments)

    with pytest.raises(KeyError):
        fit(Stop())
    with caplog.at_level(logging.INFO, logger="src"):
        fit(ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    (line,) = (record.getMessage() for record in caplog.records if record.name == "src.engine.runs.progress")
    assert line.startswith("epoch 2/2  train/acc 1.2500  train_loss 1.5000  val/acc 1.0000  val_loss 1.235e+05  ")


def test_an_epoch_without_metrics_has_a_line(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(caplog, Plain()) == ["epoch 1/1"]


def test_a_module_prints(capsys: pytest.CaptureFixture[str]) -> None:
    class Printing(Plain):
        def on_validation_epoch_end(self) -> None:
            self.print("validated", self.current_epoch)

    rows = DataLoader(make_rows(8, drawn_by=0), 8)
    make_trainer([Progress()]).fit(Printing(), rows, rows)
    assert capsys.readouterr().out == "validated 0\n"


def test_other_processes_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Other(Progress):
        def enable(self) -> None:
            """As Lightning leaves it in all processes but the first."""

    other = Other()
    other.disable()
    loader = DataLoader(make_rows(24, drawn_by=0), 8)
    with caplog.at_level(logging.INFO, logger="src"):
        make_trainer([other]).fit(Plain(), loader, loader)
    assert "epoch 1/1" not in caplog.text


METRICS = ("loss 0.1234", "acc 0.9678", "val/acc 0.9801", "val/loss 0.0721")


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (58, "epoch 10/10  [###.....]  loss 0.1234  0:12 left"),
        (60, "epoch 10/10  [###.....]  loss 0.1234  acc 0.9678  0:12 left"),
        (80, "epoch 10/10  [####......]  loss 0.1234  acc 0.9678  val/acc 0.9801  0:12 left"),
        (120, "epoch 10/10  [###..]  loss 0.1234  acc 0.9678  val/acc 0.9801  val/loss 0.0721  0:12 left"),
        (34, "epoch 10/10  [###.....]  0:12 left"),
    ],
)
def test_a_bar_has_what_there_is_room_for(width: int, expected: str) -> None:
    bar = draw_bar("epoch 10/10", 0.45, METRICS, 12.4, width)
    assert len(bar) <= width
    assert [part for part in bar.split("  ") if part[0] != "["] == [
        part for part in expected[:width].split("  ") if part[0] != "["
    ]
    cells = re.search(r"\[(#*)(\.*)\]?", bar)
    assert cells
    assert len(cells[1]) == int(0.45 * len(cells[1] + cells[2]))


@pytest.mark.parametrize(
    ("left", "said"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90_061, "25:01:01")]
)
def test_time_left_is_a_clocks(left: float, said: str) -> None:
    assert draw_bar("epoch 1", math.nan, [], left, 80) == f"epoch 1  {said} left"


def test_what_is_not_known_is_left_out() -> None:
    assert draw_bar("epoch 1", math.nan, METRICS[:1], math.nan, 80) == "epoch 1  loss 0.1234"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Named(Talker):
    def running_metrics(self) -> dict[str, Any]:
        return {"own": torch.tensor(0.25)}


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (Plain, r"epoch 2/2  \[#+\.*\]  loss \d\.\d{4}  0:0\d left"),
        (Talker, r"epoch 2/2  \[#+\.*\]  train_loss 1\.5000  val/acc/dataloader_idx_0 .* left"),
        (Named, r"epoch 2/2  \[#+\.*\]  loss \d\.\d{4}  own 0\.2500  val/acc/.* left"),
    ],
)
def test_the_bar_has_what_any_module_says(kind: type[Plain], shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(progress, "REDRAWN", 0)
    monkeypatch.setenv("COLUMNS", "120")
    train, *validation = (DataLoader(make_rows(24, drawn_by=seed), 8) for seed in range(3))
    make_trainer([Progress()], max_epochs=2).fit(kind(), train, validation)
    bars = [part.strip() for part in terminal.getvalue().split("\r")]
    assert [bar for bar in bars if re.fullmatch(shown, bar)]
    assert bars[-1] == ""  # it goes in the end
    assert "\x1b" not in terminal.getvalue()


def test_an_error_gets_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Plain):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("mine")

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    loader = DataLoader(make_rows(24, drawn_by=0), 8)
    with pytest.raises(RuntimeError, match="mine"):
        make_trainer([Progress()]).fit(Failing(), loader, loader)
    assert "epoch 1/1" in terminal.getvalue()
    assert terminal.getvalue().endswith(" \r")


def test_pipes_have_no_bar_and_neither_have_terminals_of_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = DataLoader(make_rows(24, drawn_by=0), 8)
    for stream, ci in ((io.StringIO(), None), (Terminal(), "1")):
        monkeypatch.setattr(sys, "stderr", stream)
        make_trainer([Progress(ci)]).fit(Plain(), loader, loader)
        assert "\r" not in stream.getvalue()


def test_the_summary_has_no_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    module = Plain()
    module.counted = Accuracy(task="multiclass", num_classes=5)
    loader = DataLoader(make_rows(24, drawn_by=0), 8)
    make_trainer([Summary(2)]).fit(module, loader, loader)
    shown = capsys.readouterr().out
    assert "10 parameters, 10 of them trained" in shown
    assert "Linear" in shown
    assert "counted" not in shown
