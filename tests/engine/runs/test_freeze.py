"""Frozen weights stay to the bit, and what trains beside them and afterwards is what plain torch trains."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.engine.errors import ConfigError
from src.engine.runs.build import build_module, load_checkpoint
from src.train import train
from tests.engine.equality import assert_same_run
from tests.engine.runs.test_last_checkpoint import interrupt, run
from tests.engine.runs.test_resume import KILL, Runs
from tests.engine.tiny import TinyData, TinyTask, compose_tiny
from tests.marks import by_default


class NormedNet(nn.Sequential):
    """Maps rows (B, 4) to logits (B, 2)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        )


NET = ("~model.net.num_hidden", "~model.net.dropout", f"model.net._target_={__name__}.NormedNet")
FROZEN = ("net.0", "net.1")
ADAMW = ("optimizer=adamw", "optimizer.lr=0.02", "optimizer.weight_decay=0.1", "optimizer.fused=false")
FREEZE = ("callbacks=[minimal,freeze]", "callbacks.freeze.match=[net.0,net.1]")
SHORT = ("trainer.log_every_n_steps=1", "test=false", *ADAMW, *NET, *FREEZE)


def by_hand(start: dict[str, Tensor], until_epoch: int, num_epochs: int) -> dict[str, Tensor]:
    """The weights after some epochs in plain torch, where the frozen parts begin to train at ``until_epoch``."""
    net = NormedNet()
    net.load_state_dict(start)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1)
    loader = TinyData(seed=42).train_dataloader()
    for epoch in range(num_epochs):
        loader.set_epoch(epoch)
        net.train()
        if epoch < until_epoch:
            net[1].eval()
        for rows, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(rows), labels).backward()
            if epoch < until_epoch:
                for part in (net[0], net[1]):
                    for parameter in part.parameters():
                        parameter.grad = None
            optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize(("until_epoch", "num_epochs"), by_default([(1, 3), (None, 2), (1, 1)]))
def test_weights_are_those_of_a_loop_in_plain_torch(until_epoch: int | None, num_epochs: int, tmp_path: Path) -> None:
    until = f"callbacks.freeze.until_epoch={'null' if until_epoch is None else until_epoch}"
    cfg = compose_tiny(tmp_path, *SHORT, until, f"trainer.max_epochs={num_epochs}")
    module: Any = build_module(cfg)
    start = {name: tensor.clone() for name, tensor in module.net.state_dict().items()}
    torch.save(module.state_dict(), tmp_path / "start.pt")
    train(
        compose_tiny(tmp_path, *SHORT, until, f"trainer.max_epochs={num_epochs}", f"init.weights={tmp_path}/start.pt")
    )
    last = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    expected = by_hand(start, num_epochs if until_epoch is None else until_epoch, num_epochs)
    for name, tensor in expected.items():
        torch.testing.assert_close(last["state_dict"][f"net.{name}"], tensor, msg=name)
        is_frozen = f"net.{name}".startswith(FROZEN) and num_epochs <= (until_epoch or num_epochs)
        assert torch.equal(last["state_dict"][f"net.{name}"], start[name]) is is_frozen
    (optimizer,) = last["optimizer_states"]
    assert len(optimizer["param_groups"][0]["params"]) == len(list(module.parameters()))


@pytest.mark.filterwarnings("ignore:(Experiment logs|Checkpoint) directory .* exists and is not empty")
@pytest.mark.parametrize("steps", by_default([12, 7, 17]))  # between the frozen epoch and the next, in either
def test_a_resumed_run_ends_as_the_uninterrupted_one_to_the_bit(steps: int, tmp_path: Path) -> None:
    settings = (*SHORT, "trainer.max_epochs=2", "callbacks.last.every_n_steps=5")
    whole = run(tmp_path / "whole", *settings)
    assert_same_run(whole, interrupt(tmp_path / "killed", steps, *settings))


@pytest.mark.slow
def test_a_fine_tuning_killed_in_its_frozen_epoch_and_after_it_resumes_to_the_bit(tmp_path: Path) -> None:
    """Weights from a file, a rate of its own for the head, and real kills at steps 37 and 63; an epoch has 50."""
    runs, start = Runs(tmp_path), tmp_path / "start.pt"
    torch.save(build_module(compose_tiny(tmp_path, *NET)).state_dict(), start)
    head = "optimizer_groups=[{match: net.5, lr: 0.05}]"
    until = ("callbacks.freeze.until_epoch=1", "~callbacks.averaging")
    tuning = (*ADAMW, *NET, *FREEZE, *until, f"init.weights={start}", head)
    whole = runs.whole("whole", *tuning)
    runs.kill("killed", 37, *tuning)
    killed, begun = load_checkpoint(runs.last("killed"))["state_dict"], torch.load(start)
    assert all(torch.equal(killed[name], begun[name]) for name in begun if name.startswith(FROZEN))
    runs.end(runs.start(f"resume={runs.path('killed')}", f"{KILL}.step=63"), status=-signal.SIGKILL)
    runs.resume("killed", f"{KILL}=null")
    assert_same_run(whole, runs.path("killed"))


class Sparing(TinyTask):
    """Gives its optimizer only what requires gradients."""

    def configure_optimizers(self) -> Any:
        assert self.optimizer is not None
        return self.optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("until_epoch", "expected"), by_default([("1", 10), ("null", 6)]))
def test_the_optimizer_has_what_is_trained_at_any_time(until_epoch: str, expected: int, tmp_path: Path) -> None:
    until = f"callbacks.freeze.until_epoch={until_epoch}"
    train(compose_tiny(tmp_path, *SHORT, until, "trainer.max_epochs=2", f"model._target_={__name__}.Sparing"))
    last = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert len(last["optimizer_states"][0]["state"]) == expected


@pytest.mark.slow
def test_several_processes_thaw_the_same_weights(tmp_path: Path) -> None:
    from tests.compose import run_command
    from tests.engine.tiny import TINY

    settings = [word for word in SHORT if not word.startswith("callbacks=")]
    result = run_command(
        "train", *TINY, *settings, "callbacks=[minimal,freeze]", "trainer=ddp_cpu", "trainer.max_epochs=2",
        f"hydra.run.dir={tmp_path}/run", PROJECT_ROOT=str(tmp_path), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["optimizer_states"][0]["state"]) == 10


def test_a_name_that_fits_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.freeze\.match=net\.9: fits no name in the module; "):
        train(compose_tiny(tmp_path, *SHORT, "callbacks.freeze.match=net.9"))
