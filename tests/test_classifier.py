from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from src.classifier import ImageClassifier
from src.engine.errors import ArgumentError

IMAGES = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(1))
LOADER = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16)  # the last batch is smaller
UNKNOWN: dict[str, Any] = {"foo": 1}
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


def test_cannot_be_trained_without_an_optimizer() -> None:
    with pytest.raises(ValueError, match="built without an optimizer"):
        _classifier().configure_optimizers()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"optimizer": partial(torch.optim.Adam, **UNKNOWN)}, r"optimizer\.foo: torch\.optim\.adam\.Adam takes no"),
        (
            {"scheduler": {"scheduler": partial(torch.optim.lr_scheduler.StepLR, **UNKNOWN)}},
            r"scheduler\.scheduler\.foo: torch\.optim\.lr_scheduler\.StepLR takes no such argument",
        ),
    ],
)
def test_an_argument_that_the_optimizer_does_not_take_is_refused_at_once(
    arguments: dict[str, object], said: str
) -> None:
    with pytest.raises(ArgumentError, match=said):
        _classifier(**arguments)


def test_an_optimizer_that_takes_any_argument_gets_it() -> None:
    def make(parameters: object, **rest: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, **rest)  # type: ignore[arg-type]

    assert _classifier(optimizer=partial(make, lr=0.5)).configure_optimizers().defaults["lr"] == 0.5  # type: ignore


@pytest.mark.parametrize("is_compiled", [(True, False), (False, True), (True, True)])
def test_compiled_and_plain_nets_load_each_others_weights(is_compiled: tuple[bool, bool]) -> None:
    modules = []
    for seed, compile_it in enumerate(is_compiled):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        if compile_it:
            net = torch.compile(net, backend="eager")  # type: ignore[assignment]
        modules.append(ImageClassifier(net, num_classes=3))
    trained, fresh = modules
    assert ("net._orig_mod.1.weight" in trained.state_dict()) == is_compiled[0]
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(IMAGES), trained(IMAGES))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_checkpoint_of_a_compiled_net_goes_on_with_a_plain_one_and_the_other_way_round(
    compiled_first: bool, tmp_path: Path
) -> None:
    def fit(max_epochs: int, is_compiled: bool, ckpt_path: Path | None = None) -> pl.Trainer:
        torch.manual_seed(0 if ckpt_path is None else 1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        module = ImageClassifier(
            torch.compile(net, backend="eager") if is_compiled else net,  # type: ignore[arg-type]
            num_classes=3,
            optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        )
        trainer = pl.Trainer(max_epochs=max_epochs, limit_train_batches=1, log_every_n_steps=1, **QUIET)  # type: ignore
        trainer.fit(module, LOADER, LOADER, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    path = tmp_path / "last.ckpt"
    fit(1, compiled_first).save_checkpoint(path)
    names = torch.load(path, weights_only=True)["state_dict"].keys()
    assert ("net._orig_mod.1.weight" in names) == compiled_first
    rest, whole = (
        list(trainer.lightning_module.parameters())
        for trainer in (fit(2, not compiled_first, ckpt_path=path), fit(2, is_compiled=False))
    )
    torch.testing.assert_close(rest, whole)


def test_names_that_do_not_fit_are_still_refused() -> None:
    state = _classifier().state_dict()
    state["net._orig_mod.7.weight"] = state.pop("net.1.weight")
    with pytest.raises(RuntimeError, match=r'Missing key.*"net\.1\.weight"'):
        _classifier().load_state_dict(state)
