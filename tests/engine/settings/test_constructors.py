"""What only a constructor knows to be wrong is told with the key of its node, in a line or two."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from src.engine.runs.build import build_datamodule
from src.engine.settings.check import check, check_values
from src.engine.settings.explain import explain, is_refusal
from src.train import train
from tests.compose import compose_cfg, needs_mnist
from tests.engine.tiny import TINY, compose_tiny
from tests.forks import run_command
from tests.marks import by_default

EARLY = "callbacks=[minimal,early_stopping]"
BAD = [
    "data.batch_size=0", "data.batch_size=-3", "model.net.num_hidden=-1", "model.net.num_hidden=0.5",
    "optimizer.lr=-1", "optimizer.lr=nan", "optimizer.betas=[0.9,1]", "optimizer.betas=[-1,0.9]",
    "optimizer.weight_decay=-1", "+optimizer.eps=-1", "optimizer=sgd optimizer.lr=-1",
    "optimizer=sgd optimizer.momentum=-1", "optimizer=sgd optimizer.momentum=0", "+optimizer.foreach=true",
    "scheduler=onecycle scheduler.scheduler.pct_start=2", "scheduler=onecycle scheduler.scheduler.total_steps=-1",
    "scheduler=plateau scheduler.scheduler.factor=2", "scheduler=onecycle +scheduler.scheduler.anneal_strategy=x",
    "scheduler=step scheduler.interval=day", "scheduler=step scheduler.scheduler.step_size=0.5",
    "trainer.devices=0", "trainer.devices=[]", "trainer.devices=many", "trainer.max_epochs=-2",
    "trainer.max_epochs=1.5",
    "+trainer.max_steps=-2", "trainer.limit_train_batches=1.5", "trainer.limit_train_batches=-1",
    "trainer.limit_val_batches=2.5", "trainer.accumulate_grad_batches=0.5",
    "+trainer.gradient_clip_algorithm=x", "trainer.accelerator=abacus", "+trainer.strategy=nope",
    "trainer.profiler=nope", "trainer.check_val_every_n_epoch=0.5", "+trainer.val_check_interval=many",
    "+trainer.overfit_batches=-1", "+trainer.num_nodes=0", "+trainer.max_time=soon", "+trainer.barebones=true",
    "+trainer.fast_dev_run=-1", "+trainer.reload_dataloaders_every_n_epochs=-1", "trainer.num_sanity_val_steps=x",
    "callbacks.checkpoint.mode=best", "+callbacks.checkpoint.save_top_k=-2",
    "+callbacks.checkpoint.every_n_train_steps=-1", "callbacks.checkpoint.dirpath=5",
    "+callbacks.checkpoint.save_top_k=2 callbacks.checkpoint.monitor=null",
    f"{EARLY} callbacks.early_stopping.mode=best", f"{EARLY} callbacks.early_stopping.patience=x",
    f"{EARLY} callbacks.early_stopping.monitor=null", "+callbacks.x={_target_:datetime.timedelta,weeks:many}",
    "+callbacks.x={_target_:pytorch_lightning.callbacks.Timer,interval:hour}",
    "+callbacks.x={_target_:tests.engine.tiny.TinyNet}",
    "+callbacks.x={_target_:tests.engine.settings.test_constructors.Picky,level:11}",
    "+callbacks.x={_target_:tests.engine.settings.test_constructors.Picky,level:3,more:1}",
    "+callbacks.x={_target_:tests.engine.settings.test_constructors.Faulty}",
]  # fmt: skip


class Picky(pl.Callback):
    """A user's own class that checks its range."""

    def __init__(self, level: int = 1) -> None:
        if not 0 < level <= 10:
            raise ValueError(f"level={level}: expected 1 to 10")


class Faulty(pl.Callback):
    """A user's own class with a fault."""

    def __init__(self) -> None:
        raise KeyError("missing")


@pytest.fixture(autouse=True)
def _settings_of_the_process() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def _explained(cfg: DictConfig, run: Callable[[DictConfig], object]) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever a constructor raises
        run(cfg)
    assert is_refusal(caught.value, cfg)
    return explain(caught.value, cfg=cfg)


def _run(cfg: DictConfig) -> None:
    check(cfg)
    check_values(cfg)
    train(cfg)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("override", BAD)
def test_a_constructors_refusal_is_told_with_its_key(override: str, tmp_path: Path) -> None:
    overrides = override.split(" ")
    said = _explained(compose_tiny(tmp_path, "trainer.max_epochs=1", *overrides), _run)
    key = overrides[-1].lstrip("+").partition("=")[0]
    groups = [key.rpartition(".")[0], key.partition(".")[0], key]
    assert said.startswith(tuple(f"error: {group}" for group in groups)), said
    assert len(said.splitlines()) <= 2, said
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_value_that_its_class_names_is_told_by_its_full_key(tmp_path: Path) -> None:
    assert (
        _explained(compose_tiny(tmp_path, "data.batch_size=0"), _run) == "error: data.batch_size=0: expected 1 or more"
    )


def test_a_fault_in_the_users_own_class_is_told_with_its_place(tmp_path: Path) -> None:
    said = _explained(compose_tiny(tmp_path, BAD[-1]), _run)
    assert said.startswith("error: callbacks.x: 'missing' (tests/engine/settings/test_constructors.py, line ")


@needs_mnist
@pytest.mark.parametrize("override", ["data.source=web", "data.augment=blur", "data.batch_size=0"])
def test_the_templates_own_data_are_told_likewise(override: str, tmp_path: Path) -> None:
    said = _explained(compose_cfg(tmp_path, "trainer=cpu", override), build_datamodule)
    assert said.startswith(f"error: {override}: expected")


@pytest.mark.parametrize(
    "override", by_default(["data.batch_size=0", "optimizer.lr=-1", "monitor=val/accc", "trainer.max_epochs=-2"])
)
def test_no_folder_is_left(override: str, tmp_path: Path) -> None:
    result = run_command("train", *TINY, "callbacks.summary=null", override, PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {override.partition('=')[0].partition('.')[0]}")
    assert list(tmp_path.iterdir()) == []
