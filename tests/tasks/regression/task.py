"""Regression on rows: batches are dictionaries, the module makes its own optimizer, metrics are named ``val_loss``."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]  # features (B, num_features), target (B,)


class Regressor(pl.LightningModule):
    """Predicts a number for a row of numbers."""

    def __init__(self, num_features: int, num_hidden: int = 32, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(num_features, num_hidden), nn.GELU(), nn.Linear(num_hidden, 1))
        self.example_input_array = torch.zeros(2, num_features)  # what src.export traces: batches are dictionaries

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).squeeze(1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._measure("train", batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        return {"row": batch["row"], "predicted": self(batch["features"])}

    def _measure(self, stage: str, batch: Batch) -> Tensor:
        predicted = self(batch["features"])
        loss = F.mse_loss(predicted, batch["target"])
        values = {f"{stage}_loss": loss, f"{stage}_mae": F.l1_loss(predicted, batch["target"])}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(predicted))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class Rows(Dataset):
    """Rows whose target is a curved function of the features, with noise."""

    def __init__(self, num_rows: int, num_features: int, drawn_by: int) -> None:
        rng = torch.Generator().manual_seed(drawn_by)
        self.features = torch.randn(num_rows, num_features, generator=rng)
        self.target = self.features.sum(dim=1).tanh() + 0.1 * torch.randn(num_rows, generator=rng)

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"row": row, "features": self.features[row], "target": self.target[row]}


class RowsData(pl.LightningDataModule):
    """Rows to train on, and a quarter of that to validate, to test and to predict on."""

    def __init__(self, num_rows: int, num_features: int, batch_size: int = 20) -> None:
        super().__init__()
        self.save_hyperparameters()

    def _make_loader(self, num_rows: int, drawn_by: int, shuffle: bool = False) -> DataLoader:
        rows = Rows(num_rows, self.hparams.num_features, drawn_by)
        return DataLoader(rows, batch_size=self.hparams.batch_size, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader:
        return self._make_loader(self.hparams.num_rows, 0, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._make_loader(self.hparams.num_rows // 4, 1)

    def test_dataloader(self) -> DataLoader:
        return self._make_loader(self.hparams.num_rows // 4, 2)

    predict_dataloader = test_dataloader
