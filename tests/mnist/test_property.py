"""Any valid config of LeNet-5 and MNIST trains, keeps its checkpoints and tests: random options of all groups."""

import math
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from src.engine.runs.build import load_checkpoint, restore
from src.engine.runs.evaluate import test_checkpoint as run_test_checkpoint  # pytest would collect it by its own name
from src.engine.settings.check import CONF, check
from src.train import train
from tests.compose import compose_cfg
from tests.mnist.files import NUM_TRAIN

NUM_PARAMETERS = 61_706  # of LeNet-5, by hand: 156 + 2,416 + 48,120 + 10,164 + 850
STEPS = 2
AVERAGED = [f"[minimal,{path.stem}]" for path in (CONF / "callbacks").glob("weight_averaging.yaml")]

# Lightning's table then says the size of the weights as of 32 bits, which they have.
pytestmark = pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")


CLIPPED = {"optimizer.fused=true", "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=0.5"}  # test_config.py


def _options(key: str, *options: object) -> SearchStrategy[str]:
    return st.sampled_from([f"{key}={option}" for option in options])


OVERRIDES = st.tuples(
    st.integers(0, 2**32 - 1).map("seed={}".format),
    _options("monitor", "val/acc mode=max", "val/loss mode=min"),
    _options("test", "true", "false"),
    _options("data.augment", "none", "affine", "elastic"),
    _options("data.train_size", "null", "50"),
    st.integers(1, 125).map("data.batch_size={}".format),
    st.integers(1, 30).map("data.eval_batch_size={}".format),  # half of the test batches are one or more
    st.integers(1, 50).map("data.val_size={}".format),
    st.integers(0, 2**32 - 1).map("data.split_seed={}".format),
    _options("model.net.activation", "relu", "tanh"),
    _options("model.net.pooling", "avg", "max"),
    _options("optimizer", "adam", "adamw", "sgd"),
    st.floats(1e-6, 3e-2).map("optimizer.lr={}".format),
    st.floats(0, 0.1).map("optimizer.weight_decay={}".format),
    _options("optimizer.fused", "true", "false", "null"),
    _options("scheduler", "onecycle", "cosine", "step", "plateau", "[]"),
    _options("callbacks", "default", "minimal", "[default,early_stopping,device_stats]", *AVERAGED),
    _options("logger", "[]", "tensorboard", "csv", "[tensorboard,csv]"),
    _options("trainer.precision", "32-true", "bf16-mixed"),
    _options("trainer.max_epochs", 1, 2),
    _options("trainer.accumulate_grad_batches", 1, 2),
    _options("trainer.gradient_clip_val", "null", 0.5),
    _options("trainer.deterministic", "true", "false"),
    _options("trainer.num_sanity_val_steps", 0, 1),
    _options("trainer.limit_val_batches", "null", 1),
    _options("trainer.limit_test_batches", "null", 1, 0.5),
).filter(lambda chosen: not set(chosen) >= CLIPPED)


def _assert_trains(chosen: tuple[str, ...], folder: Path, data: Path) -> None:
    cfg = compose_cfg(
        folder, *" ".join(chosen).split(), f"data.root={data}", "data.source=files", "data.md5=null", "trainer=cpu",
        f"trainer.limit_train_batches={STEPS}", "trainer.log_every_n_steps=1",
    )  # fmt: skip
    check(cfg)
    metrics = train(cfg)
    splits = {"train", "val"} | ({"test"} if cfg.test else set())
    assert {f"{split}/{name}" for split in splits for name in ("loss", "acc")} <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(0 <= metrics[f"{split}/acc"] <= 1 for split in splits)
    for name in ("best", "last"):
        checkpoint = folder / "checkpoints" / f"{name}.ckpt"
        assert sum(parameter.numel() for parameter in restore(checkpoint).parameters()) == NUM_PARAMETERS
    num_images = cfg.data.train_size or NUM_TRAIN - cfg.data.val_size
    batches = min(STEPS, math.ceil(num_images / cfg.data.batch_size))
    steps = math.ceil(batches / cfg.trainer.accumulate_grad_batches) * cfg.trainer.max_epochs
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == steps
    if cfg.test and cfg.trainer.limit_test_batches is None and cfg.trainer.precision == "32-true":
        device = {"accelerator": "cpu", "devices": 1}
        tested = run_test_checkpoint(folder / "checkpoints" / "best.ckpt", folder / "test", device)["metrics"]
        assert tested["test/acc"] == pytest.approx(metrics["test/acc"])


# No shrinking: an example is a second of training, and the override at fault shows in the message.
COMMON = settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate])


@settings(COMMON, max_examples=3)
@given(chosen=OVERRIDES)
def test_a_valid_config_trains_and_tests(
    chosen: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, mnist_root: Path
) -> None:
    _assert_trains(chosen, tmp_path_factory.mktemp("run"), mnist_root)


@pytest.mark.slow
@settings(COMMON, max_examples=100)
@given(chosen=OVERRIDES)
def test_a_hundred_valid_configs_train_and_test(
    chosen: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, mnist_root: Path
) -> None:
    _assert_trains(chosen, tmp_path_factory.mktemp("run"), mnist_root)
