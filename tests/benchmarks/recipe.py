"""Lightning on MNIST the way that its tutorials write it: the peer called recipe.

torchvision's data set, a DataLoader with its defaults, torchmetrics, ``self.log`` in each step, a progress bar,
TensorBoard and ModelCheckpoint around the same net, without any of the measures that this template takes.
"""

import argparse
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, random_split
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms
from torchvision.datasets import MNIST

from src.models.lenet5 import LeNet5
from tests.benchmarks.clock import Clock


class Recipe(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = LeNet5(activation="relu")
        self.train_acc = MulticlassAccuracy(10, average="micro")
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.net(images)
        loss = F.cross_entropy(logits, labels)
        self.train_acc(logits, labels)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images)
        self.val_acc(logits, labels)
        self.log("val/loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val/acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=4e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("folder")
    parser.add_argument("stamps")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()

    steps = [transforms.ToTensor(), transforms.Normalize(0.1307, 0.3081), transforms.Pad(2)]
    digits = MNIST(arguments.root, train=True, transform=transforms.Compose(steps))
    train, val = random_split(digits, [len(digits) - len(digits) // 12, len(digits) // 12])
    trainer = pl.Trainer(
        accelerator="auto",
        max_epochs=arguments.epochs,
        logger=TensorBoardLogger(arguments.folder),
        callbacks=[RichProgressBar(), ModelCheckpoint(monitor="val/acc", mode="max"), Clock(arguments.stamps)],
    )
    trainer.fit(Recipe(), DataLoader(train, arguments.batch_size, shuffle=True), DataLoader(val, arguments.batch_size))


if __name__ == "__main__":
    main()
