"""Batches by slicing tensors that live in memory."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor


class BatchLoader:
    """Iterates over (images, labels) in batches, without worker processes or per-image Python.

    With ``shuffle`` the order of the images is a pure function of (``seed``, epoch); Lightning sets the epoch through
    ``set_epoch``, which it looks for at ``.batch_sampler.sampler``. The loader's state is the epoch and how many of its
    images have been handed out, so that a run resumed within an epoch sees exactly those that it has not seen yet, with
    another batch size and in another number of processes, too.

    Of several processes, each takes its share of every batch: together they see each image once an epoch, in the
    batches that one process would see. Where a batch cannot be divided evenly the shares differ by one image, and
    ``share`` says by what to multiply a process's mean loss.

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
        check_minimum("seed", seed, 0)
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
        self.batch_sampler = SimpleNamespace(sampler=self)  # where Lightning looks for set_epoch
        self.epoch = 0
        self._begin()

    def _begin(self) -> None:
        self.batches_done = 0  # of this epoch, those before a resume included: the index of the next one
        self._first, self._seen = 0, 0  # the batch at which an epoch resumes, and the images seen before
        self._is_resumed = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._begin()

    def __len__(self) -> int:
        """Batches in an epoch, the same for each process; what would leave one without an image joins the last."""
        return self._count_batches(len(self.images))

    def _count_batches(self, num_images: int) -> int:
        whole, left = divmod(num_images, self.batch_size)
        return whole + (left >= self.world_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (B, ...), labels (B,)), from the start unless this very epoch is being resumed."""
        if not self._is_resumed:  # here, not where Lightning asks for the iterator: it sets the epoch after that
            self._begin()
        self._is_resumed = False
        order = None
        if self.shuffle:
            order = torch.randperm(len(self.images), generator=_generator(self.seed, self.epoch))
            order = order.to(self.images.device)  # drawn on the CPU: the same on all devices
        for index in range(self._first, len(self)):
            mine = self._slice(index)
            self.batches_done = index + 1
            if order is None:
                yield self.images[mine], self.labels[mine]
            else:  # index_select copies whole images: several times as fast as images[order[mine]]
                yield self.images.index_select(0, order[mine]), self.labels.index_select(0, order[mine])

    def share(self, batch_idx: int) -> float:
        """This process's images of a batch times the number of processes, by the batch's images.

        A mean loss times this, averaged over the processes, is the mean over the whole batch. It is 1.0 where the
        shares are even.

        Args:
            batch_idx: Index of the batch in its epoch, as ``training_step`` is given it.
        """
        mine = self._slice(batch_idx)
        size: int = mine.stop - mine.start
        return size * self.world_size / (self._start(batch_idx + 1) - self._start(batch_idx))

    def _slice(self, index: int) -> slice:
        """Where this process's images of a batch lie in the epoch's order."""
        start, stop = self._start(index), self._start(index + 1)
        return slice(*(start + (stop - start) * rank // self.world_size for rank in (self.rank, self.rank + 1)))

    def _start(self, index: int) -> int:
        """How many of the epoch's images come before a batch."""
        return len(self.images) if index >= len(self) else self._seen + (index - self._first) * self.batch_size

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of its images that have been handed out, to all processes together."""
        return {"epoch": self.epoch, "images": self._start(self.batches_done)}

    def rewind(self, num_batches: int) -> None:
        """Count only so many batches of this epoch as handed out; the others come again after ``load_state_dict``."""
        self.batches_done = num_batches

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration over the saved epoch continue after the images that it had handed out.

        Args:
            state: What ``state_dict`` returned. Release 0.1.0 counted batches (``position``) instead of images; they
                are taken for batches of today's size.
        """
        images = state["images"] if "images" in state else state["position"] * self.batch_size
        self.epoch, self._seen = state["epoch"], min(images, len(self.images))
        # Indices are counted from the epoch's end, so that its last batch has the same one as ever.
        self._first = self.batches_done = len(self) - self._count_batches(len(self.images) - self._seen)
        self._is_resumed = True


def check_minimum(name: str, value: float, minimum: int) -> None:
    """Refuse a value below the minimum.

    Raises:
        ValueError: It names the argument.
    """
    if value < minimum:
        raise ValueError(f"{name}={value}: expected a whole number of {minimum} or more")


def _generator(seed: int, epoch: int) -> torch.Generator:
    """An independent stream for each pair: with seed + epoch, neighbouring seeds would share most of their orders."""
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
