"""src/engine/runs/last_checkpoint.py with a user's own module and loader; tests/test_resume.py has the command."""

import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from src.engine.runs.build import load_checkpoint
from src.engine.runs.last_checkpoint import LastCheckpoint
from src.train import train
from tests.engine.equality import assert_equal, assert_same_run
from tests.engine.tiny import TinyLoader, compose_tiny

NUM_IMAGES, BATCH_SIZE = 40, 4
Loader = DataLoader | TinyLoader


class UsersModule(pl.LightningModule):
    """Logs as Lightning's documentation does, and draws random numbers of all three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.net(images + random.random() + float(np.random.rand()))
        loss = nn.functional.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        self.log("train/worst", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("train/acc", self.accuracy, on_step=False, on_epoch=True)
        if batch_idx in (1, 8):  # not in each step, nor in the first one behind a resume
            self.log("train/rare", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Kill(BaseException):
    """What leaves a trainer no time for anything, as a kill."""


class KillAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, idx: int) -> None:
        if trainer.global_step == self.steps:
            raise Kill


def make_loader(kind: str) -> Loader:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(NUM_IMAGES, 8, generator=generator)
    labels = torch.randint(3, (NUM_IMAGES,), generator=generator)
    if kind == "TinyLoader":
        return TinyLoader(images - 0.5, BATCH_SIZE, 0, (0, 1))
    return DataLoader(TensorDataset(images, labels), BATCH_SIZE, shuffle=True)


def fit(
    folder: Path, kind: str, *callbacks: Callback, ckpt_path: Path | None = None, **arguments: Any
) -> dict[str, Any]:
    """Train for three epochs; what Lightning's checkpoint at the end would hold, and the curves."""
    pl.seed_everything(1 if ckpt_path is None else 2, verbose=False)  # other numbers, were they not restored
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=CSVLogger(folder, name="", version=""), callbacks=list(callbacks),
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        enable_checkpointing=bool(callbacks), **arguments,
    )  # fmt: skip
    module = UsersModule()
    try:
        trainer.fit(module, make_loader(kind), ckpt_path=ckpt_path, weights_only=True)
    except Kill:
        return {}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"weights": module.state_dict(), "random": (random.random(), np.random.rand(), torch.rand(1)), **metrics}


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("kind", "kill_at", "every_n_steps"),
    [("DataLoader", 17, None), ("TinyLoader", 17, 3), ("TinyLoader", 20, 2), ("TinyLoader", 27, 5)],
)
def test_a_users_module_goes_on_exactly(kind: str, kill_at: int, every_n_steps: int | None, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", kind, LastCheckpoint(str(tmp_path / "whole"), every_n_steps))
    path = tmp_path / "part" / "last.ckpt"
    assert fit(tmp_path / "part", kind, LastCheckpoint(str(path.parent), every_n_steps), KillAfter(kill_at)) == {}
    assert torch.load(path, weights_only=True)["global_step"] == {None: 10, 3: 15, 2: 20, 5: 25}[every_n_steps]
    rest = fit(tmp_path / "part", kind, LastCheckpoint(str(path.parent), every_n_steps), ckpt_path=path)

    assert rest.keys() == whole.keys()
    assert rest.pop("random") == whole.pop("random")
    for name, weights in whole.pop("weights").items():
        assert torch.equal(weights, rest["weights"][name]), name
    del rest["weights"]
    assert rest == whole


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")
@pytest.mark.parametrize(("every", "kill_at"), [(1, 17), (2, 17), (2, 27)])
def test_loaders_are_made_anew_where_the_run_would_have_made_them(every: int, kill_at: int, tmp_path: Path) -> None:
    again: dict[str, Any] = {"reload_dataloaders_every_n_epochs": every}
    whole = fit(tmp_path / "whole", "DataLoader", LastCheckpoint(str(tmp_path / "whole")), **again)
    path = tmp_path / "part" / "last.ckpt"
    fit(tmp_path / "part", "DataLoader", LastCheckpoint(str(path.parent)), KillAfter(kill_at), **again)
    rest = fit(tmp_path / "part", "DataLoader", LastCheckpoint(str(path.parent)), ckpt_path=path, **again)
    assert torch.equal(rest.pop("weights")["net.0.weight"], whole.pop("weights")["net.0.weight"])
    assert rest == whole


@pytest.mark.filterwarnings("ignore:(Experiment logs|Checkpoint) directory .* exists and is not empty")
def test_beside_it_lightnings_own_checkpoint_will_do(tmp_path: Path) -> None:
    def callbacks(name: str) -> list[Callback]:
        theirs = ModelCheckpoint(tmp_path / name, filename="theirs", enable_version_counter=False)
        return [theirs, LastCheckpoint(str(tmp_path / name))]

    whole = fit(tmp_path / "whole", "DataLoader", *callbacks("whole"))
    fit(tmp_path / "part", "DataLoader", *callbacks("part"), KillAfter(17))
    rest = fit(tmp_path / "part", "DataLoader", *callbacks("part"), ckpt_path=tmp_path / "part" / "theirs.ckpt")
    assert torch.equal(whole.pop("weights")["net.0.weight"], rest.pop("weights")["net.0.weight"])
    assert whole == rest


@pytest.mark.filterwarnings("ignore:(Experiment logs|Checkpoint) directory .* exists and is not empty")
def test_from_lightnings_own_checkpoint_it_would_not(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", "DataLoader")
    theirs = ModelCheckpoint(tmp_path / "part", filename="theirs", enable_version_counter=False)
    fit(tmp_path / "part", "DataLoader", theirs, KillAfter(17))
    rest = fit(tmp_path / "part", "DataLoader", theirs, ckpt_path=tmp_path / "part" / "theirs.ckpt")
    assert not torch.equal(whole["weights"]["net.0.weight"], rest["weights"]["net.0.weight"])


def test_without_a_stop_training_is_as_without_it(tmp_path: Path) -> None:
    with_it = fit(tmp_path / "with", "TinyLoader", LastCheckpoint(str(tmp_path / "with"), every_n_steps=1))
    without = fit(tmp_path / "without", "TinyLoader")
    assert with_it.pop("random") == without.pop("random")
    assert all(torch.equal(with_it["weights"][name], weights) for name, weights in without["weights"].items())


@pytest.mark.filterwarnings("ignore:(Experiment logs|Checkpoint) directory .* exists and is not empty")
def test_a_checkpoint_of_another_machine_goes_on_and_what_differs_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "last.ckpt"
    fit(tmp_path, "TinyLoader", LastCheckpoint(str(tmp_path)), KillAfter(12))
    checkpoint = torch.load(path, weights_only=True)
    (own,) = checkpoint["processes"]
    now = torch.cuda.device_count()
    more_gpus = {**own["random_states"], "torch.cuda": [torch.zeros(16, dtype=torch.uint8)] * (now + 2)}
    for processes, said in (
        ([own], ""),
        ([{**own, "random_states": more_gpus}], f"GPUs in sight: the run had {now + 2}, now {now}: "),
        ([own, own], "trainer.devices, num_nodes: the run had 2 processes, now 1: "),
        ([], "trainer.devices, num_nodes: the run had an unknown number of processes, now 1: "),
    ):
        torch.save({**checkpoint, "processes": processes}, path)
        caplog.clear()
        assert fit(tmp_path, "TinyLoader", LastCheckpoint(str(tmp_path)), ckpt_path=path)
        warned = [record.getMessage() for record in caplog.records if record.name.startswith("src.")]
        assert len(warned) == bool(said)
        assert all(message.startswith(f"not an exact continuation: {said}") for message in warned), warned


@pytest.mark.filterwarnings("ignore:(Experiment logs|Checkpoint) directory .* exists and is not empty")
def test_a_mean_that_is_not_logged_again_in_its_epoch_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "last.ckpt"
    fit(tmp_path, "TinyLoader", LastCheckpoint(str(tmp_path), every_n_steps=3), KillAfter(19))
    assert torch.load(path, weights_only=True)["global_step"] == 18
    checkpoint = torch.load(path, weights_only=True)
    (own,) = checkpoint["processes"]
    own["means"]["training_step.gone"] = own["means"]["training_step.train/rare"]
    torch.save(checkpoint, path)
    fit(tmp_path, "TinyLoader", LastCheckpoint(str(tmp_path)), ckpt_path=path)
    assert "training_step.gone: not logged since: the epoch's figure is missing" in caplog.text
    assert "train/rare" not in caplog.text
    assert "training_step.gone" not in torch.load(path, weights_only=True)["processes"][0]["means"]


class Rows(Dataset):
    """Rows that workers read, one by one."""

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return row, (row.sum() > 0).long()


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata asks torch for it
@pytest.mark.parametrize("estimates", [False, True])
def test_a_users_loader_with_workers_and_a_state_resumes_to_the_bit(estimates: bool, tmp_path: Path) -> None:
    class Module(UsersModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            if estimates:  # after which Lightning would forget the loader's state (Lightning#20550)
                assert self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    def fit(name: str, *callbacks: Callback, ckpt_path: Path | None = None) -> Path:
        pl.seed_everything(0, verbose=False)
        loader = StatefulDataLoader(Rows(), BATCH_SIZE, shuffle=True, num_workers=2)
        last = LastCheckpoint(str(tmp_path / name), every_n_steps=1)
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[last, *callbacks],
        )  # fmt: skip
        with suppress(Kill):
            trainer.fit(Module(), loader, ckpt_path=ckpt_path, weights_only=True)
        if iterator := loader._iterator:  # of a killed run: as garbage, each worker would be waited for five seconds
            iterator._shutdown_workers()
        return last.path

    whole = fit("whole")
    path = fit("killed", KillAfter(13))
    fit("killed", ckpt_path=path)
    states = [torch.load(each, weights_only=True)["state_dict"] for each in (whole, path)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Stream(IterableDataset):
    """Ten batches that only come one after the other; a batch is seen where it is trained on."""

    def __init__(self) -> None:
        self.position = self._first = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first, self._first = self._first, 0
        for index in range(first, 10):
            self.position = index + 1
            yield {"x": index + torch.rand(4, 1)}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._first = state["position"]


class Summed(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(float(batch["x"].sum()))
        return (self.weight * batch["x"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("kill_at", [4, 8, 9])
def test_what_was_fetched_ahead_of_a_loader_without_length_is_not_lost(kill_at: int, tmp_path: Path) -> None:
    def fit(name: str, *callbacks: Callback, ckpt_path: Path | None = None) -> list[float]:
        pl.seed_everything(0, verbose=False)
        last = LastCheckpoint(str(tmp_path / name), every_n_steps=1)
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[last, *callbacks], default_root_dir=tmp_path,
        )  # fmt: skip
        module = Summed()
        with suppress(Kill):
            trainer.fit(module, Stream(), ckpt_path=ckpt_path, weights_only=True)
        return module.seen

    whole = fit("whole")
    assert len(whole) == 20
    first = fit("killed", KillAfter(kill_at))
    path = tmp_path / "killed" / "last.ckpt"
    second = fit("killed", KillAfter(kill_at + 1), ckpt_path=path)
    assert first + second + fit("killed", ckpt_path=path) == whole
    assert_equal(
        *(torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "killed"))
    )


STEPS = 12  # an epoch of TinyData
KILL = f"+callbacks.kill={{_target_: {__name__}.KillAfter, steps: %d}}"


def run(folder: Path, *overrides: str) -> Path:
    """A run of the template, with curves and noise; a kill leaves it as it is."""
    common = ("logger=[tensorboard,csv]", "data.noise=0.1", "trainer.log_every_n_steps=1")
    with suppress(Kill):
        train(compose_tiny(folder, "test=false", *common, *overrides))
    return folder


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def interrupt(folder: Path, steps: int, *overrides: str) -> Path:
    """A run that is killed when some steps are done, and resumed."""
    run(folder, *overrides, KILL % steps)
    time.sleep(1 - time.time() % 1)  # TensorBoard reads files of one process and second in the order of 10 before 9
    return run(folder, *overrides, f"ckpt_path={last(folder)}")


RARELY = ("trainer.check_val_every_n_epoch=2", "trainer.max_epochs=5")
PLATEAU = ("scheduler=plateau", "scheduler.scheduler.patience=0", "+scheduler.strict=false", "optimizer.lr=0.1")


@pytest.mark.filterwarnings("ignore:(Experiment logs|Checkpoint) directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric val/loss")  # in the first epoch
def test_a_metric_of_an_earlier_epoch_is_there_after_a_resume(tmp_path: Path) -> None:
    settings = (*RARELY, *PLATEAU, "callbacks.last.every_n_steps=5")
    whole = run(tmp_path / "whole", *settings)
    assert_same_run(whole, interrupt(tmp_path / "killed", 4 * STEPS + 7, *settings))


@pytest.mark.parametrize("every", [3, 6])
def test_a_save_that_is_due_at_a_validated_step_is_made_up_for(every: int, tmp_path: Path) -> None:
    settings = ("trainer.max_epochs=1", "+trainer.val_check_interval=3", f"callbacks.last.every_n_steps={every}")
    folder = run(tmp_path, *settings, KILL % 9)
    assert load_checkpoint(last(folder))["global_step"] == 7


@pytest.mark.filterwarnings("ignore:(Experiment logs|Checkpoint) directory .* exists and is not empty")
def test_a_run_that_was_stopped_early_trains_on_if_it_is_made_longer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stops = ("callbacks=[minimal,early_stopping]", "callbacks.early_stopping.patience=2", "optimizer.lr=0")
    folder = run(tmp_path, *stops)
    assert load_checkpoint(last(folder))["epoch"] == 3
    run(folder, *stops, f"ckpt_path={last(folder)}")  # as one that was killed in its test
    assert load_checkpoint(last(folder))["epoch"] == 3
    run(folder, *stops, "trainer.max_epochs=20", f"ckpt_path={last(folder)}")
    assert load_checkpoint(last(folder))["epoch"] == 5
    assert "it had been stopped early; now it is to train longer" in caplog.text


def test_the_private_names_that_are_set_are_lightnings_and_torchmetrics() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    assert MeanMetric()._update_count == 0
