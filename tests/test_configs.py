"""What the tests compose in little time is what Hydra composes."""

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from src.engine.settings.check import CONF
from tests.configs import compose_fast, compose_slowly


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer=cpu", "callbacks=[minimal,early_stopping]", "logger=[]", "scheduler=plateau", "trainer.max_epochs=2"),
        ("+tags=[a]", "++seed=3", "~callbacks.summary", "+callbacks.mine={_target_: x.Y}", "monitor=null"),
        ("~logger", "+callbacks/more=minimal", f"hydra.searchpath=[file://{CONF}]", "test=${seed}", "seed=4"),
    ],
)
def test_values_are_set_as_hydra_sets_them(overrides: tuple[str, ...]) -> None:
    for _ in range(2):  # the second time with files that have been composed before
        fast, slow = compose_fast("train", *overrides), compose_slowly("train", overrides)
        assert OmegaConf.to_yaml(fast) == OmegaConf.to_yaml(slow)
        assert OmegaConf.is_struct(fast)
        assert OmegaConf.is_struct(slow)
        fast.seed = 5


@pytest.mark.parametrize("override", ["sed=1", "optimizer.lrr=1", "~nothing", "+seed=1"])
def test_what_hydra_refuses_is_refused(override: str) -> None:
    with pytest.raises(ConfigCompositionException) as slow:
        compose_slowly("train", [override])
    with pytest.raises(ConfigCompositionException) as fast:
        compose_fast("train", override)
    assert str(fast.value) == str(slow.value)
