"""The checkpoint of release 0.1.0: it must load for ever after."""

from pathlib import Path

import pytest

from src.data.mnist import MNISTDataModule, preprocess
from src.engine.runs.build import load_checkpoint, restore, restore_datamodule
from src.train import train
from tests.compose import compose_cfg

RELEASE = Path(__file__).with_name("release-0.1.0.ckpt")  # two epochs


def test_a_checkpoint_of_an_earlier_release_still_predicts_what_it_did() -> None:
    module, datamodule = restore(RELEASE), restore_datamodule(RELEASE)
    datamodule.setup("test")
    assert isinstance(datamodule, MNISTDataModule)
    images, labels = datamodule.splits["test"]
    correct = int((module(preprocess(images)).argmax(dim=1) == labels).sum())
    assert correct == pytest.approx(341, abs=2)  # of 500; another machine may round one otherwise


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_of_an_earlier_release_goes_on(tmp_path: Path) -> None:
    settings = (
        "data=mnist5k", "data.augment=affine", "optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false",
        "optimizer.lr=0.1", "scheduler=step", "trainer=cpu", "callbacks.summary=null", "logger=[]",
    )  # fmt: skip
    metrics = train(compose_cfg(tmp_path, *settings, "trainer.max_epochs=3", f"ckpt_path={RELEASE}"))
    assert metrics["val/acc"] > 0.75  # 0.71 so far
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["epoch"] == 3
