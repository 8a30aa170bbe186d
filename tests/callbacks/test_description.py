"""What TensorBoard says of a run in words, and which curves it draws together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from src.callbacks.description import Description
from tests.callbacks.tasks import Classifier, Plain, make_images, make_trainer, read

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


class Data(pl.LightningDataModule):
    """A user's data module, whose state is more than plain values."""

    def train_dataloader(self) -> Any:
        return DataLoader(make_images(24, drawn_by=0), 8)

    def val_dataloader(self) -> Any:
        return DataLoader(make_images(24, drawn_by=1), 8)

    def state_dict(self) -> dict[str, Any]:
        plain: dict[Any, Any] = {"source": "drawn", "mean": np.float64(0.5), ("a", 1): "key"}
        return plain | {"nested": [{"a": torch.ones(1)}, 2], "weights": torch.ones(3), "loader": {"position": 3}}


def fit(folder: Path, module: pl.LightningModule, data: Any = None, **arguments: Any) -> Any:
    """Train; what TensorBoard then has."""
    loader = None if data else DataLoader(make_images(24, drawn_by=0), 8)
    trainer = make_trainer(folder, [Description()], **arguments)
    trainer.fit(module, datamodule=data) if data else trainer.fit(module, loader, loader)
    return read(folder)


def text(events: Any, tag: str) -> Any:
    (event,) = events.Tensors(f"{tag}/text_summary")
    return yaml.safe_load(event.tensor_proto.string_val[0].decode())


def test_the_config_is_the_runs_record_and_not_the_modules_hyper_parameters(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optimizer: {lr: 0.1}\nseed: 3\n")
    module = Classifier()
    module.save_hyperparameters({"width": 7})
    assert text(fit(tmp_path, module), "config") == {"optimizer": {"lr": 0.1}, "seed": 3}


def test_what_has_no_words_in_the_data_is_named_by_its_type(tmp_path: Path) -> None:
    events = fit(tmp_path, Classifier(), Data())
    assert text(events, "data") == {
        "source": "drawn", "mean": 0.5, "nested": [{"a": "(Tensor)"}, 2], "weights": "(Tensor)",
    }  # fmt: skip


def test_without_a_record_and_a_data_module_there_are_no_words(tmp_path: Path) -> None:
    assert fit(tmp_path, Plain()).Tags()["tensors"] == []


class Regressor(Classifier):
    """Logs pairs of several styles, and what has no partner."""

    def on_validation_epoch_start(self) -> None:
        """Count nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train/rmse", 1.0, on_step=True, on_epoch=True)
        self.log("train/only", 1.0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log_dict({"val/rmse": 1.0, "val_loss": 1.0, "val/only_here": 1.0})

    def on_train_epoch_end(self) -> None:
        self.log("train_loss", 1.0)


@pytest.mark.parametrize("max_epochs", [1, 3])
def test_training_and_validation_share_a_chart_of_each_metric_that_both_have(max_epochs: int, tmp_path: Path) -> None:
    (event,) = fit(tmp_path, Regressor(), max_epochs=max_epochs).Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for group in layout.category for chart in group.chart}
    assert charts == {"rmse": ["train/rmse", "val/rmse"], "loss": ["train_loss", "val_loss"]}


class Dice(pl.Callback):
    """Notes the random state at the start of the training."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.state = torch.get_rng_state()


class WithDropout(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 5)))
        self.example_input_array = torch.zeros(1, 1, 12, 12)

    def forward(self, images: Tensor) -> Tensor:
        return F.dropout(self.net(images), training=True)  # in evaluation, too


def test_a_module_with_an_example_has_a_graph_that_costs_no_random_numbers(tmp_path: Path) -> None:
    before, after = Dice(), Dice()
    loader = DataLoader(make_images(24, drawn_by=0), 8)
    make_trainer(tmp_path, [before, Description(), after]).fit(WithDropout(), loader, loader)
    assert "Linear" in str(read(tmp_path).Graph())
    assert torch.equal(before.state, after.state)


class Untraceable(nn.Module):
    """A net that torch.jit.trace cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(144, 5)

    def forward(self, images: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise RuntimeError("not to be traced")
        logits: Tensor = self.layer(images.flatten(start_dim=1))
        return logits


class OfUntraceable(Classifier):
    def __init__(self) -> None:
        super().__init__(Untraceable())
        self.example_input_array = torch.zeros(1, 1, 12, 12)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


def test_a_net_without_a_graph_is_trained_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = OfUntraceable()
    fit(tmp_path, module)
    assert module.global_step == 3
    assert "no graph in TensorBoard: " in caplog.text
    assert "not to be traced" in caplog.text
