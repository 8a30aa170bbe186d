"""Several labels a sample, weights for rare ones, and two validation loaders: metrics get the loader's index."""

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MultilabelF1Score

NUM_LABELS = 3


class Tagger(pl.LightningModule):
    """Says which of three labels a row has; any number of them."""

    def __init__(self, net: nn.Module, loss: nn.Module, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net", "loss"])
        self.net = net
        self.loss = loss
        self.f1 = nn.ModuleList(MultilabelF1Score(NUM_LABELS) for _ in range(2))  # of each loader

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._measure("val", batch, dataloader_idx)

    def test_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._measure("test", batch, dataloader_idx)

    def _measure(self, split: str, batch: list[Tensor], dataloader_idx: int) -> None:
        logits = self(batch[0])
        self.f1[dataloader_idx](logits, batch[1])
        self.log(f"{split}/loss", self.loss(logits, batch[1]))
        self.log(f"{split}/f1", self.f1[dataloader_idx])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.hparams.lr)


class Tags(pl.LightningDataModule):
    """Rows (4,) whose first three numbers say which labels they have; validated and tested as drawn and shifted."""

    def __init__(self, num_rows: int = 240, batch_size: int = 20) -> None:
        super().__init__()
        self.num_rows, self.batch_size = num_rows, batch_size

    def _make_loader(self, num_rows: int, drawn_by: int, shift: float = 0.0, shuffle: bool = False) -> DataLoader:
        rows = torch.randn(num_rows, 4, generator=torch.Generator().manual_seed(drawn_by)) + shift
        labels = (rows[:, :NUM_LABELS] > torch.tensor([0.0, 0.5, 1.0])).float()
        return DataLoader(TensorDataset(rows, labels), self.batch_size, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader:
        return self._make_loader(self.num_rows, 0, shuffle=True)

    def val_dataloader(self) -> list[DataLoader]:
        return [self._make_loader(self.num_rows // 4, 1, shift) for shift in (0.0, 0.5)]

    def test_dataloader(self) -> list[DataLoader]:
        return [self._make_loader(self.num_rows // 4, 2, shift) for shift in (0.0, 0.5)]
