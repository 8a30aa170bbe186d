"""An error in a line or two, whatever was raised."""

from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.engine.errors import ConfigError, DataError, SweepError
from src.engine.runs.command_line import read_env
from src.engine.settings.check import CONF
from src.engine.settings.explain import explain
from tests.engine.tiny import TinyTask


class DistNetworkError(RuntimeError):
    """As torch.distributed has one."""


def _raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


def _unresolved() -> Exception:
    with pytest.raises(OmegaConfBaseException) as caught:
        OmegaConf.to_container(OmegaConf.create({"a": {"b": "${nope}"}}), resolve=True)
    return caught.value


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("lr=-1: expected\n a number"), "error: lr=-1: expected a number"),
        (SweepError("2 jobs failed:\n  a\n  b"), "error: 2 jobs failed:\n  a\n  b"),
        (HydraException("one\ntwo"), "error: one two"),
        (FileNotFoundError("no weights"), "error: no weights"),
        (
            PermissionError(13, "Permission denied", "/data/x"),
            "error: /data/x: Permission denied; mend that or choose another folder with hydra.run.dir=<folder>",
        ),
        (
            _raised(InstantiationException("Error in call\nfull_key: optimizer"), TypeError("no such argument\nmore")),
            "error: optimizer: no such argument",
        ),
        (
            _raised(InstantiationException("Error in call\nfull_key: data"), ConfigError("val_size=0: expected 1")),
            "error: data.val_size=0: expected 1",
        ),
        (InstantiationException("Error:\nthe reason\nmore"), "error: config: Error: the reason"),
        (_raised(InstantiationException("Error\nfull_key: data"), AssertionError()), "error: data: AssertionError()"),
        (
            _raised(
                InstantiationException("Error in call to target 'src.models.lenet5.LeNet5':\nfull_key: model.net"),
                TypeError("LeNet5.__init__() got an unexpected keyword argument 'foo'"),
            ),
            "error: model.net: LeNet5.__init__() got an unexpected keyword argument 'foo'",
        ),
        (
            MissingConfigException("missing", "model/le\nnet", ["lenet5"]),
            "error: model=le net: no such file in conf/model/; did you mean lenet5?",
        ),
        (_unresolved(), "error: a.b: Interpolation key 'nope' not found"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error: Exception, said: str) -> None:
    assert explain(error) == said


@pytest.mark.parametrize(("option", "extra"), [("submitit_slurm", "slurm"), ("ray", "ray")])
def test_an_extra_that_is_not_installed_is_named(option: str, extra: str) -> None:
    error = MissingConfigException("missing", f"hydra/launcher/{option}", ["basic", "process"])
    assert explain(error) == f"error: hydra/launcher={option}: not installed; pip install -e '.[{extra}]' does it"


def test_what_the_other_processes_cause_is_said() -> None:
    said = explain(DistNetworkError("[/pytorch/gloo/transport/tcp/pair.cc:1] Connection closed by peer. This is bad"))
    assert said.startswith("error: another process of this run has ended or does not answer: Connection closed by peer")
    assert "GLOO_SOCKET_IFNAME" in explain(RuntimeError("gloo/x.cc] connectFullMesh failed in /gloo/rendezvous"))


def test_a_label_that_the_model_has_no_class_for_is_said() -> None:
    with pytest.raises(IndexError) as caught:
        torch.nn.functional.cross_entropy(torch.zeros(2, 5), torch.tensor([1, 9]))
    cfg = OmegaConf.create({"model": {"num_classes": 9}})
    assert explain(caught.value, cfg=cfg) == "error: model.num_classes: the data have a class 9; expected 10 or more"
    said = "error: model: the data have a class 9, for which it has no output; expected 10 or more"
    assert explain(caught.value, cfg=OmegaConf.create({"model": {"num_hidden": 9}})) == said


def test_a_module_without_parameters_is_said() -> None:
    with pytest.raises(ValueError, match="empty parameter list") as caught:
        torch.optim.Adam([])
    error = InstantiationException("Error in call\nfull_key: optimizer")
    error.__cause__ = caught.value
    assert explain(error).startswith(
        "error: model: has no parameters to train (optimizer got an empty parameter list); is"
    )


def test_a_bug_is_said_with_its_place_and_where_the_stack_trace_is() -> None:
    first, second = explain(_raised(ZeroDivisionError("division by zero\nand more"))).splitlines()
    assert first.startswith("error: ZeroDivisionError: division by zero (tests/engine/settings/test_explain.py, line ")
    assert second == "The stack trace is in the run's log; HYDRA_FULL_ERROR=1 prints it."
    assert (
        explain(_raised(ZeroDivisionError()), "train").splitlines()[1] == "HYDRA_FULL_ERROR=1 prints the stack trace."
    )


