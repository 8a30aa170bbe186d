"""1,797 digits of 8x8 pixels from scikit-learn, which need no download: put your data here."""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

SIZES = (1297, 250, 250)  # to train on, to validate on, to test on


class Digits(pl.LightningDataModule):
    """Batches of images, float (B, 1, 8, 8) from 0 to 1, and labels, int64 (B,).

    Args:
        batch_size: Images a batch.
        split_seed: Of the division into training, validation and test images.
    """

    def __init__(self, batch_size: int = 24, split_seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.split_seed = split_seed

    def setup(self, stage: str | None = None) -> None:
        """Read and divide the images."""
        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
        dataset = TensorDataset(images, torch.tensor(digits.target, dtype=torch.int64))
        self.splits = random_split(dataset, SIZES, torch.Generator().manual_seed(self.split_seed))

    def _load(self, split: Subset[tuple[Tensor, ...]], shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(split, self.batch_size, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches to train on."""
        return self._load(self.splits[0], shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches to validate on."""
        return self._load(self.splits[1])

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches to test on, once, after the training."""
        return self._load(self.splits[2])
