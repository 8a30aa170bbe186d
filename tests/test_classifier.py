import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, roc_auc_score
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import AUROC, CalibrationError, F1Score
from torchvision.transforms.v2 import MixUp

from src.classifier import Counts, ImageClassifier

IMAGES = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(1))
LOADER = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16)  # the last batch is smaller
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def _classifier(**arguments: object) -> ImageClassifier:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    return ImageClassifier(net, num_classes=3, input_size=(1, 4, 4), **arguments)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_test_metrics_are_those_of_sklearn() -> None:
    module = _classifier()
    (metrics,) = pl.Trainer(**QUIET).test(module, LOADER, verbose=False)  # type: ignore[arg-type]
    with torch.no_grad():
        probabilities = module(IMAGES).softmax(dim=1).numpy()
    predictions = probabilities.argmax(axis=1)
    assert metrics["test/acc"] == pytest.approx(accuracy_score(LABELS, predictions))
    assert metrics["test/loss"] == pytest.approx(log_loss(LABELS, probabilities), rel=1e-5)
    assert module.confusion.tolist() == confusion_matrix(LABELS, predictions).tolist()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_training_metrics_are_means_over_the_epochs_images() -> None:
    module = _classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))  # the weights stay
    trainer = pl.Trainer(max_epochs=2, log_every_n_steps=1, **QUIET)  # type: ignore[arg-type]
    trainer.fit(module, LOADER, LOADER)
    with torch.no_grad():
        logits = module(IMAGES)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(
        nn.functional.cross_entropy(logits, LABELS).item(), rel=1e-5
    )
    assert trainer.callback_metrics["train/acc"].item() == pytest.approx(accuracy_score(LABELS, logits.argmax(dim=1)))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_step_is_that_of_plain_pytorch() -> None:
    module = _classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    plain.load_state_dict(module.net.state_dict())
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, log_every_n_steps=1, **QUIET)  # type: ignore[arg-type]
    trainer.fit(module, LOADER, LOADER)
    nn.functional.cross_entropy(plain(IMAGES[:16]), LABELS[:16]).backward()
    for ours, theirs in zip(module.net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)  # type: ignore[operator]


def test_the_sum_of_the_losses_does_not_drift_at_millions_of_images() -> None:
    counts = Counts(3)
    logits, labels = torch.eye(3)[:2], torch.zeros(2, dtype=torch.long)
    batches = [2.0**24, *[0.3, 0.1, 0.7] * 300]  # in single precision 2**25 + 0.6 is 2**25
    losses = torch.tensor(batches)
    for loss in losses:
        counts.update(loss, logits, labels)
    exact = math.fsum(2 * loss for loss in losses.tolist())
    assert float(counts.loss_sum) == pytest.approx(exact, abs=2)  # a unit in the last place is 4
    assert exact - 2**25 > 600


def test_cannot_be_trained_without_an_optimizer() -> None:
    with pytest.raises(ValueError, match="it can be tested, not trained"):
        _classifier().configure_optimizers()


def test_a_loss_with_parameters_is_trained() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(self.scale * logits, labels)

    module = _classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), loss=Scaled())
    pl.Trainer(max_epochs=1, log_every_n_steps=1, **QUIET).fit(module, LOADER, LOADER)  # type: ignore[arg-type]
    assert module.loss.scale.item() != 1.0  # type: ignore[attr-defined]


def test_counts_are_sums_that_several_processes_can_add_up() -> None:
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(2))
    whole, parts = Counts(3), [Counts(3), Counts(3)]
    whole.update(nn.functional.cross_entropy(logits, LABELS), logits, LABELS)
    for part, rows in zip(parts, (slice(0, 17), slice(17, 50)), strict=True):
        part.update(nn.functional.cross_entropy(logits[rows], LABELS[rows]), logits[rows], LABELS[rows])
    loss, accuracy, confusion = whole.compute()
    assert torch.equal(parts[0].confusion + parts[1].confusion, confusion)
    torch.testing.assert_close((parts[0].loss_sum + parts[1].loss_sum) / 50, loss)
    assert accuracy.item() == pytest.approx(accuracy_score(LABELS, logits.argmax(dim=1)))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_further_metrics_are_those_of_sklearn_and_of_a_definition_in_each_split() -> None:
    metrics = {
        "f1": F1Score(task="multiclass", num_classes=3, average="macro"),
        "auroc": AUROC(task="multiclass", num_classes=3),
        "ece": CalibrationError(task="multiclass", num_classes=3),
    }
    module = _classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), metrics=metrics)
    trainer = pl.Trainer(max_epochs=2, log_every_n_steps=1, **QUIET)  # type: ignore[arg-type]
    trainer.fit(module, LOADER, LOADER)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    (tested,) = trainer.test(module, LOADER, verbose=False)
    with torch.no_grad():
        probabilities = module(IMAGES).softmax(dim=1).numpy()
    chances, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == LABELS.numpy()
    gaps = np.bincount((15 * chances).astype(int), is_right - chances)  # in 15 bins
    expected = {
        "ece": np.abs(gaps).sum() / len(LABELS),
        "f1": f1_score(LABELS, probabilities.argmax(axis=1), average="macro"),
        "auroc": roc_auc_score(LABELS, probabilities, multi_class="ovr", average="macro"),
    }
    for name, value in expected.items():
        for split, found in (("train", logged), ("val", logged), ("test", tested)):
            assert found[f"{split}/{name}"] == pytest.approx(value, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_images_that_are_mixed_up_are_trained_as_in_plain_pytorch_and_counted_by_the_larger_share() -> None:
    mix_up = MixUp(num_classes=3)
    module = _classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    torch.manual_seed(0)
    images, labels = mix_up(IMAGES, LABELS)
    assert labels.shape == (50, 3)
    loss = module.training_step((images, labels), 0)
    torch.testing.assert_close(loss, -(labels * module(images).log_softmax(dim=1)).sum(dim=1).mean())
    expected = accuracy_score(labels.argmax(dim=1), module(images).argmax(dim=1))
    assert module.train_counts.compute()[1].item() == pytest.approx(expected)


def test_the_loss_may_be_arguments_of_cross_entropy() -> None:
    module = _classifier(loss={"weight": [1, 1, 5], "label_smoothing": 0.1})
    logits, labels = torch.randn(4, 3), torch.tensor([2, 0, 2, 1])
    expected = F.cross_entropy(logits, labels, torch.tensor([1.0, 1.0, 5.0]), label_smoothing=0.1)
    torch.testing.assert_close(module.loss(logits, labels), expected)
    assert list(module.state_dict())[-1] == "loss.weight"  # it goes where the module goes
    plain = _classifier(loss={"weight": None})
    torch.testing.assert_close(plain.loss(logits, labels), F.cross_entropy(logits, labels))
    assert not [name for name in plain.state_dict() if "loss." in name]
