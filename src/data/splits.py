"""Which images train, validate and test, and what is measured on them."""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from src.data.sources import Digits
from src.engine.errors import DataError

NUM_TRAIN, NUM_VAL = 4000, 500  # of the package's 5,000 digits; the rest is to test on


def split_files(train: Digits, test: Digits, val_size: int, seed: int) -> dict[str, Digits]:
    """Cut validation images off the official training images; the official test images are those to test on.

    Args:
        train: The training files.
        test: The test files.
        val_size: Images to validate on.
        seed: Decides which.

    Raises:
        DataError: If none would be left to train on.
    """
    num_train = len(train.labels) - val_size
    if num_train < 1:
        raise DataError(f"val_size={val_size}: expected 1 to {len(train.labels) - 1}")
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    return {"train": take(train, order[:num_train]), "val": take(train, order[num_train:]), "test": test}


def split_package(digits: Digits, seed: int) -> dict[str, Digits]:
    """Divide the package's digits, as many of each class: class after class in turn, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    of_class = [(digits.labels == label).nonzero().squeeze(1) for label in range(10)]
    order = torch.stack([each[torch.randperm(len(each), generator=generator)] for each in of_class], dim=1).flatten()
    parts = order.tensor_split([NUM_TRAIN, NUM_TRAIN + NUM_VAL])
    return {split: take(digits, part) for split, part in zip(("train", "val", "test"), parts, strict=True)}


def take(digits: Digits, indices: Tensor) -> Digits:
    """Those of some indices, (M,)."""
    return Digits(digits.images[indices], digits.labels[indices])


def take_share(digits: Digits, size: int, seed: int) -> Digits:
    """So many of them, of each class its share; the seed decides which.

    Raises:
        DataError: If there are not as many.
    """
    num = len(digits.labels)
    if size > num:
        raise DataError(f"train_size={size}: expected 1 to {num}, or null for all")
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    place = torch.zeros(num, dtype=torch.float64)  # of each image among those of its class, in 0..1
    for label in digits.labels.unique():
        of_class = order[digits.labels[order] == label]
        place[of_class] = (torch.arange(len(of_class), dtype=torch.float64) + 0.5) / len(of_class)
    return take(digits, order[place[order].argsort(stable=True)][:size])


def measure(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of (N, H, W) or (N, C, H, W), of bytes in 0..1."""
    unit = 255 if images.dtype == torch.uint8 else 1
    sums = torch.zeros(())
    for part in (images if images.dim() > 3 else images.unsqueeze(1)).split(1000):
        values = part.double() / unit
        sums = sums + torch.stack([values.sum(dim=(0, 2, 3)), values.square().sum(dim=(0, 2, 3))])  # (2, C)
    mean, square = sums / (len(images) * images.shape[-1] * images.shape[-2])
    std = (square - mean**2).clamp(min=0).sqrt()
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()


def make_fingerprint(splits: Mapping[str, Digits]) -> str:
    """A checksum of the splits, against accidents: the same for the same images, labels and order, whatever files."""
    crc = 0
    for split, digits in splits.items():
        crc = zlib.crc32(f"{split} {len(digits.labels)}".encode(), crc)
        for part in digits:
            crc = zlib.crc32(part.numpy().data, crc)
    return f"crc32:{crc:08x}"
