"""Lightning's own barebones Trainer around the loop of ``bare.py``: the floor of any template on Lightning.

No logger, checkpoint, progress bar or sanity check, and nothing is logged: what remains beside bare is Lightning's
loop. It prints what ``bare.py`` prints.
"""

import argparse
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from src.data.mnist import MNISTDataModule, preprocess
from src.models.lenet5 import LeNet5
from tests.benchmarks.clock import get_peak


class Batches:
    """Slices of a split in memory, shuffled where it is trained on."""

    def __init__(self, split: Any, batch_size: int, num_batches: int, is_shuffled: bool) -> None:
        self.split, self.batch_size, self.num_batches, self.is_shuffled = split, batch_size, num_batches, is_shuffled

    def __len__(self) -> int:
        return min(self.num_batches, -(-len(self.split.labels) // self.batch_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = (torch.randperm if self.is_shuffled else torch.arange)(len(self.split.labels))
        for indices in order.split(self.batch_size)[: len(self)]:
            yield preprocess(self.split.images[indices]), self.split.labels[indices]


class Bare(pl.LightningModule):
    """The loop's body."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LeNet5(activation="relu").to(memory_format=torch.channels_last)
        self.correct = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == 1:
            print("step", time.time(), flush=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.correct += int((self.net(batch[0]).argmax(dim=1) == batch[1]).sum())

    def on_train_epoch_end(self) -> None:  # after the validation
        print("epoch", time.time(), self.correct, flush=True)
        self.correct = 0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=4e-3, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--source", default="files")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=10**9)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")

    data = MNISTDataModule(arguments.root, source=arguments.source)
    data.setup()
    train = Batches(data.splits["train"], arguments.batch_size, arguments.batches, is_shuffled=True)
    trainer = pl.Trainer(accelerator="cpu", barebones=True, max_epochs=arguments.epochs)
    trainer.fit(Bare(), train, Batches(data.splits["val"], 250, 10**9, is_shuffled=False))
    print("peak", get_peak())


if __name__ == "__main__":
    main()
