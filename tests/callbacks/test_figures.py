"""What TensorBoard is given of a run, compared with what scikit-learn and the weights say of it."""

import csv
import io
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.trainer.states import TrainerFn
from sklearn.metrics import confusion_matrix, recall_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from src.callbacks.figures import Confusion, Embedding, FeatureMaps, HardestImages, Weights, draw_confusion
from src.callbacks.layers import Layer, draw_layers, trace
from tests.callbacks.tasks import NUM_CLASSES, Classifier, Plain, make_images, make_trainer, read

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


class Run(NamedTuple):
    """A run, and what its weights make of the validation images, without the code under test."""

    folder: Path
    events: EventAccumulator
    module: Classifier
    images: Tensor  # (N, 1, 12, 12)
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]  # (N, NUM_CLASSES)

    def picture(self, tag: str) -> NDArray[np.uint8]:
        """The last one."""
        content = self.events.Images(tag)[-1].encoded_image_string
        return np.asarray(Image.open(io.BytesIO(content)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of ten steps, with a sanity check before, and validation in batches of unequal size."""
    folder = tmp_path_factory.mktemp("run")
    callbacks = [Confusion(), HardestImages(), FeatureMaps(), Weights(), Embedding(50)]
    validation = make_images(103, drawn_by=1)
    module = Classifier()
    make_trainer(folder, callbacks, max_epochs=2, num_sanity_val_steps=1, log_every_n_steps=5).fit(
        module, DataLoader(make_images(80, drawn_by=0), 8), DataLoader(validation, 30)
    )
    images, labels = validation.tensors
    with torch.no_grad():
        probabilities = module.net(images).softmax(dim=1).numpy()
    return Run(folder, read(folder), module, images, labels.numpy(), probabilities)


def test_all_is_written_at_the_steps_of_the_validation_metrics(run: Run) -> None:
    tags: dict[str, Any] = run.events.Tags()
    steps = [event.step for event in run.events.Scalars("val/acc")]
    assert len(steps) == 2
    assert set(tags["images"]) == {"val/confusion", "val/hardest_images", "net/feature_maps", "net/filters"}
    for tag in tags["images"]:
        assert [event.step for event in run.events.Images(tag)] == steps
    for tag in tags["histograms"]:
        assert [event.step for event in run.events.Histograms(tag)] == steps
    for label in range(NUM_CLASSES):
        assert [event.step for event in run.events.Scalars(f"val_class_acc/{label}")] == steps
    assert [event.step for event in run.events.Scalars("weights/grad_norm")] == [4, 9, 14, 19]


def test_the_confusion_matrix_is_sklearns(run: Run) -> None:
    confusion = confusion_matrix(run.labels, run.probabilities.argmax(axis=1))
    assert 0 < confusion.trace() < len(run.labels)
    np.testing.assert_array_equal(run.picture("val/confusion"), draw_confusion(torch.from_numpy(confusion)))
    recalls = recall_score(run.labels, run.probabilities.argmax(axis=1), average=None)
    found = [run.events.Scalars(f"val_class_acc/{label}")[-1].value for label in range(NUM_CLASSES)]
    assert found == pytest.approx(recalls.tolist())


def test_a_cells_colour_says_its_share_of_the_row() -> None:
    confusion = torch.tensor([[9, 1, 0], [50, 50, 0], [0, 0, 0]])  # no image of the third class
    picture = draw_confusion(confusion)[31:, 61:][::29, ::29][:3, :3].astype(int)  # a corner of each cell
    redness, blueness = picture[..., 0] - picture[..., 2], picture[..., 2] - picture[..., 0]
    assert (picture[confusion == 0] == 255).all()
    assert blueness[0, 0] > blueness[1, 1] > 0
    assert redness[1, 0] > redness[0, 1] > 0


@pytest.mark.parametrize("num_classes", [1, 2, 100, 1000])
def test_any_number_of_classes_fits(num_classes: int) -> None:
    height, width, _ = draw_confusion(torch.eye(num_classes, dtype=torch.int64)).shape
    assert height <= 1100
    assert width <= 1100


class Named(pl.LightningDataModule):
    """Data whose classes have names."""

    classes = tuple(f"Ankle boot/{label}" for label in range(NUM_CLASSES))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(make_images(80, drawn_by=0), 8)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(make_images(40, drawn_by=1), 8)


def test_classes_are_shown_by_their_names(tmp_path: Path) -> None:
    callbacks = [Confusion(), HardestImages(4), Embedding(20)]
    make_trainer(tmp_path, callbacks, max_epochs=1).fit(Classifier(), Named())
    events = read(tmp_path)
    names = set(Named.classes)
    assert {tag for tag in events.Tags()["scalars"] if "class_acc" in tag} == {
        f"val_class_acc/{name}" for name in names
    }
    (metadata,) = tmp_path.rglob("metadata.tsv")
    assert {name for line in metadata.read_text().splitlines()[1:] for name in line.split("\t")} <= names


def test_long_names_take_the_room_that_they_need() -> None:
    plain, named = draw_confusion(torch.eye(2).long()), draw_confusion(torch.eye(2).long(), ["T-shirt/top", "Bag"])
    assert named.shape[1] > plain.shape[1]
    np.testing.assert_array_equal(named[31:, -57:], plain[31:, -57:])  # the cells are the same


def test_the_hardest_images_are_those_of_highest_cross_entropy(run: Run) -> None:
    losses = -np.log(run.probabilities[np.arange(len(run.labels)), run.labels])
    page = run.picture("val/hardest_images")
    for index, hard in enumerate(np.argsort(-losses)[:25]):
        image = run.images[hard, 0].numpy()
        expected = np.asarray(Image.fromarray((image - image.min()) / np.ptp(image) * 255).resize((64, 64), 0))
        top, left = 14 + index // 5 * 84 + 3, index % 5 * 70 + 3
        shown = page[top : top + 64, left : left + 64, 0].astype(float)
        assert np.abs(shown - expected).max() <= 2, index


def test_feature_maps_and_filters_are_those_of_the_first_image(run: Run) -> None:
    layers, _ = trace(run.module.net, run.images[:1])  # itself compared with a net's own calls in test_layers.py
    weight: Tensor = run.module.net[0].weight  # type: ignore[index]
    expected = {
        "net/feature_maps": [Layer("input", run.images[:1]), *layers],
        "net/filters": [Layer("0", weight.transpose(0, 1))],
    }
    for tag, parts in expected.items():
        np.testing.assert_array_equal(run.picture(tag)[..., 0], draw_layers(parts))
    first, last = (event.encoded_image_string for event in run.events.Images("net/feature_maps"))
    assert first != last


def test_histograms_hold_the_weights(run: Run) -> None:
    for name, parameter in run.module.named_parameters():
        histogram = run.events.Histograms(f"weights/{name}")[-1].histogram_value
        values = parameter.detach()
        assert histogram.num == values.numel() == sum(histogram.bucket)
        assert histogram.sum == pytest.approx(values.sum().item(), abs=1e-4)
        assert (histogram.min, histogram.max) == pytest.approx((values.min().item(), values.max().item()))


def test_the_projector_has_the_last_hidden_layer_and_what_the_images_were_taken_for(run: Run) -> None:
    (folder,) = run.folder.glob("*/last_hidden_layer")
    assert int(folder.parent.name) == run.events.Scalars("val/acc")[-1].step
    # Its share of each batch of 30, spread over the batch.
    batches = ((0, 30, 13), (30, 30, 12), (60, 30, 13), (90, 13, 12))
    chosen = np.concatenate([first + np.linspace(0, size - 1, num).astype(int) for first, size, num in batches])
    with torch.no_grad():
        expected = run.module.net[:-1](run.images[chosen])  # type: ignore[index]
    np.testing.assert_allclose(np.loadtxt(folder / "tensors.tsv"), expected.numpy(), atol=1e-4)
    with (folder / "metadata.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [int(row["label"]) for row in rows] == run.labels[chosen].tolist()
    assert [int(row["taken for"]) for row in rows] == run.probabilities[chosen].argmax(axis=1).tolist()
    sprite = np.asarray(Image.open(folder / "sprite.png")).astype(float)
    for index in (0, 7, 8, 49):  # 8 a row
        tile = sprite[index // 8 * 24 :, index % 8 * 24 :][:24, :24]
        image = run.images[chosen[index], 0].numpy()
        large = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR))
        tint = np.array(matplotlib.colormaps["tab10"].colors[run.labels[chosen[index]]])  # type: ignore[attr-defined]
        assert np.abs(tile - ((large - large.min()) / np.ptp(large))[..., None] * tint * 255).max() <= 3
    assert str(folder.relative_to(run.folder)) in (run.folder / "projector_config.pbtxt").read_text()


def test_a_parameter_of_many_values_has_a_part_of_them_in_its_histogram(tmp_path: Path) -> None:
    module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(144, 200), nn.Linear(200, NUM_CLASSES)))
    loader = DataLoader(make_images(20, drawn_by=0), 10)
    make_trainer(tmp_path, [Weights()]).fit(module, loader, loader)
    histogram = read(tmp_path).Histograms("weights/net.1.weight")[-1].histogram_value
    assert 5_000 < histogram.num <= 10_000
    mean = module.net[1].weight.detach().mean().item()  # type: ignore[index]
    assert histogram.sum / histogram.num == pytest.approx(mean, abs=0.01)


def test_the_gradients_norm_is_that_of_the_step_they_cause(tmp_path: Path) -> None:
    module = Classifier()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    loader = DataLoader(make_images(10, drawn_by=0), 10)
    make_trainer(tmp_path, [Weights()]).fit(module, loader, loader)
    change = torch.cat([(old - new).flatten() for old, new in zip(before, module.parameters(), strict=True)])
    (event,) = read(tmp_path).Scalars("weights/grad_norm")
    assert event.value == pytest.approx(change.norm().item() / 0.1, rel=1e-4)


def test_a_thousand_classes_cost_no_more_than_ten(tmp_path: Path) -> None:
    """What a validation of 50,000 images, of which a fifth are mistaken, adds to the events."""
    rng, sizes = np.random.default_rng(0), []
    for num_classes in (10, 1000):
        labels = rng.integers(num_classes, size=50_000)
        guesses = np.where(rng.random(50_000) < 0.2, rng.integers(num_classes, size=50_000), labels)
        module, callback, folder = Plain(), Confusion(), tmp_path / str(num_classes)
        module.confusion = torch.from_numpy(confusion_matrix(labels, guesses, labels=range(num_classes)))
        logger = TensorBoardLogger(str(folder), name="", version="")
        callback.loggers = [logger]
        callback.draw(module, 1)
        logger.experiment.flush()
        sizes.append(sum(path.stat().st_size for path in folder.glob("events.*")))
    assert sizes[1] <= sizes[0]


def test_two_thousand_validations_draw_66_pictures_and_the_last_is_never_old() -> None:
    callback, trainer = Confusion(), Trainer(logger=False, enable_checkpointing=False)
    trainer.state.fn = TrainerFn.FITTING
    drawn = []
    for callback.num_validations in range(1, 2001):
        if callback.is_due(trainer):
            drawn.append(callback.num_validations)
    assert drawn[:13] == [*range(1, 13), 14]
    assert len(drawn) < 70
    assert max(after / before for before, after in pairwise(drawn[11:])) < 1.2


def test_2000_epochs_of_events_stay_below_30_megabytes(tmp_path: Path) -> None:
    """A run of a few epochs tells what an epoch with pictures adds, and one without."""
    sizes = []
    for num_before in (0, 1010):  # of which none of the next is drawn
        callbacks = [Confusion(), HardestImages(), FeatureMaps(), Weights()]
        for callback in callbacks:
            callback.num_validations = num_before
        train, validation = (DataLoader(make_images(num, drawn_by=num), 8) for num in (80, 26))
        folder = tmp_path / str(num_before)
        make_trainer(folder, callbacks, max_epochs=4).fit(Classifier(), train, validation)
        sizes.append(sum(path.stat().st_size for path in folder.glob("events.*")) / 4)
    with_pictures, without = sizes
    assert without < 2000 < with_pictures
    assert 70 * with_pictures + 2000 * without < 30e6
