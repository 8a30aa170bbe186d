"""Colour images in folders, a folder a class, as a LightningDataModule."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from src.data.loader import BatchLoader
from src.engine.errors import DataError


class Views(ImageFolder):  # type: ignore[misc]
    """torchvision's images, by (seed, epoch, index): what a transform draws depends on these, not on the worker."""

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        """The image as the transform makes it, and its class."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
            return super().__getitem__(key[-1])


class ViewLoader(BatchLoader):
    """Batches that workers make, in the order and with the state of ``BatchLoader``.

    Args:
        views: What they make them of.
        num_workers: Processes that read images; 0: this one does.
        batch_size: Images a batch over all processes, 1 or more.
        arguments: Further ones of ``BatchLoader``.
    """

    def __init__(self, views: Views, num_workers: int, batch_size: int, **arguments: Any) -> None:
        super().__init__(torch.arange(len(views)), torch.tensor(views.targets), batch_size, **arguments)
        self._views, self._num_workers = views, num_workers
        self._batches: list[list[tuple[int, int, int]]] = []  # of an epoch, those that are left
        self._loader: DataLoader[Any] | None = None

    def end_workers(self) -> None:
        """End them in good order: where Python collects them as garbage, it waits five seconds for each."""
        self._loader = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (B, C, H, W), labels (B,)), from the start unless this very epoch is being resumed."""
        if self._loader is None:
            self._loader = DataLoader(
                self._views,
                batch_sampler=self._batches,
                num_workers=self._num_workers,
                persistent_workers=self._num_workers > 0,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # else a seed for the workers is drawn from the run's random numbers
            )
        self._batches[:] = [[(self.seed, self.epoch, int(i)) for i in batch] for batch, _ in super().__iter__()]
        self.batches_done = len(self) - len(self._batches)
        for batch in self._loader:
            self.batches_done += 1
            yield batch


class ImageFolderDataModule(pl.LightningDataModule):
    """Images as torchvision's ImageFolder has them: ``<root>/train/<class>/<any name>.jpg``, also ``val`` and ``test``.

    The loaders yield uint8 (B, 3, H, W); on the device they become float of mean 0 and standard deviation 1.

    Args:
        root: The folder.
        train_transform: Maps an image, uint8 (3, H, W), to one of a fixed size; what it draws, it draws by torch.
        eval_transform: The same for validation, test and prediction.
        mean: Of each channel, in 0..1.
        std: The same of the standard deviation.
        batch_size: Images a batch over all processes, 1 or more.
        num_workers: Processes that read images, of each loader; 0: the run's own process reads them.
        batch_transform: Changes a batch to train on, (images, labels), as torchvision's MixUp does.
        seed: Seed of the batches' order and of what the transforms draw, 0 or more.

    Attributes:
        classes: Their names, in the order of their numbers; after ``setup``.
    """

    def __init__(
        self,
        root: str,
        train_transform: Callable[[Tensor], Tensor],
        eval_transform: Callable[[Tensor], Tensor],
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        batch_size: int = 64,
        num_workers: int = 2,
        batch_transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root, self.batch_size, self.num_workers, self.seed = Path(root), batch_size, num_workers, seed
        transforms = {"train": train_transform, "val": eval_transform, "test": eval_transform}
        self.transforms = {split: v2.Compose([v2.PILToTensor(), each]) for split, each in transforms.items()}
        self.normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
        self.batch_transform = batch_transform
        self.splits: dict[str, Views] = {}
        self.classes: list[str] = []
        self._loaders: dict[str, ViewLoader] = {}  # the latest of each split

    def setup(self, stage: str | None = None) -> None:
        """List the files of the splits that are there.

        Raises:
            DataError: If there are no images to train on, or a split has other classes.
        """
        for split in [split for split in self.transforms if split == "train" or (self.root / split).is_dir()]:
            try:
                views = self.splits[split] = Views(str(self.root / split), self.transforms[split])
            except FileNotFoundError as error:
                reason = str(error).split(". Supported")[0]
                raise DataError(f"data.root={self.root}: expected {split}/<class>/<image>; {reason}") from error
            self.classes = self.classes or views.classes
            if views.classes != self.classes:
                raise DataError(f"data.root={self.root}: {split} has other classes than train: {views.classes}")

    def train_dataloader(self) -> ViewLoader:
        """Batches of the training split, in a new order each epoch (in none under ``trainer.overfit_batches``)."""
        return self._make_loader("train", shuffle=not (self.trainer and self.trainer.overfit_batches))  # type: ignore[attr-defined]

    def val_dataloader(self) -> ViewLoader:
        """Batches of the validation split."""
        return self._make_loader("val")

    def test_dataloader(self) -> ViewLoader:
        """Batches of the test split."""
        return self._make_loader("test")

    def _make_loader(self, split: str, shuffle: bool = False) -> ViewLoader:
        if split not in self.splits:
            raise DataError(f"data.root={self.root}: no folder {split}; make one, or set test=false")
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        order: dict[str, Any] = {"shuffle": shuffle, "seed": self.seed, "rank": rank, "world_size": world_size}
        if split in self._loaders:  # made anew, as trainer.reload_dataloaders_every_n_epochs wants it
            self._loaders[split].end_workers()
        loader = self._loaders[split] = ViewLoader(self.splits[split], self.num_workers, self.batch_size, **order)
        return loader

    def teardown(self, stage: str | None = None) -> None:
        """End the workers, after a training and after a test."""
        for loader in self._loaders.values():
            loader.end_workers()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn uint8 (B, 3, H, W) into the net's input, float of the same shape, on the device."""
        if isinstance(batch, Tensor):  # the module's example_input_array, a net's input already
            return batch
        images, labels = self.normalize(batch[0]), batch[1]
        is_changed = self.batch_transform and self.trainer and self.trainer.training
        return self.batch_transform(images, labels) if is_changed else (images, labels)  # type: ignore[misc]

    def read_images(self, path: Path) -> NDArray[np.uint8]:
        """Read an image file as the loaders would yield it: uint8 (1, 3, H, W)."""
        images: NDArray[np.uint8] = self.transforms["test"](default_loader(str(path))).unsqueeze(0).numpy()
        return images

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the images."""
        num_images = {split: len(views) for split, views in self.splits.items()}
        return {"source": self.root.name, "num_images": num_images, "classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A module that is restored has its classes."""
        self.classes = self.classes or state_dict["classes"]
