"""Batches by slicing tensors that live in memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


class BatchLoader:
    """Iterates over (images, labels) in batches, without worker processes or per-image Python.

    With ``shuffle`` the order of the images is a pure function of (``seed``, epoch); Lightning sets the epoch through
    ``set_epoch``, which it looks for at ``.sampler``. Epoch and position within it are the loader's state, so that a
    run resumed in mid-epoch sees exactly the batches that it has not seen yet.

    Of several processes, each takes its share of every batch: together they see each image once an epoch, in the
    batches that one process would see.

    Args:
        images: Images of any dtype, (N, ...), on any device.
        labels: Class of each image, (N,), on the same.
        batch_size: Images a batch over all processes, 1 or more; the last batch of an epoch may differ.
        shuffle: Whether to permute the images anew in every epoch.
        seed: Seed of the permutations, 0 or more.
        rank: Which of the processes this is, from 0.
        world_size: Number of processes.

    Raises:
        ValueError: If ``batch_size`` is below ``world_size``, there are fewer images than processes, or images and
            labels differ in number.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < world_size:
            raise ValueError(f"batch_size={batch_size}: expected {world_size} or more, one image a process")
        if len(images) < world_size:
            raise ValueError(f"{len(images)} images: expected {world_size} or more, one a process")
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images but {len(labels)} labels: expected one label an image")
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.position = 0  # batches handed out in this epoch
        self._resumed: dict[str, int] | None = None
        if shuffle:
            self.sampler = self  # where Lightning looks for set_epoch, and for a sign of shuffling
            self.batch_sampler = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        """Batches in an epoch, the same for each process; what would leave one without an image joins the last."""
        whole, left = divmod(len(self.images), self.batch_size)
        return whole + (left >= self.world_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (B, ...), labels (B,)), from the start unless this very epoch is being resumed."""
        resumed, self._resumed = self._resumed, None
        first = resumed["position"] if resumed and resumed["epoch"] == self.epoch else 0
        order = None
        if self.shuffle:  # here, not in set_epoch: Lightning sets the epoch after it asked for the iterator
            order = torch.randperm(len(self.images), generator=_generator(self.seed, self.epoch))
            order = order.to(self.images.device)  # drawn on the CPU: the same on all devices
        for index in range(first, len(self)):
            start = index * self.batch_size
            size = (len(self.images) if index + 1 == len(self) else start + self.batch_size) - start
            mine = slice(*(start + size * rank // self.world_size for rank in (self.rank, self.rank + 1)))
            self.position = index + 1
            if order is None:
                yield self.images[mine], self.labels[mine]
            else:  # index_select copies whole images: several times as fast as images[order[mine]]
                yield self.images.index_select(0, order[mine]), self.labels.index_select(0, order[mine])

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches handed out in it."""
        return dict(self._resumed or {"epoch": self.epoch, "position": self.position})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration over the saved epoch continue behind the batches that it had handed out."""
        self._resumed = dict(state)


def _generator(seed: int, epoch: int) -> torch.Generator:
    """An independent stream for each pair: with seed + epoch, neighbouring seeds would share most of their orders."""
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
