"""The conventions of lightning-hydra-template: hyper-parameters throughout, partials nested in the model's node.

``self.hparams`` holds all that the constructor takes: the net, and the functions that make optimizer and scheduler.
"""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy

NUM_CLASSES = 3


class DenseNet(nn.Module):
    """Maps points (B, 2) to logits (B, 3)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(2, hidden_size), nn.BatchNorm1d(hidden_size), nn.ReLU(), nn.Linear(hidden_size, NUM_CLASSES)
        )

    def forward(self, points: Tensor) -> Tensor:
        return self.model(points)


class ClustersLitModule(LightningModule):
    """Tells to which cluster a point belongs."""

    def __init__(self, net: nn.Module, optimizer: Any, scheduler: Any, compile: bool) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc, self.val_acc, self.test_acc = (MulticlassAccuracy(NUM_CLASSES) for _ in range(3))
        self.train_loss, self.val_loss, self.test_loss = MeanMetric(), MeanMetric(), MeanMetric()
        self.val_acc_best = MaxMetric()

    def forward(self, points: Tensor) -> Tensor:
        return self.net(points)

    def on_train_start(self) -> None:
        self.val_loss.reset()  # what the sanity check has left
        self.val_acc.reset()
        self.val_acc_best.reset()

    def model_step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        points, labels = batch
        logits = self(points)
        return self.criterion(logits, labels), logits.argmax(dim=1), labels

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss, predictions, labels = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(predictions, labels)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss, predictions, labels = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(predictions, labels)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss, predictions, labels = self.model_step(batch)
        self.test_loss(loss)
        self.test_acc(predictions, labels)
        self.log("test/loss", self.test_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("test/acc", self.test_acc, on_step=False, on_epoch=True, prog_bar=True)

    def setup(self, stage: str) -> None:
        if self.hparams.compile and stage == "fit":
            self.net = torch.compile(self.net)

    def configure_optimizers(self) -> Any:
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        if self.hparams.scheduler is None:
            return {"optimizer": optimizer}
        scheduler = self.hparams.scheduler(optimizer=optimizer)
        plan = {"scheduler": scheduler, "monitor": "val/loss", "interval": "epoch", "frequency": 1}
        return {"optimizer": optimizer, "lr_scheduler": plan}


class ClustersDataModule(LightningDataModule):
    """Points around three centres in the plane."""

    def __init__(
        self,
        data_dir: str = "data/",
        train_val_test_split: tuple[int, int, int] = (240, 60, 60),
        batch_size: int = 20,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.data_train: Dataset | None = None
        self.data_val: Dataset | None = None
        self.data_test: Dataset | None = None
        self.batch_size_per_device = batch_size

    @property
    def file(self) -> Path:
        return Path(self.hparams.data_dir, "clusters.pt")

    def prepare_data(self) -> None:
        if not self.file.exists():
            labels = torch.arange(sum(self.hparams.train_val_test_split)) % NUM_CLASSES
            angles = labels * 2 * torch.pi / NUM_CLASSES
            noise = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(1))
            self.file.parent.mkdir(parents=True, exist_ok=True)
            torch.save((torch.stack([angles.cos(), angles.sin()], dim=1) + 0.5 * noise, labels), self.file)

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:
            if self.hparams.batch_size % self.trainer.world_size != 0:
                raise RuntimeError(f"{self.trainer.world_size} devices cannot share {self.hparams.batch_size} samples")
            self.batch_size_per_device = self.hparams.batch_size // self.trainer.world_size
        if self.data_train is None:
            self.data_train, self.data_val, self.data_test = random_split(
                TensorDataset(*torch.load(self.file)),
                self.hparams.train_val_test_split,
                generator=torch.Generator().manual_seed(42),
            )

    def _make_loader(self, dataset: Any, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size_per_device,
            num_workers=self.hparams.num_workers,
            pin_memory=self.hparams.pin_memory,
            shuffle=shuffle,
        )

    def train_dataloader(self) -> DataLoader:
        return self._make_loader(self.data_train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._make_loader(self.data_val)

    def test_dataloader(self) -> DataLoader:
        return self._make_loader(self.data_test)
