"""Colour images in folders, a folder a class, as a LightningDataModule."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms.v2 import functional

from src.data.loader import BatchLoader, check_minimum
from src.engine.errors import DataError

Transform = Callable[[Tensor], Tensor]


class Views(Dataset):
    """Images by (epoch, index); what a transform draws is a function of the seed and these, whichever worker it is.

    Args:
        folder: The images of a split.
        transform: Maps uint8 (3, H, W) to uint8 of one size.
        seed: Seed of what it draws; None: it draws nothing.
    """

    def __init__(self, folder: ImageFolder, transform: Transform, seed: int | None) -> None:
        self.folder, self.transform, self.seed = folder, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """The image, uint8 (3, H, W), and its class."""
        path, label = self.folder.samples[key[1]]
        image = functional.pil_to_tensor(default_loader(path))
        if self.seed is None:
            return self.transform(image), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence((self.seed, *key)).generate_state(1, np.uint64)[0]))
            return self.transform(image), label


class ViewLoader(BatchLoader):
    """Batches that workers make, in the order and with the state of ``BatchLoader``.

    Args:
        views: What they make them of.
        batch_size: Images a batch over all processes, 1 or more.
        num_workers: Processes that read images; 0: this one does.
        arguments: Further ones of ``BatchLoader``.
    """

    def __init__(self, views: Views, batch_size: int, num_workers: int, **arguments: Any) -> None:
        labels = torch.tensor(views.folder.targets)
        super().__init__(torch.arange(len(labels)), labels, batch_size, **arguments)
        self._batches: list[list[tuple[int, int]]] = []  # of an epoch, those that are left
        self._loader = DataLoader(
            views,
            batch_sampler=self._batches,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else a seed for the workers is drawn from the run's random numbers
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images uint8 (B, 3, H, W), labels (B,)), from the start unless this very epoch is being resumed."""
        self._batches[:] = [[(self.epoch, int(index)) for index in indices] for indices, _ in super().__iter__()]
        self.batches_done = len(self) - len(self._batches)
        for images, labels in self._loader:
            self.batches_done += 1
            yield images, labels


class ImageFolderDataModule(pl.LightningDataModule):
    """Images as torchvision's ImageFolder has them: ``<root>/train/<class>/<any name>.jpg``, also ``val`` and ``test``.

    The loaders yield uint8 (B, 3, size, size); on the device they become float of mean 0 and standard deviation 1.

    Args:
        root: The folder.
        train_transform: Maps an image, uint8 (3, H, W), to one of ``size``; what it draws, it draws by torch.
        eval_transform: The same without drawing, of validation, test and prediction.
        mean: Of each channel, in 0..1.
        std: The same of the standard deviation.
        batch_size: Images a training batch over all processes, 1 or more.
        eval_batch_size: The same of validation and test.
        num_workers: Processes that read images, of each loader; 0: the run's own process reads them.
        batch_transform: Changes a batch to train on, (images, labels), as torchvision's MixUp does.
        seed: Seed of the batches' order and of what the transforms draw, 0 or more.

    Attributes:
        classes: Their names, in the order of their numbers; after ``setup``.
    """

    def __init__(
        self,
        root: str,
        train_transform: Transform,
        eval_transform: Transform,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        batch_size: int = 64,
        eval_batch_size: int = 64,
        num_workers: int = 2,
        batch_transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_minimum("batch_size", batch_size, 1)
        self.root = Path(root)
        self.transforms = {"train": train_transform, "val": eval_transform, "test": eval_transform}
        self.mean, self.std = list(mean), list(std)
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.batch_transform, self.seed = batch_transform, seed
        self.splits: dict[str, ImageFolder] = {}
        self.classes: list[str] = []

    def setup(self, stage: str | None = None) -> None:
        """List the files of the splits that are there.

        Raises:
            DataError: If there are no images to train on, or a split has other classes.
        """
        for split in self.transforms:
            if split != "train" and not (self.root / split).is_dir():
                continue
            try:
                folder = self.splits[split] = ImageFolder(str(self.root / split))
            except FileNotFoundError as error:
                reason = str(error).split(". Supported")[0]
                raise DataError(f"data.root={self.root}: expected {split}/<class>/<image>; {reason}") from error
            self.classes = self.classes or folder.classes
            if folder.classes != self.classes:
                there = ", ".join(folder.classes)
                raise DataError(f"data.root={self.root}: {split} has other classes than train: {there}")

    def train_dataloader(self) -> ViewLoader:
        """Batches of the training split, in a new order each epoch (in none under ``trainer.overfit_batches``)."""
        shuffle = not (self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]
        return self._make_loader("train", self.batch_size, shuffle)

    def val_dataloader(self) -> ViewLoader:
        """Batches of the validation split."""
        return self._make_loader("val", self.eval_batch_size)

    def test_dataloader(self) -> ViewLoader:
        """Batches of the test split."""
        return self._make_loader("test", self.eval_batch_size)

    def _make_loader(self, split: str, batch_size: int, shuffle: bool = False) -> ViewLoader:
        if split not in self.splits:
            raise DataError(f"data.root={self.root}: no folder {split}; make one, or set test=false")
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        views = Views(self.splits[split], self.transforms[split], self.seed if split == "train" else None)
        return ViewLoader(
            views, batch_size, self.num_workers, shuffle=shuffle, seed=self.seed, rank=rank, world_size=world_size
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn uint8 (B, 3, H, W) into the net's input, float of the same shape, on the device."""
        if isinstance(batch, Tensor):  # the module's example_input_array, a net's input already
            return batch
        images, labels = batch
        images = functional.normalize(functional.to_dtype(images, torch.float32, scale=True), self.mean, self.std)
        if self.batch_transform and self.trainer and self.trainer.training:
            return self.batch_transform(images, labels)
        return images, labels

    def read_images(self, path: Path) -> NDArray[np.uint8]:
        """Read an image file as the loaders would yield it: uint8 (1, 3, H, W)."""
        image = self.transforms["test"](functional.pil_to_tensor(default_loader(str(path))))
        images: NDArray[np.uint8] = image.unsqueeze(0).numpy()
        return images

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the images."""
        num_images = {split: len(folder) for split, folder in self.splits.items()}
        return {"source": self.root.name, "num_images": num_images, "classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A module that is restored has its classes."""
        self.classes = self.classes or state_dict["classes"]
