"""Images in folders: exact with any number of workers, and a fine-tuning from weights to a test."""

import json
import multiprocessing
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from src.data.image_folder import ImageFolderDataModule
from src.engine.errors import DataError
from src.engine.runs.build import build_datamodule, load_checkpoint, restore, restore_datamodule
from src.train import train
from tests.compose import compose_cfg
from tests.engine.equality import assert_same_run
from tests.engine.runs.test_last_checkpoint import KILL, Kill

COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 50, 40)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small noisy images of three colours."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in {"train": 8, "val": 4, "test": 4}.items():
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(draw.normal(colour, 60, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def make(root: Path, num_workers: int, **arguments: Any) -> ImageFolderDataModule:
    train_transform = v2.Compose([v2.RandomResizedCrop([32, 32]), v2.ColorJitter(0.5)])
    eval_transform = v2.CenterCrop([32, 32])
    datamodule = ImageFolderDataModule(
        str(root), train_transform, eval_transform, batch_size=5, num_workers=num_workers, seed=3, **arguments
    )
    datamodule.setup()
    return datamodule


def batches(datamodule: ImageFolderDataModule, epoch: int) -> list[tuple[Tensor, Tensor]]:
    loader = datamodule.train_dataloader()
    loader.set_epoch(epoch)
    found = list(loader)
    datamodule.teardown()
    return found


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(mine, theirs)
        for left, right in zip(one, other, strict=True)
        for mine, theirs in zip(left, right, strict=True)
    )


def test_what_is_drawn_depends_on_seed_epoch_and_image_only(root: Path) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    alone = batches(make(root, 0), epoch=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(alone, batches(make(root, 2), epoch=1))
    assert not same(alone, batches(make(root, 0), epoch=2))
    assert [len(labels) for _, labels in alone] == [5, 5, 5, 5, 4]
    assert sorted(torch.cat([labels for _, labels in alone]).tolist()) == sorted([0, 1, 2] * 8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_state_continues_after_the_batches_that_were_handed_out(num_workers: int, root: Path) -> None:
    whole, datamodule = batches(make(root, num_workers), epoch=4), make(root, num_workers)
    loader = datamodule.train_dataloader()
    loader.set_epoch(4)
    iterator = iter(loader)
    assert same([next(iterator), next(iterator)], whole[:2])  # workers are ahead of this
    resumed = make(root, num_workers).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert same(list(resumed), whole[2:])
    del iterator
    resumed.end_workers()
    datamodule.teardown()


def test_the_workers_end_in_good_order_with_the_training(root: Path) -> None:
    datamodule = make(root, 2)
    loader = datamodule.train_dataloader()
    list(loader)
    workers = multiprocessing.active_children()[-2:]
    again = datamodule.train_dataloader()  # as trainer.reload_dataloaders_every_n_epochs has it
    assert [worker.exitcode for worker in workers] == [0, 0]  # -15: killed after five seconds each
    list(again)
    workers = multiprocessing.active_children()[-2:]
    datamodule.teardown()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list(loader)) == 5  # new ones
    loader.end_workers()


def test_images_are_torchvisions_by_hand(root: Path) -> None:
    datamodule = make(root, 0, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    (images, labels), *_ = datamodule.test_dataloader()
    path = root / "test" / "blue" / "0.png"
    plain = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[:, 4:36, 8:40]
    assert torch.equal(images[0], plain)
    assert torch.equal(torch.from_numpy(datamodule.read_images(path))[0], plain)
    given, _ = datamodule.on_after_batch_transfer((images, labels), 0)
    mean, std = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).view(2, 3, 1, 1)
    torch.testing.assert_close(given[0], (plain / 255 - mean) / std)
    assert datamodule.classes == ["blue", "green", "red"]


def test_missing_folders_and_other_classes_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root=.*: expected train/<class>/<image>"):
        make(tmp_path, 0)
    for split, name in (("train", "a"), ("val", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / split / name / "0.png")
    with pytest.raises(DataError, match=r"val has other classes than train: \['b'\]"):
        make(tmp_path, 0)


class SmallResNet(nn.Module):
    """The names of a ResNet, and few weights."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layer1(self.bn1(self.conv1(images)).relu())
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits


def finetune(folder: Path, root: Path, net: str, weights: Path, *overrides: str) -> Path:
    cfg = compose_cfg(
        folder, "experiment=finetune_resnet18", f"data.root={root}", f"init.weights={weights}", "model.num_classes=3",
        "model.input_size=[3,32,32]", f"model.net._target_={net}", "trainer=cpu", "trainer.max_epochs=3",
        "data.batch_size=6",
        "callbacks=[minimal,freeze]", "logger=[tensorboard]", "trainer.log_every_n_steps=1",
        "callbacks.last.every_n_steps=1", "scheduler.scheduler.warmup=2", *overrides,
    )  # fmt: skip
    for node in (cfg.data.train_transform.transforms[0], cfg.data.eval_transform.transforms[1]):
        node.size = [32, 32]
    cfg.data.eval_transform.transforms[0].size = 36
    with suppress(Kill):
        train(cfg)
    return folder


def check_run(root: Path, folder: Path, net: str, state: dict[str, Tensor], *overrides: str) -> None:
    """Fine-tune whole, and killed in the frozen epoch of 4 steps and after it."""
    weights = folder / "weights.pth"
    torch.save(state, weights)
    whole = finetune(folder / "whole", root, net, weights, *overrides)
    metrics = json.loads((whole / "metrics.json").read_text())["metrics"]
    assert {"val/acc", "val/f1", "test/f1"} <= metrics.keys()
    frozen = finetune(folder / "frozen", root, net, weights, *overrides, "trainer.max_epochs=1", "test=false")
    for name, tensor in load_checkpoint(frozen / "checkpoints" / "last.ckpt")["state_dict"].items():
        own = name.removeprefix("net.")
        assert torch.equal(tensor, state[own]) is not own.startswith("fc.")
    for steps in (2, 6):
        killed = folder / f"killed-{steps}"
        finetune(killed, root, net, weights, *overrides, KILL % steps)
        finetune(killed, root, net, weights, *overrides, f"ckpt_path={killed}/checkpoints/last.ckpt")
        assert_same_run(whole, killed)


pytestmark = pytest.mark.filterwarnings("ignore:(Experiment logs|Checkpoint) directory .* exists and is not empty")


@pytest.mark.slow
def test_a_fine_tuning_that_is_killed_ends_as_the_uninterrupted_one(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    check_run(root, tmp_path, f"{__name__}.SmallResNet", SmallResNet(5).state_dict(), "data.num_workers=0")
    checkpoint = tmp_path / "whole" / "checkpoints" / "best.ckpt"
    (tmp_path / "weights.pth").unlink()
    assert restore(checkpoint).num_classes == 3
    assert restore_datamodule(checkpoint).classes == ["blue", "green", "red"]


@pytest.mark.slow
def test_resnet18_is_fine_tuned(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    check_run(root, tmp_path, "torchvision.models.resnet18", torchvision.models.resnet18().state_dict())


@pytest.mark.slow
def test_a_batch_is_mixed_up_to_train_on_only(root: Path) -> None:
    node = compose_cfg(root, "data=image_folder", f"data.root={root}").data
    OmegaConf.update(node, "batch_transform", {"_target_": "torchvision.transforms.v2.MixUp", "num_classes": 3})
    datamodule: Any = build_datamodule(OmegaConf.create({"data": {**node, "seed": 0}}))
    datamodule.setup()
    batch = (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]))
    assert datamodule.on_after_batch_transfer(batch, 0)[1].shape == (4,)
    datamodule.trainer = type("Training", (), {"training": True})()
    assert datamodule.on_after_batch_transfer(batch, 0)[1].shape == (4, 3)
