"""The recipes of conf/experiment: what they say, and that a shortened run of each comes as far as it should."""

import re
from pathlib import Path

import pytest

from src.engine.settings.check import CONF
from src.train import train
from tests.compose import compose_cfg

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))

# Test accuracies that shortened runs on all of MNIST must reach: about the lowest of five seeds, less half a point.
FLOORS = {
    "baseline": (["trainer.max_epochs=1"], 0.965),
    "best": (["trainer.max_epochs=2", "callbacks.weight_averaging.decay=0.99"], 0.965),  # 0.999 averages two epochs
    "fast": ([], 0.985),  # in full
    "paper1998": (["trainer.max_epochs=1"], 0.965),
    "paper1998_distorted": (["trainer.max_epochs=1"], 0.965),
}


def test_each_measured_recipe_has_a_floor() -> None:
    assert set(FLOORS) == set(EXPERIMENTS) - {"baseline_fashion", "finetune_resnet18"}


@pytest.mark.slow
@pytest.mark.full_mnist
@pytest.mark.parametrize("name", FLOORS)
def test_a_shortened_run_reaches_its_floor(name: str, tmp_path: Path, full_mnist_root: Path) -> None:
    shortened, floor = FLOORS[name]
    common = (f"data.root={full_mnist_root}", "data.source=files", "trainer=cpu", "callbacks.description=null")
    metrics = train(compose_cfg(tmp_path, f"experiment={name}", *common[: 3 + (name != "fast")], *shortened))
    print(f"{name}: {metrics['test/acc']:.4f}")
    assert metrics["test/acc"] >= floor


@pytest.mark.slow
def test_the_fashion_recipe_trains_on_files_of_its_own(tmp_path: Path, mnist_root: Path) -> None:
    raw = tmp_path / "data" / "FashionMNIST"
    raw.mkdir(parents=True)
    (raw / "raw").symlink_to(mnist_root / "MNIST" / "raw")
    metrics = train(
        compose_cfg(
            tmp_path, "experiment=baseline_fashion", f"data.root={tmp_path}/data", "data.source=files", "data.md5=null",
            "data.val_size=60", "trainer=cpu", "callbacks=minimal", "trainer.log_every_n_steps=1",
        )
    )  # fmt: skip
    assert metrics["test/acc"] > 0.9


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_recipe_is_a_lab_record(name: str) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert f"# command:  python -m src.train experiment={name}\n" in text
    assert re.search(r"^# (result|not measured): ", text, re.M)
