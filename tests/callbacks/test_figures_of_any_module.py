"""The callbacks that draw serve any module: each picture that can be made is, at the right step, and no more."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from src.callbacks.figures import Confusion, Embedding, FeatureMaps, HardestImages, Weights
from tests.callbacks.tasks import NUM_CLASSES, Classifier, Plain, make_images, make_trainer, read

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers", "ignore:.*`training_step` returned `None`"
)

CONFUSION, HARDEST, NET = {"val/confusion"}, {"val/hardest_images"}, {"net/feature_maps", "net/filters"}


def figures() -> list[pl.Callback]:
    return [Confusion(), HardestImages(4), FeatureMaps(), Weights(), Embedding(10)]


def fit(folder: Path, module: pl.LightningModule, collate: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Train for an epoch; what TensorBoard then has."""
    loaders = [DataLoader(make_images(num, drawn_by=num), 8, collate_fn=collate) for num in (24, 26)]
    make_trainer(folder, figures()).fit(module, loaders[0], loaders[1])
    tags: dict[str, Any] = read(folder).Tags()
    return tags


def projector(folder: Path) -> list[tuple[int, ...]]:
    return [np.loadtxt(path).shape for path in folder.glob("*/last_hidden_layer/tensors.tsv")]


def test_colour_images_of_any_size_are_drawn(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    loader = DataLoader(TensorDataset(torch.randn(24, 3, 20, 37), torch.arange(24) % 3), 7)
    make_trainer(tmp_path, figures()).fit(Classifier(net), loader, loader)
    assert set(read(tmp_path).Tags()["images"]) == CONFUSION | HARDEST | NET
    assert projector(tmp_path) == [(10, 4)]  # what the pooling hands to the last layer


def test_a_net_without_convolutions_has_no_maps(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 7), nn.Tanh(), nn.Linear(7, NUM_CLASSES))
    assert set(fit(tmp_path, Classifier(net))["images"]) == CONFUSION | HARDEST
    assert projector(tmp_path) == [(10, 7)]


def test_a_compiled_nets_layers_are_drawn_without_compiling_it_for_them(tmp_path: Path) -> None:
    torch.compiler.reset()
    shapes: set[tuple[int, ...]] = set()

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        shapes.update(tuple(value.shape) for value in inputs if isinstance(value, Tensor) and value.dim() == 4)
        return graph.forward

    compiled: Any = torch.compile(Classifier().net, backend=backend, dynamic=False)
    assert set(fit(tmp_path, Classifier(compiled))["images"]) == CONFUSION | HARDEST | NET
    assert projector(tmp_path) == [(10, 16)]
    assert {shape[0] for shape in shapes if shape[1:] == (1, 12, 12)} == {8, 2}  # batches; pictures had one and ten


def test_a_module_that_says_nothing_is_left_alone(tmp_path: Path) -> None:
    tags = fit(tmp_path, Plain())
    assert tags["images"] == []
    assert tags["tensors"] == []
    assert set(tags["histograms"]) == {"weights/layer.weight", "weights/layer.bias"}
    assert "weights/grad_norm" in tags["scalars"]


class SaysLoss(Classifier):
    """Validation returns the batch's loss."""

    reduction = "mean"

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return F.cross_entropy(*self.predict(batch), reduction=self.reduction)


class SaysLosses(SaysLoss):
    """Validation returns the images' losses."""

    reduction = "none"


class SaysScores(Classifier):
    """Of one class only, with labels that are numbers."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        batch[1] = batch[1].float().unsqueeze(1)
        return self.net(batch[0])[:, :1]


class SaysMaps(Classifier):
    """Logits of each pixel."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch[0].expand(-1, NUM_CLASSES, -1, -1)


class HasMetric(Classifier):
    """``confusion`` is something else than a matrix."""

    def on_validation_epoch_end(self) -> None:
        self.confusion = torch.zeros(NUM_CLASSES)


class OfDictionaries(Classifier):
    """Of batches that are dictionaries."""

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.net(batch["image"]), batch["label"]


class OfTwo(Classifier):
    """Its net takes more than the images."""

    def __init__(self) -> None:
        super().__init__(nn.Bilinear(144, 144, NUM_CLASSES))

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.net(batch[0].flatten(1), batch[0].flatten(1)), batch[1]


def as_dictionary(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*items, strict=True)
    return {"image": torch.stack(images), "label": torch.stack(labels)}


