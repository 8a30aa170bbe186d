"""What is only known with data is found before the first step, and the run is the same to the bit."""

import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchmetrics import MaxMetric, MeanMetric

from src.engine.errors import ConfigError, UntestedError
from src.engine.runs.build import build_datamodule, build_module, load_checkpoint, restore
from src.engine.runs.evaluate import test_checkpoint as run_test
from src.engine.runs.rehearsal import Rehearsal, is_tested
from src.engine.runs.trainer import build_trainer
from src.train import train
from tests.engine.equality import assert_equal
from tests.engine.tiny import TinyData, TinyTask, compose_tiny

PLATEAU = "scheduler=plateau"


class Restless(TinyTask):
    """Keeps books in validation, as modules do that were written for other loops."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.best = MaxMetric()
        self.mean = MeanMetric()
        self.norm = nn.BatchNorm1d(4)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(()))
        self.outputs: list[Tensor] = []
        self.num_validated = 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        torch.rand(1)
        self.best.update(self.num_validated)
        self.mean.update(batch[0].mean())
        self.count += 1
        self.outputs.append(batch[0].sum())
        self.num_validated += 1
        self.late = 5


def fit(folder: Path, *overrides: str, rehearsed: bool = True, kind: type[TinyTask] = TinyTask) -> pl.Trainer:
    cfg = compose_tiny(folder, "trainer.max_epochs=2", *overrides, f"model._target_={kind.__module__}.{kind.__name__}")
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    pl.seed_everything(1, verbose=False)
    module, data = build_module(cfg), build_datamodule(cfg)
    cfg.trainer.num_sanity_val_steps = int(rehearsed)
    trainer = build_trainer(cfg)
    if rehearsed and not any(isinstance(each, Rehearsal) for each in trainer.callbacks):  # type: ignore[attr-defined]
        trainer.callbacks.append(Rehearsal(config))  # type: ignore[attr-defined]
    trainer.fit(module, data)
    return trainer


def test_a_rehearsed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    trainers = [fit(tmp_path / str(rehearsed), rehearsed=rehearsed, kind=Restless) for rehearsed in (True, False)]
    one, other = (trainer.lightning_module for trainer in trainers)
    assert_equal(one.state_dict(), other.state_dict())
    assert_equal(dict(trainers[0].callback_metrics), dict(trainers[1].callback_metrics))
    assert isinstance(one, Restless)
    assert isinstance(other, Restless)
    assert one.num_validated == other.num_validated == len(other.outputs) == len(one.outputs)
    assert_equal(one.outputs, other.outputs)
    assert torch.equal(one.mean.compute(), other.mean.compute())
    assert one.best.compute() == other.best.compute() == other.num_validated - 1
    assert torch.equal(torch.rand(3), torch.rand(3)) is False  # the generator still runs


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["monitor=val/accc"], "monitor=val/accc: validation logs no such metric; did you mean val/acc?; monitor=null"),
        (["monitor=val_acc"], "monitor=val_acc: validation logs no such metric; did you mean val/acc?"),
        (["monitor=test/acc"], "monitor=test/acc: validation logs no such metric"),
        (["monitor=acc"], "monitor=acc: validation logs no such metric; did you mean val/acc?; monitor=null keeps"),
        (["monitor=vall/loss"], "monitor=vall/loss: validation logs no such metric; did you mean val/loss?"),
        (["trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0: expected 1 or more"),
        (
            ["callbacks.checkpoint.monitor=val/f1"],
            "callbacks.checkpoint.monitor=val/f1: validation logs no such metric",
        ),
        (
            ["callbacks=[minimal,early_stopping]", "callbacks.early_stopping.monitor=val/los"],
            "callbacks.early_stopping.monitor=val/los: validation logs no such metric; did you mean val/loss?",
        ),
        (
            ["callbacks=[minimal,early_stopping]", "trainer.limit_val_batches=0"],
            "monitor=val/acc: this run has no validation (limit_val_batches=0,",
        ),
        ([PLATEAU, "scheduler.monitor=val/lss"], "scheduler.monitor=val/lss: validation logs no such metric; did you"),
        ([PLATEAU, "trainer.limit_val_batches=0"], "scheduler.monitor=val/loss: this run has no validation"),
        (
            [PLATEAU, "trainer.check_val_every_n_epoch=2"],
            "scheduler.monitor=val/loss: validation logs it every 2 epochs; set +scheduler.frequency=2",
        ),
    ],
)
def test_what_would_fail_later_is_told(overrides: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        fit(tmp_path, *overrides)
    assert str(caught.value).startswith(said)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["monitor=train/loss"],
        ["trainer.gradient_clip_val=0.5", "optimizer.fused=true"],
        ["monitor=null"],
        ["trainer.limit_val_batches=0"],
        [PLATEAU, "trainer.check_val_every_n_epoch=2", "+scheduler.frequency=2"],
        [PLATEAU, "trainer.check_val_every_n_epoch=2", "+scheduler.strict=false"],
        [PLATEAU, "scheduler.monitor=train/loss", "trainer.limit_val_batches=0"],
        ["callbacks=[minimal,early_stopping]", "callbacks.early_stopping.monitor=train/loss"],
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore:.*not find the monitored key")
@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")
def test_what_comes_in_time_is_let_through(overrides: list[str], tmp_path: Path) -> None:
    assert fit(tmp_path, *overrides).current_epoch == 2


class LazyTask(TinyTask):
    """Its first batch makes its weights and buffers, be it of the rehearsal or of training."""

    def __init__(self, net: nn.Module, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__(nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(2)), optimizer, scheduler)


@pytest.mark.parametrize("rehearsed", [True, False])
def test_lazy_layers_train_and_come_back(rehearsed: bool, tmp_path: Path) -> None:
    fit(tmp_path, rehearsed=rehearsed, kind=LazyTask)
    state = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    restored = restore(tmp_path / "checkpoints" / "last.ckpt").state_dict()
    assert restored["net.1.running_mean"].shape == (8,)
    assert all(torch.equal(restored[name], values) for name, values in state.items())


class Late(TinyTask):
    """Logs a metric of training at an epoch's end."""

    def on_train_epoch_end(self) -> None:
        self.log("acc", 1.0)