@pytest.mark.parametrize("override", ["seed=[1\n\n2", "data.root='a\n\tb", "se\ned=1"])
def test_line_breaks_in_an_override_are_not_printed(override: str) -> None:
    with pytest.raises(HydraException) as caught, initialize_config_dir(str(CONF), version_base="1.3"):
        compose("train", [override])
    said = explain(caught.value, "train")
    assert said.startswith(f"error: {' '.join(override.split())}: expected key=value")
    assert "\n" not in said


GLOBAL = "# @package _global_\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            f"{GLOBAL}model:\n\tnet: 5\n",
            "{path}, line 3: found character '\\t' that cannot start any token; expected YAML",
        ),
        (f"{GLOBAL}monitor: val/loss: 5\n", "{path}, line 2: mapping values are not allowed here; expected YAML"),
        (f"{GLOBAL}tags: [a, b\n", "{path}, line 3: expected ',' or ']'"),
        (f"{GLOBAL}seed: 1\nseed: 2\n", "{path}, line 3: found duplicate key seed"),
        (f"{GLOBAL}defaults: null\n", "Invalid defaults list in 'experiment/mine', defaults must be a list"),
        (
            f"{GLOBAL}defaults: [/optimizer: sgd]\n",
            "optimizer: chosen twice; a file wants override /optimizer: <option>",
        ),
        (
            f"{GLOBAL}defaults: [override optimizer: sgd]\n",
            "In 'experiment/mine': defaults want override /optimizer: <opt",
        ),
        ("defaults: [override /optimizer: sgd]\n", "In 'experiment/mine': defaults want override /optimizer: <option>"),
        (
            f"{GLOBAL}defaults: [optimizer: sgd]\n",
            "experiment/optimizer=sgd: no such file; a file's defaults want over",
        ),
        (
            f"{GLOBAL}defaults: [override /optimizer: sgdd]\n",
            "optimizer=sgdd: no such file in conf/optimizer/; did you",
        ),
        (
            f"{GLOBAL}callbacks: [a]\n",
            "In 'experiment/mine': ConfigTypeError raised while composing config: it has a list",
        ),
    ],
)
def test_a_slip_in_a_file_is_one_line_that_names_it(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "experiment" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(Exception) as caught, initialize_config_dir(str(CONF), version_base="1.3"):  # noqa: PT011
        compose("train", [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    found = explain(caught.value, "train")
    assert found.startswith(f"error: {said.format(path=path)}"), found
    assert len(found.splitlines()) == 1


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT_ROOT", str(tmp_path))
    path = tmp_path / ".env"
    path.write_bytes("NAME=Müller\n".encode("latin-1"))
    with pytest.raises(UnicodeDecodeError) as caught:
        read_env(path)
    assert explain(caught.value, "train") == f"error: {path}: invalid start byte at byte 6; expected UTF-8"
    path.write_text("NAME=±\n", encoding="utf-8")
    with pytest.raises(UnicodeDecodeError) as theirs:  # though the file has this byte
        b"\xb1".decode()
    assert explain(theirs.value, "train").startswith("error: UnicodeDecodeError")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.net={_target_: a.B, sizes: 3}", "model.net.sizes: no such key"),
        ("+optimizer=sgd", "optimizer: chosen twice"),
        ("optimizer.lrr=1", "optimizer.lrr: no such key; did you mean optimizer.lr?"),
    ],
)
def test_a_slip_on_the_command_line_is_one_line(override: str, said: str) -> None:
    with pytest.raises(HydraException) as caught, initialize_config_dir(str(CONF), version_base="1.3"):
        compose("train", [override])
    assert explain(caught.value, "train").startswith(f"error: {said}")


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_what_lightning_says_without_a_key_gets_one() -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, max_epochs=1, enable_checkpointing=False)
    with pytest.raises(Exception, match="train_dataloader") as caught:
        trainer.fit(TinyTask(torch.nn.Linear(4, 2), partial(torch.optim.SGD, lr=0.1)))
    assert explain(caught.value).startswith("error: data: `train_dataloader` must be implemented")


def test_an_endless_value_is_cut() -> None:
    said = explain(ConfigError(f"mode={'x' * 5000}: expected one of min, max"))
    assert said.endswith("xxx... expected one of min, max")
    assert len(said) < 200
    path = "/".join(["folder"] * 40)
    assert explain(ConfigError(f"root={path}: no such folder")) == f"error: root={path}: no such folder"


def test_an_error_cannot_steer_the_terminal() -> None:
    assert explain(ConfigError("model.\x1b[2J\x07=1: no")) == r"error: model.\x1b[2J\x07=1: no"
    assert explain(SweepError("two:\n  \x9b31m")) == "error: two:\n  \\x9b31m"  # lines stay


def test_an_error_of_a_kind_of_ours_is_told_as_ours() -> None:
    class LostError(DataError):
        """One that a data module tells apart."""

    assert explain(LostError("data/a.png is lost")) == "error: data/a.png is lost"
