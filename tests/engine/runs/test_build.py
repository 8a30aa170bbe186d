import io
import pickle
from pathlib import Path

import pytest
import torch

from src.engine.errors import CheckpointError, ConfigError
from src.engine.runs.build import (
    build_datamodule,
    build_module,
    build_trainer,
    load_checkpoint,
    restore,
)
from src.engine.runs.checkpoints import newest_checkpoint
from src.engine.settings.check import CONF, check, check_values
from src.train import train
from tests.compose import compose_cfg
from tests.forks import run_command

OPTIONS = [
    f"{path.parent.name}={path.stem}"
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name not in ("hydra", "local") and path.stem not in ("wandb", "mlflow")  # test_loggers.py has these
]


@pytest.mark.parametrize("option", [*OPTIONS, "scheduler=[]", "logger=[]", "callbacks=[]"])
def test_every_yaml_file_composes_and_builds(option: str, tmp_path: Path) -> None:
    cfg = compose_cfg(tmp_path, option)
    if cfg.trainer.accelerator in ("gpu", "mps"):  # right config, wrong machine; tested on a GPU in test_train.py
        with pytest.raises(ConfigError, match="accelerator="):
            check_values(cfg)
        cfg.trainer.accelerator = "cpu"
    check(cfg)
    check_values(cfg)
    assert build_datamodule(cfg).batch_size == cfg.data.batch_size  # type: ignore[attr-defined]
    module = build_module(cfg)
    if option == "trainer=fsdp":
        with pytest.raises(ValueError, match="requires a GPU"):
            build_trainer(cfg)
        return
    module.trainer = trainer = build_trainer(cfg)
    assert module.hparams["seed"] == 42
    assert trainer.max_epochs == cfg.trainer.max_epochs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(compose_cfg(folder, "data=mnist5k", "debug=fast", "trainer.accelerator=cpu", "callbacks=minimal"))
    return folder / "checkpoints" / "best.ckpt"


def test_restore_rebuilds_the_module_from_the_file_alone(checkpoint: Path) -> None:
    module = restore(checkpoint)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {key: tensor.tolist() for key, tensor in module.state_dict().items()} == {
        key: tensor.tolist() for key, tensor in saved.items()
    }
    assert not module.training
    assert module(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_a_checkpoint_holds_plain_values_config_and_data(checkpoint: Path) -> None:
    content = load_checkpoint(checkpoint)
    assert content["hyper_parameters"]["optimizer"]["lr"] == 4e-3
    assert content["MNISTDataModule"]["source"] == "package"
    assert content["MNISTDataModule"]["num_images"] == {"train": 4000, "val": 500, "test": 500}


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickled_payload_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    torch.save({"state_dict": {}, "hyper_parameters": _Payload(victim)}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"bad\.ckpt"):
        restore(tmp_path / "bad.ckpt")
    assert not victim.exists()


@pytest.mark.slow
def test_no_command_runs_what_a_checkpoint_asks_for(checkpoint: Path, tmp_path: Path) -> None:
    content, victim, run = load_checkpoint(checkpoint), tmp_path / "victim", tmp_path / "logs"
    bad = run / "checkpoints" / "last.ckpt"
    bad.parent.mkdir(parents=True)
    (run / "status.json").write_text('{"state": "running", "overrides": [], "config_dirs": []}')
    target = {"_target_": "subprocess.getoutput", "cmd": f"touch {victim}"}
    for hyper_parameters in (_Payload(victim), content["hyper_parameters"] | {"model": target}):
        torch.save(content | {"hyper_parameters": hyper_parameters}, bad)
        for command in (("test", f"ckpt_path={bad}"), ("train", f"ckpt_path={bad}"), ("train", f"resume={run}")):
            result = run_command(*command, PROJECT_ROOT=str(tmp_path))
            assert result.returncode == 1
            assert result.stderr.splitlines()[-1].startswith("error: ")
            assert "Traceback" not in result.stderr
            assert not victim.exists()


@pytest.mark.parametrize("content", ["truncated", "text", "pickle", "foreign"])
def test_what_is_no_checkpoint_is_named(content: str, checkpoint: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, buffer)
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(
        {
            "truncated": checkpoint.read_bytes()[:5000],
            "text": b"this is no checkpoint",
            "pickle": pickle.dumps([1, 2]),
            "foreign": buffer.getvalue(),
        }[content]
    )
    with pytest.raises(CheckpointError, match=r"bad\.ckpt"):
        restore(bad)


def test_weights_that_do_not_fit_are_named(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["model"]["net"]["in_channels"] = 3
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"bad\.ckpt: its weights do not fit its model.*net\.c1\.weight"):
        restore(tmp_path / "bad.ckpt")


def test_no_run_yet_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train first"):
        newest_checkpoint(tmp_path)
