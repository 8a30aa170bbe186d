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
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.shuffle, self.seed, self.rank, self.world_size = shuffle, seed, rank, world_size
        self.batch_sampler = SimpleNamespace(sampler=self)  # where Lightning looks for set_epoch
        self.epoch = 0
        self._is_resumed = False
        self._begin(0)

    def _begin(self, num_seen: int) -> None:
        """Divide what is left of an epoch into batches; what would leave a process without an image joins the last."""
        starts = list(range(num_seen, len(self.images), self.batch_size))
        if starts and len(self.images) - starts[-1] < self.world_size:
            starts.pop()
        self._bounds = [*starts, len(self.images)]  # where the batches that are left begin and end
        self.batches_done = self._first = len(self) - len(starts)  # counted from the whole epoch's end, as ever

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration."""
        if epoch != self.epoch:
            self.epoch, self._is_resumed = epoch, False
            self._begin(0)

    def __len__(self) -> int:
        """Batches in an epoch, the same for each process."""
        whole, left = divmod(len(self.images), self.batch_size)
        return whole + (left >= self.world_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (B, ...), labels (B,)), from the start unless this very epoch is being resumed."""
        if not self._is_resumed:  # here, not where Lightning asks for the iterator: it sets the epoch after that
            self._begin(0)
        self._is_resumed = False
        order = None
        if self.shuffle:
            # A stream for each pair: by seed + epoch, neighbouring seeds would share most of their orders.
            state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
            order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(int(state[0])))
            order = order.to(self.images.device)  # drawn on the CPU: the same on all devices
        for index in range(self._first, len(self)):
            mine = self._slice(index)
            self.batches_done = index + 1
            if order is None:
                yield self.images[mine], self.labels[mine]
            else:  # index_select copies whole images: several times as fast as images[order[mine]]
                yield self.images.index_select(0, order[mine]), self.labels.index_select(0, order[mine])

    def _slice(self, index: int) -> slice:
        """Where this process's images of a batch lie in the epoch's order."""
        start, stop = self._bounds[index - self._first : index - self._first + 2]
        return slice(*(start + (stop - start) * rank // self.world_size for rank in (self.rank, self.rank + 1)))

    def share(self, batch_idx: int) -> float:
        """This process's images of a batch times the number of processes, by the batch's images.

        A mean loss times this, averaged over the processes, is the mean over the whole batch. It is 1.0 where the
        shares are even.

        Args:
            batch_idx: Index of the batch in its epoch, as ``training_step`` is given it.
        """
        start, stop = self._bounds[batch_idx - self._first : batch_idx - self._first + 2]
        mine = self._slice(batch_idx)
        size: int = mine.stop - mine.start
        return size * self.world_size / (stop - start)

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of its images that have been handed out, to all processes together."""
        return {"epoch": self.epoch, "images": self._bounds[self.batches_done - self._first]}

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
        self.epoch, self._is_resumed = state["epoch"], True
        self._begin(min(images, len(self.images)))


def check_minimum(name: str, value: float, minimum: int) -> None:
    """Refuse a value below the minimum.

    Raises:
        ValueError: It names the argument.
    """
    if value < minimum:
        raise ValueError(f"{name}={value}: expected a whole number of {minimum} or more")
