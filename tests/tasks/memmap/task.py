"""200,000 rows in a file that is mapped into memory, read by two workers, for two processes (``trainer=ddp_cpu``)."""

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics.classification import BinaryAccuracy

NUM_FEATURES = 8


class RowClassifier(pl.LightningModule):
    """Tells whether a row's numbers are positive on the whole."""

    def __init__(self, num_hidden: int = 16, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(NUM_FEATURES, num_hidden), nn.ReLU(), nn.Linear(num_hidden, 1))
        self.train_acc, self.val_acc, self.test_acc = (BinaryAccuracy() for _ in range(3))

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows).squeeze(1)

    def _measure(self, split: str, batch: list[Tensor]) -> Tensor:
        logits = self(batch[0])
        loss = F.binary_cross_entropy_with_logits(logits, batch[1])
        accuracy = getattr(self, f"{split}_acc")
        accuracy(logits.sigmoid(), batch[1])
        self.log(f"{split}/loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log(f"{split}/acc", accuracy, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self._measure("train", batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._measure("val", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._measure("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.hparams.lr)


class MappedRows(Dataset):
    """The rows of a .npy file, read as they are asked for; each process maps it for itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = np.load(path, mmap_mode="r")  # (N, 8) float32

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        row = torch.from_numpy(self.rows[number].copy())
        return row, (row.sum() > 0).float()


class MappedData(pl.LightningDataModule):
    """Writes the file where it is missing; the last tenth is to validate and to test on."""

    def __init__(self, data_dir: str, num_rows: int = 200_000, batch_size: int = 500, num_workers: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.path = Path(data_dir, f"rows-{num_rows}.npy")

    def prepare_data(self) -> None:
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            shape = (self.hparams.num_rows, NUM_FEATURES)
            np.save(self.path, np.random.default_rng(0).standard_normal(shape, dtype=np.float32))

    def _make_loader(self, first: float, last: float, shuffle: bool = False) -> DataLoader:
        num_rows, num_workers = self.hparams.num_rows, self.hparams.num_workers
        rows = Subset(MappedRows(self.path), range(int(first * num_rows), int(last * num_rows)))
        return DataLoader(rows, self.hparams.batch_size, shuffle=shuffle, num_workers=num_workers)

    def train_dataloader(self) -> DataLoader:
        return self._make_loader(0.0, 0.9, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._make_loader(0.9, 0.95)

    def test_dataloader(self) -> DataLoader:
        return self._make_loader(0.95, 1.0)
