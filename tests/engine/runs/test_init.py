"""init: weights from files of every kind, into any module."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.engine.errors import ConfigError
from src.engine.runs.build import build_module, load_checkpoint, restore
from src.engine.runs.init import load_weights
from src.engine.settings.check import check
from src.train import train
from tests.engine.tiny import TinyNet, TinyTask, compose_tiny

SHORT = ("trainer.max_epochs=1", "trainer.log_every_n_steps=1", "test=false")


def drawn(num_classes: int = 2) -> dict[str, Tensor]:
    """Weights of a net whose last layer may be another one."""
    torch.manual_seed(5)
    net = TinyNet()
    net[3] = nn.Linear(8, num_classes)
    return dict(net.state_dict())


def save(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif path.suffix == ".ckpt":  # of some other project's Lightning
        named = {f"net.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": named, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, path)
    else:
        torch.save(state if path.suffix == ".pt" else {"model": state, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("name", ["other.ckpt", "weights.pt", "weights.pth", "weights.safetensors"])
def test_a_file_of_every_kind_is_loaded_to_the_bit(name: str, tmp_path: Path) -> None:
    path = save(drawn(), tmp_path / name)
    module = TinyTask(TinyNet())
    said = load_weights(module, str(path), map=None if path.suffix == ".ckpt" else {"": "net."})
    for key, tensor in drawn().items():
        assert torch.equal(module.net.state_dict()[key], tensor)
    assert said == [f"init: 4 of 4 tensors from {path}", "init: skipped nothing; missing nothing; not used nothing"]


def test_a_head_of_another_size_keeps_its_initial_values(tmp_path: Path) -> None:
    path = save(drawn(num_classes=7), tmp_path / "weights.pt")
    module = TinyTask(TinyNet())
    head = module.net[3].weight.detach().clone()  # type: ignore[index]
    said = load_weights(module, str(path), map={"": "net."}, skip=["net.3"])
    assert torch.equal(module.net[3].weight, head)  # type: ignore[index]
    assert torch.equal(module.net[0].weight, drawn()["0.weight"])  # type: ignore[index]
    assert said[0].startswith("init: 2 of 4 tensors from ")
    assert said[1] == "init: skipped net.3.weight, net.3.bias; missing nothing; not used nothing"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"map": {"": "net."}},
            r"shapes that do not fit: net\.3\.weight: \(7, 8\) in the file, \(2, 8\) here, net\.3\.bias: \(7,\) in the "
            r"file, \(2,\) here; init\.skip",
        ),
        ({}, r"it lacks net\.0\.weight, .*, and has 0\.weight, .* that the module lacks; init\.map"),
        ({"map": {"0.": "net.0."}}, r"it lacks net\.3\.weight, net\.3\.bias, and has 3\.weight, 3\.bias that"),
        ({"map": {"": "net."}, "skip": ["net.4"]}, r"init\.skip=net\.4: fits no name in the module; .*net\.3"),
        ({"strict": False}, r"it lacks net\.0\.weight"),  # nothing fits at all
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = save(drawn(num_classes=7), tmp_path / "weights.pt")
    module = TinyTask(TinyNet())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ConfigError, match=said):
        load_weights(module, str(path), **arguments)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


def test_strict_false_takes_what_fits(tmp_path: Path) -> None:
    path = save(drawn(), tmp_path / "weights.pt")
    module = TinyTask(TinyNet())
    said = load_weights(module, str(path), map={"0.": "net.0."}, strict=False)
    assert torch.equal(module.net[0].bias, drawn()["0.bias"])  # type: ignore[index]
    assert said[1] == "init: skipped nothing; missing net.3.weight, net.3.bias; not used 3.weight, 3.bias"


def test_weights_of_a_compiled_net_fit_a_plain_one_and_a_file_may_lack_buffers(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    state = {f"_orig_mod.{name}": tensor + 1 for name, tensor in net.state_dict().items()}
    del state["_orig_mod.1.num_batches_tracked"]
    load_weights(net, str(save(state, tmp_path / "weights.pt")))
    assert torch.equal(net[1].running_mean, torch.ones(4))  # type: ignore[arg-type]


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["bad.pth", "bad.ckpt", "bad.pkl", "bad.safetensors"])
def test_nothing_in_the_file_is_unpickled(name: str, tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / name
    if name == "bad.pkl":
        path.write_bytes(pickle.dumps(Payload(victim)))
    else:
        torch.save({"state_dict": drawn(), "hyper_parameters": Payload(victim)}, path)
    with pytest.raises(ConfigError, match=rf"{name}: cannot be read \(.*\); if you trust it, save its state_dict only"):
        load_weights(TinyNet(), str(path))
    assert not victim.exists()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_starts_from_the_weights_and_its_checkpoint_needs_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "src.engine.runs.build")
    path = save(drawn(), tmp_path / "other.ckpt")
    still = (*SHORT, "optimizer=sgd", "optimizer.lr=0", f"init.weights={path}")
    train(compose_tiny(tmp_path / "run", *still))
    assert caplog.text.count("init: 4 of 4 tensors") == 1
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.unlink()
    for state in (load_checkpoint(last)["state_dict"], restore(last).state_dict()):
        assert all(torch.equal(state[f"net.{name}"], tensor) for name, tensor in drawn().items())
    resumed = compose_tiny(tmp_path / "run", *still, "trainer.max_epochs=2", f"ckpt_path={last}")
    check(resumed)
    train(resumed)
    assert load_checkpoint(last)["global_step"] == 24


def test_a_run_goes_on_from_the_weights_of_a_run_of_ours(tmp_path: Path) -> None:
    train(compose_tiny(tmp_path / "first", *SHORT))
    first = tmp_path / "first" / "checkpoints" / "best.ckpt"
    module = build_module(compose_tiny(tmp_path, f"init.weights={first}"))
    for name, tensor in load_checkpoint(first)["state_dict"].items():
        assert torch.equal(module.state_dict()[name], tensor)


def test_a_file_that_is_not_there_is_named_without_torch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"init\.weights=gone\.pt: no such file"):
        check(compose_tiny(tmp_path, "init.weights=gone.pt"))


def test_other_weights_make_no_sense_for_a_run_that_resumes(tmp_path: Path) -> None:
    path = save(drawn(), tmp_path / "other.ckpt")
    train(compose_tiny(tmp_path / "first", *SHORT))
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    shutil.copy(path, tmp_path / "another.ckpt")
    settings = (*SHORT, "trainer.max_epochs=2", f"ckpt_path={last}", f"init.weights={tmp_path / 'another.ckpt'}")
    with pytest.raises(ConfigError, match=r"init\.weights=.*another\.ckpt: .*resumes.* start a new run"):
        train(compose_tiny(tmp_path / "resumed", *settings))