@pytest.mark.parametrize(
    ("kind", "collate", "pictures"),
    [
        (SaysLoss, None, CONFUSION | NET),
        (SaysLosses, None, CONFUSION | NET),
        (SaysScores, None, CONFUSION | NET),
        (SaysMaps, None, CONFUSION | NET),
        (HasMetric, None, HARDEST | NET),
        (OfDictionaries, as_dictionary, CONFUSION),
        (OfTwo, None, CONFUSION | HARDEST),
    ],
)
def test_a_users_own_module_trains_whatever_it_returns(
    kind: type[Classifier], collate: Callable[..., Any] | None, pictures: set[str], tmp_path: Path
) -> None:
    tags = fit(tmp_path, kind(), collate)
    assert set(tags["images"]) == pictures
    assert tags["tensors"] == []
    assert len(projector(tmp_path)) == (kind is HasMetric)


class Graph:
    """A batch of a kind of its own."""

    def __init__(self, items: list[tuple[Tensor, Tensor]]) -> None:
        images, self.labels = map(torch.stack, zip(*items, strict=True))
        self.nodes = images.flatten(1)


class OfGraphs(Plain):
    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.layer(batch.nodes), batch.labels


def test_of_graphs_nothing_is_drawn_and_nothing_raised(tmp_path: Path) -> None:
    tags = fit(tmp_path, OfGraphs(), Graph)
    assert tags["images"] == []


def test_a_net_that_cannot_be_traced_is_mentioned_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = DataLoader(make_images(24, drawn_by=0), 8)
    make_trainer(tmp_path, [Embedding(20)], max_epochs=2).fit(OfTwo(), loader, loader)
    assert caplog.text.count("no pictures of the net's layers") == 1


def test_of_several_validation_loaders_the_first_is_drawn(tmp_path: Path) -> None:
    train, one, other = (DataLoader(make_images(num, drawn_by=num), 8) for num in (24, 26, 40))
    alone, both = (Classifier() for _ in range(2))
    both.load_state_dict(alone.state_dict())
    make_trainer(tmp_path / "alone", figures()).fit(alone, train, one)
    make_trainer(tmp_path / "both", figures()).fit(both, train, [one, other])
    for tag in HARDEST | NET:
        images = [read(tmp_path / name).Images(tag)[0].encoded_image_string for name in ("alone", "both")]
        assert images[0] == images[1], tag


class TwoOptimizers(Classifier):
    """Manual optimization, in which one optimizer steps twice a batch and another once."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[attr-defined]
        for optimizer in (first, first, second):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(*self.predict(batch)))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.05) for _ in range(2)]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Classifier, {"accumulate_grad_batches": 3}),  # the last batch of an epoch of ten steps, too
        (Classifier, {"accumulate_grad_batches": 3, "val_check_interval": 1}),
        (Classifier, {"val_check_interval": 4}),
        (TwoOptimizers, {}),
        (TwoOptimizers, {"val_check_interval": 0.5}),
    ],
)
def test_pictures_are_at_the_step_of_the_scalars(
    kind: type[Classifier], arguments: dict[str, Any], tmp_path: Path
) -> None:
    train, validation = (DataLoader(make_images(num, drawn_by=num), 8) for num in (80, 26))
    module, trainer = kind(), make_trainer(tmp_path, [Confusion(), Weights()], max_epochs=2, **arguments)
    trainer.fit(module, train, validation)
    trainer.validate(module, validation, verbose=False)
    events = read(tmp_path)
    steps = [event.step for event in events.Scalars("val/acc")]
    assert len(set(steps)) > 2
    drawn = [event.step for event in events.Images("val/confusion")]
    assert set(drawn) <= set(steps)
    assert (drawn[:12], drawn[-1]) == (steps[:12], steps[-1])  # later ones are drawn more rarely
    logged = {event.step for event in events.Scalars("weights/grad_norm")}
    assert logged == set(range(max(steps)))


class Broken(Plain):
    """With weights that are not finite, none at all, and none but such."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Parameter(torch.tensor([1.0, math.nan, 2.0, math.inf]))
        self.whole = nn.Parameter(torch.full((3,), math.nan))
        self.empty = nn.Parameter(torch.empty(0))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_that_are_not_finite_or_none_do_not_end_the_training(tmp_path: Path) -> None:
    tags = fit(tmp_path, Broken())
    assert set(tags["histograms"]) == {"weights/layer.weight", "weights/layer.bias", "weights/part"}
    histogram = read(tmp_path).Histograms("weights/part")[-1].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (2, 1, 2)
