from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from src.engine.runs.build import load_checkpoint, restore
from src.train import train
from tests.engine.tiny import compose_tiny


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
def test_a_compiled_net_trains_as_a_plain_one_and_leaves_the_same_checkpoint(tmp_path: Path) -> None:
    checkpoints: list[dict[str, torch.Tensor]] = []
    for callbacks in ("minimal", "[minimal,compile]"):
        counters.clear()
        folder = tmp_path / str(len(checkpoints))
        train(
            compose_tiny(
                folder, f"callbacks={callbacks}", "trainer.limit_train_batches=5", "trainer.max_epochs=1",
                "callbacks.progress=null", "model.net.dropout=0",
            )
        )  # fmt: skip
        assert bool(counters["stats"]["unique_graphs"]) == ("compile" in callbacks)
        checkpoints.append(load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"])
        restore(folder / "checkpoints" / "best.ckpt")
    plain, compiled = checkpoints
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)
