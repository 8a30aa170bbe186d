"""optimizer_groups: rates and weight decay by name, for modules that are written as their communities write them."""

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.engine.errors import ConfigError
from src.engine.runs.build import build_module, load_checkpoint, seed_everything
from src.engine.runs.groups import divide
from src.train import train
from tests.engine.runs.test_build import UPSTREAM, UpstreamTask
from tests.engine.tiny import TinyData, TinyNet, TinyTask, compose_tiny

# The last layer's own rate, no decay for any bias; the first layer's weights are left to the optimizer.
GROUPS = "optimizer_groups=[{match: net.3, lr: 0.5, no_decay: true}, {match: '*.bias', weight_decay: 0, name: biases}]"
SGD = ("optimizer=sgd", "optimizer.lr=0.05", "optimizer.weight_decay=0.1", "optimizer.fused=false")
SHORT = ("trainer.max_epochs=2", "trainer.log_every_n_steps=1", "test=false", "model.net.dropout=0")


def by_hand(module: Any, settings: dict[str, tuple[float, float]], num_epochs: int) -> dict[str, Tensor]:
    """The weights after some epochs of a loop in plain torch: SGD with Nesterov's momentum, a parameter at a time.

    Args:
        module: Where it begins.
        settings: By a parameter's name, its rate and weight decay.
        num_epochs: Epochs.
    """
    net = TinyNet(dropout=0)
    net.load_state_dict(module.net.state_dict())
    speeds = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    loader = TinyData(seed=42).train_dataloader()
    for epoch in range(num_epochs):
        loader.set_epoch(epoch)
        for rows, labels in loader:
            net.zero_grad()
            F.cross_entropy(net(rows), labels).backward()
            for name, parameter in net.named_parameters():
                rate, decay = settings[name]
                assert parameter.grad is not None
                gradient = parameter.grad + decay * parameter.detach()
                speeds[name] = 0.9 * speeds[name] + gradient
                parameter.data -= rate * (gradient + 0.9 * speeds[name])
    return {f"net.{name}": parameter.detach() for name, parameter in net.named_parameters()}


EXPECTED = {"0.weight": (0.05, 0.1), "0.bias": (0.05, 0.0), "3.weight": (0.5, 0.1), "3.bias": (0.5, 0.0)}
ITS_OWN = ("+model.optimizer={_target_: torch.optim.SGD, _partial_: true, lr: 0.05, momentum: 0.9, nesterov: true, "
           "weight_decay: 0.1}",)  # fmt: skip


class Constant(UpstreamTask):
    """Asks for ``hparams.optimizer(params=self.parameters())``, without a schedule."""

    def configure_optimizers(self) -> Any:
        return self.hparams["optimizer"](params=self.parameters())


