"""src/data/mnist.py, read from real files and used by a real Trainer."""

import logging
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor
from torchvision.datasets import FashionMNIST
from torchvision.transforms import v2

from src.data.mnist import MNISTDataModule, preprocess
from src.data.sources import Digits, read_files, read_package
from src.engine.errors import DataError
from src.engine.runs.build import build_datamodule
from src.engine.runs.last_checkpoint import LastCheckpoint
from src.engine.settings.check import CONF
from tests.compose import compose_cfg
from tests.mnist.files import NUM_TEST, NUM_TRAIN, Mirror, write_digits, write_idx

NUM_VAL = 60


def ready(root: Path, **settings: Any) -> MNISTDataModule:
    """A module whose data are read, by default from the tiny files."""
    defaults: dict[str, Any] = {"source": "files", "val_size": NUM_VAL, "batch_size": 32}
    datamodule = MNISTDataModule(str(root), **defaults | settings)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def images_of(*splits: Digits) -> Counter[bytes]:
    """How often each image and its class occurs; the noise makes each image one of its kind."""
    return Counter(
        image.numpy().tobytes() + bytes([int(label)]) for split in splits for image, label in zip(*split, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Images


def test_preprocess_does_what_torchvision_does() -> None:
    images = torch.randint(0, 256, (4, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    truth = v2.Compose([v2.Pad(2), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.1307], [0.3081])])

    torch.testing.assert_close(preprocess(images), truth(images.unsqueeze(1)))
    assert torch.equal(images, before)


def test_pictures_are_fitted_into_the_frame_where_they_show_handwriting(tmp_path: Path) -> None:
    image = Image.new("L", (60, 60), 255)
    ImageDraw.Draw(image).line([(5, 50), (30, 5)], fill=0, width=4)
    image.save(tmp_path / "one.png")

    assert MNISTDataModule(str(tmp_path)).read_images(tmp_path / "one.png").shape == (1, 28, 28)
    with pytest.raises(ValueError, match="not 28x28"):
        MNISTDataModule(str(tmp_path), handwriting=False).read_images(tmp_path / "one.png")


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def test_validation_images_are_cut_off_the_training_files(mnist_root: Path) -> None:
    datamodule = ready(mnist_root, val_size=NUM_VAL)
    train, test = read_files(mnist_root / "MNIST" / "raw", {})
    splits = datamodule.splits

    assert datamodule.num_images == {"train": NUM_TRAIN - NUM_VAL, "val": NUM_VAL, "test": NUM_TEST}
    assert images_of(splits["train"], splits["val"]) == images_of(train)
    assert torch.equal(splits["test"].images, test.images)
    assert torch.equal(splits["test"].labels, test.labels)


@pytest.mark.parametrize("source", ["files", "package"])
def test_split_follows_split_seed_and_order_follows_seed(source: str, mnist_root: Path) -> None:
    first, reseeded, resplit = (
        ready(mnist_root, source=source, **seeds) for seeds in ({}, {"seed": 1}, {"split_seed": 1})
    )

    for split in ("train", "val", "test"):
        assert torch.equal(first.splits[split].images, reseeded.splits[split].images)
    assert not torch.equal(next(iter(first.train_dataloader()))[0], next(iter(reseeded.train_dataloader()))[0])
    assert images_of(first.splits["val"]) != images_of(resplit.splits["val"])


def test_package_is_split_with_as_many_of_each_class(tmp_path: Path) -> None:
    datamodule = ready(tmp_path, source="package")

    assert datamodule.num_images == {"train": 4000, "val": 500, "test": 500}
    for split, num in (("train", 400), ("val", 50), ("test", 50)):
        assert datamodule.splits[split].labels.bincount().tolist() == [num] * 10
    assert images_of(*datamodule.splits.values()) == images_of(read_package())


@pytest.mark.parametrize("source", ["files", "package"])
def test_train_size_takes_a_part_of_all_classes_and_leaves_the_other_splits(source: str, mnist_root: Path) -> None:
    whole, part = ready(mnist_root, source=source), ready(mnist_root, source=source, train_size=100)

    assert part.num_images["train"] == 100
    assert images_of(part.splits["train"]) <= images_of(whole.splits["train"])
    counts = [splits["train"].labels.bincount(minlength=10) for splits in (whole.splits, part.splits)]
    assert (counts[1] - counts[0] * 100 / whole.num_images["train"]).abs().max() < 1
    for split in ("val", "test"):
        assert torch.equal(part.splits[split].images, whole.splits[split].images)
    again = ready(mnist_root, source=source, train_size=100, seed=7)  # the run's seed does not choose them
    assert torch.equal(again.splits["train"].images, part.splits["train"].images)
    other = ready(mnist_root, source=source, train_size=100, split_seed=1)
    assert not torch.equal(other.splits["train"].images, part.splits["train"].images)


def test_train_size_must_not_exceed_what_there_is(mnist_root: Path) -> None:
    assert ready(mnist_root, train_size=240).num_images["train"] == 240
    with pytest.raises(DataError, match="train_size=241: expected 1 to 240, or null for all"):
        ready(mnist_root, train_size=241)


@pytest.mark.parametrize("val_size", [NUM_TRAIN, NUM_TRAIN + 1])
def test_val_size_must_leave_images_to_both(val_size: int, mnist_root: Path) -> None:
    with pytest.raises(ValueError, match=f"val_size={val_size}: expected 1 to 299"):
        ready(mnist_root, val_size=val_size)


@pytest.mark.parametrize("source", ["files", "package"])
def test_the_first_images_of_each_split_are_of_all_classes(source: str, mnist_root: Path) -> None:
    for split, digits in ready(mnist_root, source=source).splits.items():
        num = 10 if source == "package" else 60
        assert digits.labels[:num].unique().tolist() == list(range(10)), split


WHOLE = "expected a whole number of {} or more"
BAD_SETTINGS: list[tuple[str, Any, str]] = [
    ("source", "web", "expected one of auto, files, download, package"),
    ("augment", "mixup", "expected one of none, affine, elastic"),
    *((name, 0, WHOLE.format(1)) for name in ("batch_size", "eval_batch_size", "val_size", "train_size")),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD_SETTINGS)
def test_bad_setting_is_named(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}={re.escape(str(value))}\b.*{expected}|{name}=.*{expected}"):
        MNISTDataModule(**{"root": "data", name: value})


# ---------------------------------------------------------------------------------------------------------------------
# Data sets of other kinds


def write_others(folder: Path, images: NDArray[Any], labels: NDArray[np.uint8]) -> None:
    """The first 80 images to train and validate on, all to test on."""
    for split, count in (("train", 80), ("t10k", len(images))):
        write_idx(folder / f"{split}-images-idx{images.ndim}-ubyte", images[:count], gzipped=False)
        write_idx(folder / f"{split}-labels-idx1-ubyte", labels[:count], gzipped=False)


def others(*shape: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """100 random images, and their labels, 1 to 26."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 200, (100, *shape), dtype=np.uint8), (np.arange(100) % 26 + 1).astype(np.uint8)


def test_letters_count_from_1_and_lie_on_their_side(tmp_path: Path) -> None:
    images, labels = others(28, 28)
    write_others(tmp_path / "Letters", images, labels)
    settings = {"name": "Letters", "val_size": 8, "label_offset": 1, "transpose": True, "num_classes": 26}
    test = ready(tmp_path, **settings).splits["test"]

    np.testing.assert_array_equal(test.images, images.transpose(0, 2, 1))
    np.testing.assert_array_equal(test.labels, labels - 1)


@pytest.mark.parametrize(("num_classes", "label_offset"), [(10, 0), (26, 0), (25, 1), (26, 2)])
def test_labels_that_the_model_has_no_class_for_are_told(num_classes: int, label_offset: int, tmp_path: Path) -> None:
    write_others(tmp_path / "Letters", *others(28, 28))

    with pytest.raises(DataError, match=r"labels 1 to 26.*model\.num_classes=26 and data\.label_offset=1"):
        ready(tmp_path, name="Letters", val_size=8, num_classes=num_classes, label_offset=label_offset)


def test_mean_and_deviation_are_measured_on_the_training_images_and_kept(tmp_path: Path) -> None:
    images, labels = others(12, 14, 3)
    write_others(tmp_path / "Colours", images, labels)
    settings: dict[str, Any] = {"name": "Colours", "mean": None, "std": None, "input_size": [3, 14, 16]}
    datamodule = ready(tmp_path, val_size=8, **settings)
    train = datamodule.splits["train"].images
    truth = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(datamodule.mean, datamodule.std), v2.Pad(1)]
    )
    scaled = train.double() / 255
    np.testing.assert_allclose(datamodule.mean, scaled.mean(dim=(0, 2, 3)))
    np.testing.assert_allclose(datamodule.std, scaled.std(dim=(0, 2, 3), correction=0))

    restored = MNISTDataModule(str(tmp_path / "gone"), **settings)
    restored.load_state_dict(datamodule.state_dict())
    for each in (datamodule, restored):
        found, _ = each.on_after_batch_transfer((train, torch.zeros(len(train))), 0)
        torch.testing.assert_close(found, truth(train))


@pytest.mark.parametrize(("kind", "code"), [("i2", 11), ("i4", 12), ("f4", 13)])
def test_images_of_other_types_are_normalised_by_their_own_numbers(kind: str, code: int, tmp_path: Path) -> None:
    images, labels = others(32, 32)
    values = images.astype(f">{kind}") * 100 - 3000
    write_others(tmp_path / "Scans", images, labels)
    for split, count in (("train", 80), ("t10k", 100)):
        path = tmp_path / "Scans" / f"{split}-images-idx3-ubyte"
        header = path.read_bytes()[:16]
        path.write_bytes(header[:2] + bytes([code]) + header[3:] + values[:count].tobytes())
    datamodule = ready(tmp_path, name="Scans", val_size=8, mean=None, std=None)
    found = torch.cat([datamodule.on_after_batch_transfer(batch, 0)[0] for batch in datamodule.train_dataloader()])

    assert found.shape == (72, 1, 32, 32)
    assert found.dtype == torch.float32
    assert abs(float(found.mean())) < 1e-4
    assert float(found.std(correction=0)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("size", [(64, 48), (16, 12), (20, 20)])
def test_images_are_resized_where_padding_is_not_enough(
    size: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, labels = others(*size)
    write_others(tmp_path / "Sizes", images, labels)
    caplog.set_level(logging.INFO)
    datamodule = ready(tmp_path, name="Sizes", val_size=8)
    expected = [round(side * 32 / max(size)) for side in size]
    truth = v2.functional.resize(torch.from_numpy(images).unsqueeze(1), expected, antialias=True).squeeze(1)

    assert torch.equal(datamodule.splits["test"].images, truth)
    (record,) = [record for record in caplog.records if record.name.startswith("src.")]
    assert record.getMessage() == "images of {}x{} pixels are resized to {}x{}".format(*size, *expected)
    found, _ = datamodule.on_after_batch_transfer(next(iter(datamodule.test_dataloader())), 0)
    assert found.shape[1:] == (1, 32, 32)
    write_idx(tmp_path / "x-idx3-ubyte", images, gzipped=True)
    np.testing.assert_array_equal(datamodule.read_images(tmp_path / "x-idx3-ubyte"), datamodule.splits["test"].images)


def test_colours_for_a_grey_net_are_told(tmp_path: Path) -> None:
    write_others(tmp_path / "Colours", *others(28, 28, 3))

    with pytest.raises(DataError, match=r"28x28 pixels in 3 channels .*input_size=\[1, 32, 32\]; its first .* 3"):
        ready(tmp_path, name="Colours", val_size=8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"classes": ["a", "b"], "num_classes": 3}, "2 names; expected model.num_classes=3"),
        ({"mean": None}, "mean=None, std=0.3081: expected both"),
    ],
)
def test_settings_that_contradict_each_other_are_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MNISTDataModule("data", **settings)


@pytest.mark.slow  # CI installs the package with what else the slower tests need
def test_debians_fashion_mnist_has_the_presets_checksums_mean_and_deviation() -> None:
    root = Path("/usr/share/datasets")
    if not (root / "fashion-mnist").is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    settings = yaml.safe_load((CONF / "data" / "fashion_mnist.yaml").read_text())
    measured = ready(root, name="fashion-mnist", md5=settings["md5"], val_size=1, mean=None, std=None, num_classes=10)

    assert measured.num_images == {"train": 59_999, "val": 1, "test": 10_000}
    assert (*measured.mean, *measured.std) == pytest.approx((settings["mean"], settings["std"]), abs=1e-4)
    assert settings["classes"] == FashionMNIST.classes


@pytest.mark.parametrize("preset", ["fashion_mnist", "kmnist", "qmnist", "emnist_letters"])
def test_a_preset_builds_its_data_module(preset: str, tmp_path: Path) -> None:
    letters = ["model.num_classes=26"] if preset == "emnist_letters" else []
    cfg = compose_cfg(tmp_path, f"data={preset}", *letters)
    datamodule: Any = build_datamodule(cfg)

    assert datamodule.num_classes == (26 if letters else 10)
    assert datamodule.mirrors
    assert datamodule.md5
    with pytest.raises(DataError, match="not found"):
        datamodule.setup()


# ---------------------------------------------------------------------------------------------------------------------
# Sources


@pytest.mark.parametrize("source", ["auto", "files", "download"])
def test_whole_files_are_used(
    source: str, mnist_root: Path, mnist_md5: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    datamodule = ready(mnist_root, source=source, md5=mnist_md5)

    assert datamodule.used_source == "files"
    assert caplog.records == []


@pytest.mark.parametrize("md5", [True, False])
def test_auto_warns_once_and_takes_the_package(
    md5: bool, mnist_md5: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datamodule = ready(tmp_path, source="auto", md5=mnist_md5 if md5 else None)

    assert datamodule.used_source == "package"
    assert sum(datamodule.num_images.values()) == 5000
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(tmp_path / "MNIST" / "raw") in record.getMessage()


def test_auto_downloads_a_damaged_download_anew_or_names_it(
    serve: Callable[..., Mirror],
    mnist_files: dict[str, bytes],
    mnist_md5: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mirrors = [serve(mnist_files).url]
    whole = ready(tmp_path, source="auto", mirrors=mirrors, md5=mnist_md5)
    damaged = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    before = snapshot(tmp_path)

    assert ready(tmp_path, source="auto", md5=mnist_md5).used_source == "package"
    assert f"{damaged} is damaged" in caplog.text
    assert snapshot(tmp_path) == before
    again = ready(tmp_path, source="auto", mirrors=mirrors, md5=mnist_md5)
    assert (again.used_source, again.fingerprint) == ("download", whole.fingerprint)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file by path, but for locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def letters(folder: Path) -> None:
    write_digits(folder, gzipped=True)
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.arange(NUM_TRAIN, dtype=np.uint8) % 26, gzipped=True)


OWN_FILES: dict[str, Callable[[Path], None]] = {
    "labels above 9": letters,
    "another size": lambda folder: write_idx(folder / "train-images-idx3-ubyte", np.zeros((9, 5, 7), np.uint8), False),
    "valid, but not MNIST's": lambda folder: write_digits(folder, gzipped=False),
    "no IDX": lambda folder: write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.zeros((2, 2), np.uint8), False),
}


@pytest.mark.parametrize("kind", OWN_FILES)
@pytest.mark.parametrize(
    ("name", "md5"), [("MNIST", "its own"), ("MNIST", "none"), ("MyLetters", "its own"), ("MyLetters", "none")]
)
def test_nothing_takes_the_place_of_the_users_own_files(
    kind: str,
    name: str,
    md5: str,
    serve: Callable[..., Mirror],
    mnist_files: dict[str, bytes],
    mnist_md5: dict[str, str],
    tmp_path: Path,
) -> None:
    """With the settings that ``conf/data/mnist.yaml`` has, mirrors included."""
    OWN_FILES[kind](tmp_path / name / "raw")
    published = mnist_md5 | {file.removesuffix(".gz"): "0" * 32 for file in mnist_md5}  # of both kinds of file
    mirror, before = serve(mnist_files), snapshot(tmp_path)
    checksums = published if md5 == "its own" else None
    settings: dict[str, Any] = {"name": name, "md5": checksums, "mirrors": [mirror.url], "num_classes": 10}

    if kind == "valid, but not MNIST's" and md5 == "none":
        assert ready(tmp_path, source="auto", **settings).used_source == "files"
    else:
        for source in ("auto", "files", "download"):
            with pytest.raises(DataError) as error:
                ready(tmp_path, source=source, **settings)
            said = str(error.value)
            assert str(tmp_path / name / "raw") in said
            assert "\n" not in said
            assert "data.root" in said
            assert ("data.md5=null" in said) == (md5 == "its own")
            assert "delete" not in said
    assert snapshot(tmp_path) == before
    assert mirror.fetched == []


@pytest.mark.parametrize(("name", "md5"), [("MNIST", False), ("MyLetters", True)])
def test_auto_downloads_nothing_but_mnist(
    name: str,
    md5: bool,
    serve: Callable[..., Mirror],
    mnist_files: dict[str, bytes],
    mnist_md5: dict[str, str],
    tmp_path: Path,
) -> None:
    mirror = serve(mnist_files)
    datamodule = MNISTDataModule(str(tmp_path), name, md5=mnist_md5 if md5 else None, mirrors=[mirror.url])

    if name == "MNIST":
        datamodule.prepare_data()
    else:
        with pytest.raises(DataError, match=r"not found; .*data\.source=download"):
            datamodule.prepare_data()
    assert mirror.fetched == []
    assert snapshot(tmp_path) == {}


def test_auto_does_not_warn_again_when_the_test_follows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    datamodule = ready(tmp_path, source="auto")
    datamodule.prepare_data()  # Lightning does so for each of fit and test

    assert len(caplog.records) == 1


def test_auto_takes_the_package_for_nothing_but_mnist(tmp_path: Path) -> None:
    datamodule = MNISTDataModule(str(tmp_path), name="FashionMNIST", source="auto")

    with pytest.raises(DataError, match="not found"):
        datamodule.prepare_data()
    with pytest.raises(DataError, match="not found"):  # what the other processes of a machine call
        datamodule.setup()


@pytest.mark.parametrize(("source", "message"), [("files", "not found"), ("download", "not found; no mirror")])
def test_other_sources_do_not_fall_back(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        ready(tmp_path, source=source)


@pytest.mark.parametrize("source", ["auto", "download"])
def test_missing_files_are_downloaded(
    source: str,
    serve: Callable[..., Mirror],
    mnist_files: dict[str, bytes],
    mnist_md5: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"source": source, "mirrors": [serve(mnist_files).url], "md5": mnist_md5}

    assert ready(tmp_path, **settings).used_source == "download"
    assert ready(tmp_path, **settings).used_source == "files"
    assert caplog.records == []  # nothing was damaged


@pytest.mark.full_mnist
def test_official_files_have_their_checksums_and_sizes(full_mnist_root: Path) -> None:
    md5 = yaml.safe_load((CONF / "data" / "mnist.yaml").read_text())["md5"]
    datamodule = ready(full_mnist_root, source="auto", md5=md5, val_size=5000)

    assert datamodule.used_source == "files"
    assert datamodule.num_images == {"train": 55_000, "val": 5_000, "test": 10_000}


@pytest.mark.full_mnist
def test_preprocessed_training_images_have_mean_0_and_deviation_1(full_mnist_root: Path) -> None:
    train, _ = read_files(full_mnist_root / "MNIST" / "raw", {})
    images = preprocess(train.images)[:, :, 2:-2, 2:-2].double()

    assert abs(float(images.mean())) < 1e-3
    assert abs(float(images.std()) - 1) < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# In a Trainer


class Recorder(pl.LightningModule):
    """Learns nothing; keeps the batches of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.batches["train"].append(batch)
        return self.weight**2

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.batches["val"].append(batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.batches["test"].append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def seen(self) -> list[list[int]]:
        """Each training batch, by the sums of its images' pixels."""
        return [images.sum(dim=(1, 2, 3)).mul(1000).round().tolist() for images, _ in self.batches["train"]]


def make_trainer(**settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False} | settings,
    )


no_gpu_needed = pytest.mark.filterwarnings("ignore:GPU available but not used")


@no_gpu_needed
@pytest.mark.parametrize("augment", ["none", "affine", "elastic"])
def test_augmentation_changes_training_images_only(augment: str, mnist_root: Path) -> None:
    datamodule = ready(mnist_root, augment=augment)
    module = Recorder()
    trainer = make_trainer(max_epochs=1, num_sanity_val_steps=-1)
    trainer.fit(module, datamodule)
    trainer.test(module, datamodule, verbose=False)

    truth = {
        "train": list(datamodule.train_dataloader()),
        "val": list(datamodule.val_dataloader()) * 2,  # once to check sanity
        "test": list(datamodule.test_dataloader()),
    }
    for split, batches in truth.items():
        assert len(module.batches[split]) == len(batches)
        for (images, labels), (original, true_labels) in zip(module.batches[split], batches, strict=True):
            assert torch.equal(labels, true_labels)
            same = (images == preprocess(original)).all(dim=(1, 2, 3))
            assert not same.any() if split == "train" and augment != "none" else same.all()


@no_gpu_needed
@pytest.mark.parametrize("steps", [3, 8, 11])  # of 8 batches an epoch: within the first, at its end, within the next
def test_resumed_run_sees_the_batches_that_are_left(steps: int, mnist_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"

    def save(trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == steps:
            trainer.save_checkpoint(path)

    whole, resumed = Recorder(), Recorder()
    make_trainer(max_epochs=2, callbacks=LambdaCallback(on_train_batch_end=save)).fit(whole, ready(mnist_root))
    make_trainer(max_epochs=2).fit(resumed, ready(mnist_root), ckpt_path=path, weights_only=True)

    assert len(whole.seen()) == 16
    assert resumed.seen() == whole.seen()[steps:]


@no_gpu_needed
@pytest.mark.parametrize("batch_size", [7, 16, 64, 500])  # instead of 32
@pytest.mark.parametrize("steps", [3, 11])
def test_run_resumed_with_another_batch_size_sees_the_images_that_are_left(
    batch_size: int, steps: int, mnist_root: Path, tmp_path: Path
) -> None:
    whole, resumed, validated = Recorder(), Recorder(), []
    make_trainer(max_epochs=2).fit(whole, ready(mnist_root))

    def stop(trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == steps:
            raise KeyboardInterrupt

    first = [LastCheckpoint(str(tmp_path), every_n_steps=steps), LambdaCallback(on_train_batch_start=stop)]
    with pytest.raises(SystemExit):
        make_trainer(max_epochs=2, callbacks=first, enable_checkpointing=True).fit(Recorder(), ready(mnist_root))
    note = LambdaCallback(on_validation_end=lambda trainer, _: validated.append(trainer.current_epoch))
    second = [LastCheckpoint(str(tmp_path)), note]
    make_trainer(max_epochs=2, callbacks=second, enable_checkpointing=True, num_sanity_val_steps=0).fit(
        resumed, ready(mnist_root, batch_size=batch_size), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )

    left = list(chain(*resumed.seen()))
    assert left == list(chain(*whole.seen()))[steps * 32 - (steps // 8) * 16 :]
    assert validated == list(range(steps // 8, 2))


@no_gpu_needed
def test_overfitting_repeats_the_same_batches(mnist_root: Path) -> None:
    module = Recorder()
    make_trainer(max_epochs=2, overfit_batches=2).fit(module, ready(mnist_root))

    assert len(module.seen()) == 4
    assert module.seen()[:2] == module.seen()[2:]


@no_gpu_needed
def test_overfitting_resumes_with_the_same_batches(mnist_root: Path, tmp_path: Path) -> None:
    first, rest = Recorder(), Recorder()
    trainer = make_trainer(max_epochs=1, overfit_batches=2)
    trainer.fit(first, ready(mnist_root))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    make_trainer(max_epochs=2, overfit_batches=2).fit(
        rest, ready(mnist_root), ckpt_path=tmp_path / "end.ckpt", weights_only=True
    )

    assert len(first.seen()) == 2
    assert rest.seen() == first.seen()


@pytest.mark.parametrize(
    ("source", "md5", "restored"),
    [("package", True, "package"), ("files", False, "files"), ("download", True, "download")],
)
def test_auto_becomes_the_source_that_a_restored_run_had(
    source: str, md5: bool, restored: str, mnist_md5: dict[str, str], tmp_path: Path
) -> None:
    datamodule = MNISTDataModule(str(tmp_path), md5=mnist_md5 if md5 else None)
    datamodule.load_state_dict({"source": source})
    assert datamodule.source == restored
    if restored == "package":
        datamodule.setup()
    else:  # other digits do not take the place of those that are gone
        with pytest.raises(DataError, match="not found"):
            datamodule.setup()


def test_state_says_what_the_images_were(mnist_root: Path) -> None:
    datamodule = ready(mnist_root)
    state: Mapping[str, Any] = datamodule.state_dict()

    assert state == {
        "source": "files",
        "num_images": {"train": 240, "val": 60, "test": 60},
        "fingerprint": datamodule.fingerprint,
        "image_size": [28, 28],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprint


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The tiny data set's files, uncompressed; the test may change them."""
    folder = tmp_path / "plain" / "MNIST" / "raw"
    write_digits(folder, gzipped=False)
    return folder


def add_one(path: Path, place: int) -> None:
    """Change a pixel or label, counted from the end of the file; no pixel of the tiny data set is 255."""
    content = bytearray(path.read_bytes())
    content[place] = (content[place] + 1) % 10 if "labels" in path.name else content[place] + 1
    path.write_bytes(content)


def test_fingerprint_is_of_the_content_whatever_its_files(mnist_root: Path, raw: Path) -> None:
    gzipped, plain, again = ready(mnist_root), ready(raw.parents[1]), ready(mnist_root, seed=1, batch_size=8)

    assert re.fullmatch("crc32:[0-9a-f]{8}", gzipped.fingerprint)
    assert gzipped.fingerprint == plain.fingerprint == again.fingerprint


def test_fingerprint_is_the_same_on_every_machine(mnist_root: Path) -> None:
    datamodule = ready(mnist_root)
    content = b""
    for name, (images, labels) in datamodule.splits.items():
        content += f"{name} {len(images)}".encode() + bytes(images.flatten().tolist())
        content += struct.pack(f"<{len(labels)}q", *labels.tolist())

    assert datamodule.fingerprint == f"crc32:{zlib.crc32(content):08x}"


@pytest.mark.parametrize("place", [-1, -28 * 28, -28 * 28 * 30 - 100])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte"])
def test_fingerprint_tells_a_changed_pixel(name: str, place: int, raw: Path) -> None:
    before = ready(raw.parents[1]).fingerprint
    add_one(raw / name, place)

    assert ready(raw.parents[1]).fingerprint != before


@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"])
def test_fingerprint_tells_a_changed_label(name: str, raw: Path) -> None:
    before = ready(raw.parents[1]).fingerprint
    add_one(raw / name, -7)

    assert ready(raw.parents[1]).fingerprint != before


def test_fingerprint_tells_images_in_another_order(raw: Path) -> None:
    before = ready(raw.parents[1]).fingerprint
    path = raw / "t10k-images-idx3-ubyte"
    content, size = path.read_bytes(), 28 * 28
    path.write_bytes(content[: -2 * size] + content[-size:] + content[-2 * size : -size])

    assert ready(raw.parents[1]).fingerprint != before


def test_fingerprint_tells_another_split(mnist_root: Path) -> None:
    splits: list[dict[str, Any]] = [{}, {"split_seed": 1}, {"val_size": 59}, {"train_size": 239}, {"source": "package"}]

    assert len({ready(mnist_root, **split).fingerprint for split in splits}) == len(splits)


@pytest.fixture
def middle(mnist_root: Path, tmp_path: Path) -> Path:
    """A checkpoint of a run over the tiny data set, taken at the third of eight steps."""
    path = tmp_path / "middle.ckpt"

    def save(trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(path)

    make_trainer(max_epochs=1, callbacks=LambdaCallback(on_train_batch_end=save)).fit(Recorder(), ready(mnist_root))
    return path


def unread(root: Path, **settings: Any) -> MNISTDataModule:
    """A module that the Trainer has to set up."""
    return MNISTDataModule(str(root), source="files", batch_size=32, **{"val_size": NUM_VAL} | settings)


@no_gpu_needed
def test_same_data_continue_without_a_word(middle: Path, raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(max_epochs=1).fit(Recorder(), unread(raw.parents[1]), ckpt_path=middle, weights_only=True)

    assert [record for record in caplog.records if record.name.startswith("src.")] == []


@no_gpu_needed
@pytest.mark.parametrize(  # 5 batches are left of this epoch, 8 are in the next; of 50 images, none and 2
    ("change", "num_train", "num_batches"), [("a pixel", 240, 13), ("the split", 50, 2)]
)
def test_other_data_continue_with_one_warning(
    change: str, num_train: int, num_batches: int, middle: Path, raw: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = ready(raw.parents[1]).fingerprint
    if change == "a pixel":
        add_one(raw / "train-images-idx3-ubyte", -1)
    datamodule = unread(raw.parents[1], val_size=NUM_TRAIN - num_train)
    module = Recorder()
    make_trainer(max_epochs=2).fit(module, datamodule, ckpt_path=middle, weights_only=True)

    (record,) = [record for record in caplog.records if record.name.startswith("src.")]
    said = record.getMessage()
    assert record.levelno == logging.WARNING
    assert "not an exact continuation" in said
    assert re.search(f"{datamodule.fingerprint}.*{num_train}.*{before}.*240", said)
    assert len(module.seen()) == num_batches


@no_gpu_needed
def test_test_of_other_data_does_not_warn(middle: Path, raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_one(raw / "t10k-images-idx3-ubyte", -1)
    datamodule = unread(raw.parents[1])
    make_trainer().test(Recorder(), datamodule, ckpt_path=middle, weights_only=True, verbose=False)

    assert [record for record in caplog.records if record.name.startswith("src.")] == []


@pytest.mark.parametrize("state", [{}, {"fingerprint": None, "loader": [3], "num_images": 7}, {"fingerprint": "04f8"}])
def test_state_of_an_older_release_continues_without_a_word(
    state: dict[str, Any], mnist_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datamodule = ready(mnist_root)
    datamodule.load_state_dict(state)

    assert len(list(datamodule.train_dataloader())) == 8
    assert caplog.records == []


def test_state_without_numbers_of_images_warns_all_the_same(mnist_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    ready(mnist_root).load_state_dict({"fingerprint": "crc32:00000000"})

    (record,) = caplog.records
    assert "crc32:00000000 and an unknown number of" in record.getMessage()
