"""Modules of users' own for the callbacks: small classifiers of images, and what is none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

NUM_CLASSES = 5


def make_images(num: int, drawn_by: int) -> TensorDataset:
    """Noise, (1, 12, 12), with a bright row whose place tells the class in most of them."""
    rng = torch.Generator().manual_seed(drawn_by)
    images, labels = torch.randn(num, 1, 12, 12, generator=rng), torch.arange(num) % NUM_CLASSES
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * int(label)] += 1.5
    return TensorDataset(images, labels)


class Plain(pl.LightningModule):
    """Trains a layer, and has and says nothing that could be drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(144, NUM_CLASSES)

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.layer(batch[0].flatten(1)), batch[1]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(*self.predict(batch))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Classifier(Plain):
    """With a ``net``, whose logits validation returns; it logs ``val/acc`` and counts what is taken for what."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        del self.layer
        self.net = net or nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(100, 16),
            nn.Tanh(),
            nn.Linear(16, 5),
        )

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.net(batch[0]), batch[1]

    def on_validation_epoch_start(self) -> None:
        self.confusion = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        logits, labels = self.predict(batch)
        self.log("val/acc", (logits.argmax(dim=1) == labels).float().mean(), batch_size=len(labels))
        for label, prediction in zip(labels, logits.argmax(dim=1), strict=True):
            self.confusion[label, prediction] += 1
        return logits


def make_trainer(folder: Path, callbacks: Sequence[pl.Callback], **arguments: Any) -> pl.Trainer:
    """A trainer of one epoch that writes to TensorBoard only."""
    common: dict[str, Any] = {
        "max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, "enable_model_summary": False,
        "enable_progress_bar": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1, "callbacks": list(callbacks),
        "logger": TensorBoardLogger(str(folder), name="", version=""), "default_root_dir": folder,
    }  # fmt: skip
    return pl.Trainer(**(common | arguments))


def read(folder: Path) -> EventAccumulator:
    """All that TensorBoard has in a folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0, "histograms": 0})
    return events.Reload()
