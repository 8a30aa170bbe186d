"""What TensorBoard is given of a run, compared with what scikit-learn and the checkpoint say of it."""

import csv
import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy
from sklearn.metrics import confusion_matrix, recall_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from src.callbacks.confusion import Confusion, draw_confusion
from src.callbacks.embedding import Embedding
from src.callbacks.feature_maps import FeatureMaps
from src.callbacks.hardest import HardestImages
from src.callbacks.layers import Layer, draw_layers, trace
from src.callbacks.pictures import find_writers
from src.callbacks.precision_recall import PrecisionRecall
from src.callbacks.speed import Speed
from src.callbacks.weights import Weights
from src.classifier import ImageClassifier
from src.data.mnist import preprocess
from src.engine.runs.build import build_datamodule, build_module, build_trainer, restore
from tests.compose import compose_cfg


class Run(NamedTuple):
    """A run, and what its weights make of the validation images, without the code under test."""

    folder: Path
    events: EventAccumulator
    module: ImageClassifier
    images: Tensor  # uint8 (N, 28, 28)
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]  # (N, 10)

    def picture(self, tag: str) -> NDArray[np.uint8]:
        """The last one."""
        content = self.events.Images(tag)[-1].encoded_image_string
        return np.asarray(Image.open(io.BytesIO(content)))


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0, "histograms": 0})
    return events.Reload()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs, with a sanity check before, and validation in four batches of unequal size."""
    folder = tmp_path_factory.mktemp("run")
    cfg = compose_cfg(
        folder, "data=mnist5k", "trainer=cpu", "trainer.max_epochs=2", "data.eval_batch_size=150",
        "trainer.num_sanity_val_steps=1", "trainer.limit_train_batches=40", "trainer.log_every_n_steps=20",
        "callbacks.summary=null", "callbacks.embedding.num_images=200",
    )  # fmt: skip
    trainer, data = build_trainer(cfg), build_datamodule(cfg)
    trainer.fit(build_module(cfg), data)
    images, labels = data.splits["val"]  # type: ignore[attr-defined]
    module = restore(folder / "checkpoints" / "last.ckpt")
    with torch.no_grad():
        probabilities = module(preprocess(images)).softmax(dim=1).numpy()
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
    for label in range(10):
        assert [event.step for event in run.events.Scalars(f"val_class_acc/{label}")] == steps
        assert [event.step for event in run.events.Tensors(f"pr/{label}")] == steps
    assert [event.step for event in run.events.Scalars("train/grad_norm")] == [19, 39, 59, 79]


def test_the_confusion_matrix_is_sklearns(run: Run) -> None:
    confusion = confusion_matrix(run.labels, run.probabilities.argmax(axis=1))
    np.testing.assert_array_equal(run.picture("val/confusion"), draw_confusion(torch.from_numpy(confusion)))
    recalls = recall_score(run.labels, run.probabilities.argmax(axis=1), average=None)
    found = [run.events.Scalars(f"val_class_acc/{label}")[-1].value for label in range(10)]
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


def test_the_hardest_images_are_those_of_highest_cross_entropy(run: Run) -> None:
    losses = -np.log(run.probabilities[np.arange(len(run.labels)), run.labels])
    page = run.picture("val/hardest_images")
    order = np.argsort(-losses)[:25]
    for index, image in enumerate(run.images[order.tolist()]):
        expected = nn.functional.pad(image, (2, 2, 2, 2)).float()
        expected = (expected / expected.max() * 255).repeat_interleave(2, 0).repeat_interleave(2, 1)
        top, left = 14 + index // 5 * 84 + 3, index % 5 * 70 + 3
        shown = page[top : top + 64, left : left + 64, 0].astype(float)
        assert np.abs(shown - expected.numpy()).max() <= 2, index


def test_feature_maps_and_filters_are_those_of_the_first_image(run: Run) -> None:
    images = preprocess(run.images[:1])
    layers, _ = trace(run.module.net, images)  # itself compared with the net's own calls in test_layers.py
    weight: Tensor = run.module.net.c1.weight  # type: ignore[assignment,union-attr]
    expected = {
        "net/feature_maps": [Layer("input", images), *layers],
        "net/filters": [Layer("c1", weight.transpose(0, 1))],
    }
    for tag, parts in expected.items():
        np.testing.assert_array_equal(run.picture(tag)[..., 0], draw_layers(parts))
    first, last = (event.encoded_image_string for event in run.events.Images("net/feature_maps"))
    assert first != last


def test_precision_and_recall_are_those_at_each_threshold(run: Run) -> None:
    for label in range(10):
        curve = make_ndarray(run.events.Tensors(f"pr/{label}")[-1].tensor_proto)  # (6, 127)
        positive, scores = run.labels == label, run.probabilities[:, label]
        for index in (0, 1, 40, 63, 100, 126):
            taken = np.floor(scores * 126) >= index
            hits = (taken & positive).sum()
            assert curve[4, index] == pytest.approx(hits / max(taken.sum(), 1), abs=0.02)
            assert curve[5, index] == pytest.approx(hits / positive.sum(), abs=0.02)


def test_histograms_hold_the_weights(run: Run) -> None:
    for name, parameter in run.module.named_parameters():
        histogram = run.events.Histograms(f"weights/{name}")[-1].histogram_value
        values = parameter.detach()
        if values.numel() <= 10_000:
            assert histogram.num == values.numel()
            assert histogram.sum == pytest.approx(values.sum().item(), abs=1e-4)
            assert (histogram.min, histogram.max) == pytest.approx((values.min().item(), values.max().item()))
        else:  # a part of them
            assert 5_000 < histogram.num <= 10_000
            assert histogram.sum / histogram.num == pytest.approx(values.mean().item(), abs=0.01)
    assert sum(histogram.bucket) == histogram.num


def test_the_gradients_norm_is_that_of_the_step_they_cause(tmp_path: Path) -> None:
    rate = 0.5
    cfg = compose_cfg(
        tmp_path, "data=mnist5k", "trainer=cpu", "debug=fast", "optimizer=sgd", f"optimizer.lr={rate}",
        "optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.nesterov=false", "scheduler=[]",
        "trainer.log_every_n_steps=1", "callbacks.summary=null",
    )  # fmt: skip
    module = build_module(cfg)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    build_trainer(cfg).fit(module, build_datamodule(cfg))
    change = torch.cat([(old - new).flatten() for old, new in zip(before, module.parameters(), strict=True)])
    (event,) = read(tmp_path).Scalars("train/grad_norm")
    assert event.value == pytest.approx(change.norm().item() / rate, rel=1e-4)


def test_the_projector_has_f6_the_digits_and_what_they_were_taken_for(run: Run) -> None:
    (folder,) = run.folder.glob("*/last_hidden_layer")
    net: Any = run.module.net
    with torch.no_grad():
        x = net.s2(net.act(net.c1(preprocess(run.images[:200]))))
        x = net.s4(net.act(net.c3(x))).flatten(1)
        expected = net.act(net.f6(net.act(net.c5(x))))  # (200, 84)
    found = np.loadtxt(folder / "tensors.tsv")
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    with (folder / "metadata.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [int(row["label"]) for row in rows] == run.labels[:200].tolist()
    assert [int(row["taken for"]) for row in rows] == run.probabilities[:200].argmax(axis=1).tolist()
    sprite = np.asarray(Image.open(folder / "sprite.png"))[..., 0].astype(float)
    for index in (0, 14, 15, 199):  # 15 a row
        tile = sprite[index // 15 * 24 :, index % 15 * 24 :][:24, :24]
        image = np.pad(run.images[index].numpy(), 2)
        small = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR), dtype=float)
        assert np.abs(tile - small / small.max() * 255).max() <= 3
    assert str(folder.relative_to(run.folder)) in (run.folder / "projector_config.pbtxt").read_text()


def figures() -> list[pl.Callback]:
    return [Confusion(), HardestImages(4), FeatureMaps(), PrecisionRecall(), Weights(), Embedding(10), Speed()]


def fit(
    folder: Path, module: pl.LightningModule, shape: tuple[int, int, int], collate: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Train for an epoch on random images; what TensorBoard then has."""
    data = TensorDataset(torch.randn(24, *shape), torch.arange(24) % 3)
    trainer = pl.Trainer(
        max_epochs=1, logger=TensorBoardLogger(str(folder), name="", version=""), callbacks=figures(),
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 8, collate_fn=collate), DataLoader(data, 7, collate_fn=collate))
    tags: dict[str, Any] = read(folder).Tags()
    return tags


pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers", "ignore:.*`training_step` returned `None`"
)


def test_colour_images_of_any_size_are_drawn(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    module = ImageClassifier(net, num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.1))
    tags = fit(tmp_path, module, (3, 20, 37))
    assert set(tags["images"]) == {"val/confusion", "val/hardest_images", "net/feature_maps", "net/filters"}
    (vectors,) = tmp_path.glob("*/last_hidden_layer/tensors.tsv")
    assert np.loadtxt(vectors).shape == (10, 4)  # what the pooling hands to the last layer


def test_a_net_without_convolutions_has_no_maps(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2 * 64, 7), nn.Tanh(), nn.Linear(7, 3))
    module = ImageClassifier(net, num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.1))
    tags = fit(tmp_path, module, (2, 8, 8))
    assert set(tags["images"]) == {"val/confusion", "val/hardest_images"}
    (vectors,) = tmp_path.glob("*/last_hidden_layer/tensors.tsv")
    assert np.loadtxt(vectors).shape == (10, 7)


class Foreign(pl.LightningModule):
    """A module of the user's own, which returns nothing from validation and has no ``net``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.layer(batch[0].flatten(1)), batch[1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(*self.predict(batch))

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_that_says_nothing_is_left_alone(tmp_path: Path) -> None:
    tags = fit(tmp_path, Foreign(), (1, 8, 8))
    assert tags["images"] == []
    assert tags["tensors"] == []
    assert set(tags["histograms"]) == {"weights/layer.weight", "weights/layer.bias"}
    assert {"train/grad_norm", "train/images_per_second"} <= set(tags["scalars"])


class SaysLoss(Foreign):
    """With a ``net``, which a callback may run; validation returns the batch's loss."""

    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.net(batch[0]), batch[1]

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(*self.predict(batch), reduction=self.reduction)