def test_a_metric_of_an_epochs_end_is_waited_for(tmp_path: Path) -> None:
    assert fit(tmp_path, "monitor=acc", kind=Late).checkpoint_callback.best_model_score == 1.0  # type: ignore[union-attr]


def test_a_metric_like_none_is_warned_of_in_the_first_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A callback may log it, but hardly does."""
    with pytest.raises(MisconfigurationException, match="could not find the monitored key"):
        fit(tmp_path, "monitor=quality")
    (told,) = [record.getMessage() for record in caplog.records if record.name == "src.engine.runs.rehearsal"]
    assert told == (
        "monitor=quality: validation logs no such metric; it logs val/acc, val/loss; monitor=null keeps the last "
        "checkpoint; unless a callback logs it, this run ends after its first validation"
    )


class Scores(pl.Callback):
    """A callback of the user's with a metric of its own."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("val/f1", 0.5)


def test_what_a_callback_logs_at_the_end_of_validation_is_known_before_the_first_step(tmp_path: Path) -> None:
    mine = f"+callbacks.mine._target_={__name__}.Scores"
    assert fit(tmp_path, mine, "monitor=val/f1").checkpoint_callback.best_model_score == 0.5  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"monitor=val/f2: validation logs no such metric; did you mean val/f1\?"):
        fit(tmp_path / "other", mine, "monitor=val/f2")
    assert not list((tmp_path / "other").rglob("*.ckpt"))


def test_you_are_warned_where_the_worst_is_taken_for_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    early = "callbacks=[minimal,early_stopping]"
    fit(tmp_path / "a", early, "monitor=val/loss", "callbacks.early_stopping.mode=min")
    fit(tmp_path / "b", early, "callbacks.early_stopping.monitor=train/loss", "+callbacks.early_stopping.strict=false")
    fit(tmp_path / "c", PLATEAU, "scheduler.monitor=val/acc")
    fit(tmp_path / "d", early, "monitor=val/loss", "mode=min")
    assert [record.getMessage() for record in caplog.records if record.name == "src.engine.runs.rehearsal"] == [
        "mode=max: takes the highest val/loss for the best; did you mean mode=min?",
        "callbacks.early_stopping.mode=max: takes the highest train/loss for the best; did you mean "
        "callbacks.early_stopping.mode=min?",
        "scheduler.mode=min: takes the lowest val/acc for the best; did you mean scheduler.mode=max?",
    ]


def test_you_are_warned_where_weights_are_ranked_by_an_earlier_validation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    by_steps = "+callbacks.checkpoint.every_n_train_steps=5"
    fit(tmp_path / "a", by_steps)
    fit(tmp_path / "b", by_steps, "callbacks.checkpoint.monitor=train/loss", "callbacks.checkpoint.mode=min")
    fit(tmp_path / "c", by_steps, "callbacks.checkpoint.monitor=null")
    assert [record.getMessage() for record in caplog.records if record.name == "src.engine.runs.rehearsal"] == [
        "callbacks.checkpoint.every_n_train_steps: ranks weights by the val/acc of the validation before them; "
        "leave it out and set trainer.val_check_interval to rank them by their own"
    ]


def test_a_module_without_a_test_is_not_tested(caplog: pytest.LogCaptureFixture) -> None:
    class NoTest(pl.LightningModule):
        pass

    with caplog.at_level(logging.WARNING):
        assert is_tested("all", NoTest()) is False
    assert caplog.messages == ["test=false: NoTest has no test_step"]
    assert is_tested("all", TinyTask(nn.Identity()), TinyData()) == "all"
    assert is_tested(False, NoTest()) is False
    caplog.clear()
    assert is_tested(True, TinyTask(nn.Identity()), TinyData(), is_fresh=True) is True
    assert caplog.messages == ["train=false without ckpt_path: tests the weights that the module starts with"]


class Untested(pl.LightningDataModule):
    """Has data to train on and to validate."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.data = TinyData(**kwargs)

    def train_dataloader(self) -> Any:
        return self.data.train_dataloader()

    def val_dataloader(self) -> Any:
        return self.data.val_dataloader()


def test_data_without_a_test_split_end_a_run_without_a_test(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = compose_tiny(tmp_path, "trainer.max_epochs=1", f"data._target_={__name__}.Untested")
    assert not any(name.startswith("test") for name in train(cfg))
    assert "test=false: Untested has no test_dataloader" in caplog.messages
    with pytest.raises(UntestedError, match=r"Untested has no test_dataloader: there is nothing to test"):
        run_test(tmp_path / "checkpoints" / "last.ckpt", tmp_path, {"accelerator": "cpu"})