class InCode(TinyTask):
    """Makes its optimizer and a schedule in code, of pairs of names and parameters, as torch takes them, too."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            params=self.named_parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1
        )
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)]


IN_CODE = (f"model._target_={__name__}.InCode",)
CONSTANT = (f"model._target_={__name__}.Constant", *(word for word in UPSTREAM[1:3]), "+model.scheduler=null")


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of")
@pytest.mark.parametrize("settings", [SGD, (*CONSTANT, *ITS_OWN), IN_CODE], ids=["TinyTask", "upstream", "in code"])
def test_each_group_is_trained_as_by_hand(
    settings: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "src.engine.runs.groups")
    cfg = compose_tiny(tmp_path, *settings, *SHORT, GROUPS)
    torch.manual_seed(0)
    module = build_module(cfg)
    start = tmp_path / "start.pt"
    torch.save(module.state_dict(), start)
    train(compose_tiny(tmp_path, *settings, *SHORT, GROUPS, f"init.weights={start}"))
    last = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    expected = by_hand(module, EXPECTED, num_epochs=2)
    assert expected.keys() == last["state_dict"].keys()
    for name, weights in expected.items():
        torch.testing.assert_close(last["state_dict"][name], weights, msg=name)
    groups = last["optimizer_states"][0]["param_groups"]
    assert [group["name"] for group in groups] == ["net.3", "net.3/no_decay", "biases", "rest"]
    assert re.findall(r"group (\S+): (\d+) parameters, lr=([\d.]+), weight_decay=([\d.]+)", caplog.text) == [
        ("net.3", "16", "0.5", "0.1"), ("net.3/no_decay", "2", "0.5", "0"), ("biases", "8", "0.05", "0"),
        ("rest", "32", "0.05", "0.1"),
    ]  # fmt: skip


def test_a_one_cycle_schedule_keeps_the_groups_apart(tmp_path: Path) -> None:
    lr = "+callbacks.lr._target_=pytorch_lightning.callbacks.LearningRateMonitor"
    cfg = compose_tiny(tmp_path, *SGD, *SHORT, GROUPS, "scheduler=onecycle", "logger=csv", lr)
    train(cfg)
    lines = [line.split(",") for line in (tmp_path / "csv" / "metrics.csv").read_text().splitlines()]
    curves = {
        name: [float(line[place]) for line in lines[1:] if line[place]]
        for place, name in enumerate(lines[0])
        if name.startswith("lr-")
    }
    assert curves.keys() == {"lr-SGD/net.3", "lr-SGD/net.3/no_decay", "lr-SGD/biases", "lr-SGD/rest"}
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.5, 0.05)])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.5, 0.05], total_steps=24, cycle_momentum=False)
    for first, second in zip(curves["lr-SGD/net.3"], curves["lr-SGD/rest"], strict=True):
        assert [first, second] == pytest.approx([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if schedule.last_epoch < 23:
            schedule.step()


def test_one_cycle_trains_a_group_whose_rate_is_the_only_one(tmp_path: Path) -> None:
    settings = ("optimizer_groups=[{match: net.3, lr: 0.5}]", "optimizer.lr=0", "scheduler=onecycle")
    cfg = compose_tiny(tmp_path, *SGD, *SHORT, *settings)
    seed_everything(cfg)
    before = {name: value.clone() for name, value in build_module(cfg).state_dict().items()}
    train(compose_tiny(tmp_path, *SGD, *SHORT, *settings))
    after = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert {name for name in after if not torch.equal(before[name], after[name])} == {"net.3.weight", "net.3.bias"}


def test_options_of_the_modules_own_groups_stay() -> None:
    net = TinyNet()
    given = [{"params": [net[0].weight], "lr": 3.0}, {"params": list(net[3].named_parameters())}]
    groups = divide(given, [{"match": "*.bias", "lr": 0.5}], net)
    found = [(group["name"], group.get("lr"), [tuple(p.shape) for p in group["params"]]) for group in groups]
    assert found == [("rest", 3.0, [(8, 4)]), ("bias", 0.5, [(2,)]), ("rest_2", None, [(2, 8)])]


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ("[{match: net.33, lr: 0.1}]", r"optimizer_groups\[0\]\.match=net\.33: fits no name .*did you mean net\.3\?"),
        ("[{match: net.3, lrr: 0.1}]", r"optimizer_groups\[0\]\.lrr: SGD has no such option; did you mean lr\?"),
    ],
)
def test_what_fits_nothing_is_named_before_the_first_step(groups: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        train(compose_tiny(tmp_path, *SGD, f"optimizer_groups={groups}"))
    assert not list(tmp_path.rglob("*.ckpt"))


class OneRate(TinyTask):
    """Has a schedule that sets the rate, of all groups, and not the optimizer."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=24)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class NoOptimizer(TinyTask):
    def configure_optimizers(self) -> None:
        return None


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (OneRate, r"optimizer_groups: OneRate's schedule gives all groups one rate; give it \[group\['lr'\] for group"),
        (NoOptimizer, r"optimizer_groups: NoOptimizer\.configure_optimizers makes no optimizer of torch"),
    ],
)
def test_groups_that_would_do_nothing_are_told(kind: type, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        train(compose_tiny(tmp_path, f"model._target_={__name__}.{kind.__name__}", GROUPS))


def test_other_optimizers_have_no_groups_by_name(tmp_path: Path) -> None:
    module = build_module(compose_tiny(tmp_path, *IN_CODE, GROUPS))
    ((optimizer,), _) = pickle.loads(pickle.dumps(module)).configure_optimizers()  # as processes that are spawned do
    assert len(optimizer.param_groups) == 4
    assert len(torch.optim.SGD(TinyNet().parameters(), lr=0.1).param_groups) == 1


def test_a_resumed_run_has_the_groups_that_it_had(tmp_path: Path) -> None:
    train(compose_tiny(tmp_path, *SGD, *SHORT, GROUPS))
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ConfigError, match=r"optimizer_groups=None: the run so far has .*net\.3.*; leave it so"):
        train(compose_tiny(tmp_path, *SGD, *SHORT, f"ckpt_path={last}", "trainer.max_epochs=3"))