class SaysLosses(SaysLoss):
    """Validation returns the images' losses."""

    reduction = "none"


class SaysScores(SaysLoss):
    """Of one class alone, with labels that are numbers."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        batch[1] = batch[1].float().unsqueeze(1)
        return self.net(batch[0])[:, :1]


class SaysMaps(SaysLoss):
    """Logits of each pixel."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return batch[0].expand(-1, 3, -1, -1)


class SaysLogits(SaysLoss):
    """A classifier."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.predict(batch)[0]


class OfDictionaries(SaysLogits):
    """A classifier of batches that are dictionaries."""

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.net(batch["image"]), batch["label"]


class OfTwo(SaysLogits):
    """A classifier whose net takes more than the images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Bilinear(64, 64, 3)  # type: ignore[assignment]

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.net(batch[0].flatten(1), batch[0].flatten(1)), batch[1]


def as_dictionary(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*items, strict=True)
    return {"image": torch.stack(images), "label": torch.stack(labels)}


NET, PREDICTIONS = {"net/feature_maps", "net/filters"}, {"val/hardest_images"}


@pytest.mark.parametrize(
    ("kind", "collate", "pictures"),
    [
        (SaysLoss, None, NET),
        (SaysLosses, None, NET),
        (SaysScores, None, NET),
        (SaysMaps, None, NET),
        (SaysLogits, None, NET | PREDICTIONS),
        (OfDictionaries, as_dictionary, set()),
        (OfTwo, None, PREDICTIONS),
    ],
)
def test_a_users_own_module_trains_whatever_it_returns(
    kind: type[SaysLoss], collate: Callable[..., Any] | None, pictures: set[str], tmp_path: Path
) -> None:
    tags = fit(tmp_path, kind(), (1, 8, 8), collate)
    assert set(tags["images"]) == pictures
    assert set(tags["tensors"]) == ({"pr/0", "pr/1", "pr/2"} if pictures >= PREDICTIONS else set())
    assert "train/images_per_second" in tags["scalars"]
    assert len(list(tmp_path.glob("*/last_hidden_layer/tensors.tsv"))) == (kind is SaysLogits)


class Broken(Foreign):
    """With weights that are not finite, none at all, and none but such."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Parameter(torch.tensor([1.0, math.nan, 2.0, math.inf]))
        self.whole = nn.Parameter(torch.full((3,), math.nan))
        self.empty = nn.Parameter(torch.empty(0))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_that_are_not_finite_or_none_do_not_end_the_training(tmp_path: Path) -> None:
    tags = fit(tmp_path, Broken(), (1, 8, 8))
    assert set(tags["histograms"]) == {"weights/layer.weight", "weights/layer.bias", "weights/part"}
    histogram = read(tmp_path).Histograms("weights/part")[-1].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (2, 1, 2)


def test_a_compiled_nets_last_hidden_layer_is_in_the_projector(tmp_path: Path) -> None:
    torch.compiler.reset()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 3))
    compiled: Any = torch.compile(net, backend="eager")
    fit(tmp_path, ImageClassifier(compiled, num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.1)), (1, 8, 8))
    (vectors,) = tmp_path.glob("*/last_hidden_layer/tensors.tsv")
    assert np.loadtxt(vectors).shape == (10, 7)


def test_nothing_is_drawn_where_the_first_process_would_wait_or_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=TensorBoardLogger(str(tmp_path)), enable_checkpointing=False)
    assert len(find_writers(trainer)) == 1
    trainer.sanity_checking = True
    assert find_writers(trainer) == []
    trainer.sanity_checking = False
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    assert find_writers(trainer) == []
    monkeypatch.undo()
    monkeypatch.setattr(type(trainer), "strategy", FSDPStrategy())
    assert find_writers(trainer) == []
