"""Any valid config trains, keeps its checkpoints and tests: random options of all groups together."""

import math
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from src.engine.runs.build import load_checkpoint, restore
from src.engine.settings.check import check
from src.train import train
from tests.engine.tiny import compose_tiny

STEPS = 3
CLIPPED = {
    "optimizer.fused=true",
    "trainer.precision=bf16-mixed",
    "trainer.gradient_clip_val=0.5",
}  # do not go together


def _options(key: str, *options: object) -> SearchStrategy[str]:
    return st.sampled_from([f"{key}={option}" for option in options])


OVERRIDES = st.tuples(
    st.integers(0, 2**32 - 1).map("seed={}".format),
    _options("monitor", "val/acc mode=max", "val/loss mode=min"),
    _options("test", "true", "false"),
    st.integers(8, 99).map("data.num_rows={}".format),
    st.integers(1, 125).map("data.batch_size={}".format),
    _options("data.noise", 0.0, 0.1),
    st.integers(1, 30).map("model.net.num_hidden={}".format),
    _options("optimizer", "adam", "adamw", "sgd"),
    st.floats(1e-6, 3e-2).map("optimizer.lr={}".format),
    st.floats(0, 0.1).map("optimizer.weight_decay={}".format),
    _options("optimizer.fused", "true", "false", "null"),
    _options("scheduler", "onecycle", "cosine", "step", "plateau", "[]"),
    _options("callbacks", "minimal", "[minimal,early_stopping]", "[minimal,device_stats]"),
    _options("callbacks.last.every_n_steps", "null", 1, 2),
    _options("logger", "[]", "tensorboard", "csv", "[tensorboard,csv]"),
    _options("trainer.precision", "32-true", "bf16-mixed"),
    _options("trainer.max_epochs", 1, 2),
    _options("trainer.accumulate_grad_batches", 1, 2),
    _options("trainer.gradient_clip_val", "null", 0.5),
    _options("trainer.deterministic", "true", "false"),
    _options("trainer.num_sanity_val_steps", 0, 1),
    _options("trainer.limit_val_batches", "null", 1),
    _options("trainer.limit_test_batches", "null", 1),
).filter(lambda chosen: not set(chosen) >= CLIPPED)


def _assert_trains(chosen: tuple[str, ...], folder: Path) -> None:
    limits = (f"trainer.limit_train_batches={STEPS}", "trainer.log_every_n_steps=1")
    cfg = compose_tiny(folder, *limits, *" ".join(chosen).split())
    check(cfg)
    metrics = train(cfg)
    expected = {"train/loss", "val/loss", "val/acc"} | ({"test/loss", "test/acc"} if cfg.test else set())
    assert expected <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(0 <= metrics[name] <= 1 for name in expected if name.endswith("/acc"))
    num_parameters = 7 * cfg.model.net.num_hidden + 2
    for name in ("best", "last"):
        module = restore(folder / "checkpoints" / f"{name}.ckpt")
        assert sum(parameter.numel() for parameter in module.parameters()) == num_parameters
    batches = min(STEPS, math.ceil(cfg.data.num_rows / cfg.data.batch_size))
    steps = math.ceil(batches / cfg.trainer.accumulate_grad_batches) * cfg.trainer.max_epochs
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == steps


# No shrinking: an example is a second of training, and the override at fault shows in the message.
COMMON = settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate])


@settings(COMMON, max_examples=6)
@given(chosen=OVERRIDES)
def test_a_valid_config_trains_and_tests(chosen: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> None:
    _assert_trains(chosen, tmp_path_factory.mktemp("run"))


@pytest.mark.slow
@settings(COMMON, max_examples=100)
@given(chosen=OVERRIDES)
def test_a_hundred_valid_configs_train_and_test(
    chosen: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    _assert_trains(chosen, tmp_path_factory.mktemp("run"))
