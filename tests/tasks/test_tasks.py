"""Seven modules and data modules as their communities write them, through every verb. None needs an edit of src/."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from src.engine.runs.build import load_checkpoint, restore
from src.engine.settings.check import CONF, check, check_values
from src.train import train

TASKS = Path(__file__).parent
SHORT = ("trainer.max_epochs=2", "trainer.log_every_n_steps=5")
# What the command line says for a short run of each.
CHOSEN = {
    "upstream": ("model=upstream", "data=upstream", *SHORT),
    "regression": ("model=regression", "data=regression", *SHORT),
    "vae": ("model=vae", "data=vae", *SHORT),
    "gan": ("model=gan", "data=gan", *SHORT),
    "text": ("experiment=text",),
    "multilabel": ("model=multilabel", "data=multilabel", *SHORT),
    "memmap": (
        "model=memmap",
        "data=memmap",
        "data.num_rows=2000",
        "data.batch_size=100",
        "data.num_workers=0",
        *SHORT,
    ),
}
MONITORED = {
    "upstream": "val/acc", "regression": "val_loss", "vae": "val/loss", "gan": None, "text": "val/loss",
    "multilabel": "val/f1/dataloader_idx_0", "memmap": "val/acc",
}  # fmt: skip

# What Lightning tells users of such modules; the runs go on.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of"),
]


def compose_task(task: str, output_dir: Path, *overrides: str) -> DictConfig:
    paths = [f"output_dir={output_dir}", f"root_dir={output_dir}", f"hydra.searchpath=[file://{TASKS / task / 'conf'}]"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*paths, *CHOSEN[task], "trainer=cpu", "callbacks=minimal", "logger=[]", *overrides])


@pytest.mark.parametrize("task", CHOSEN)
def test_a_task_trains_and_comes_back_from_its_checkpoint(task: str, tmp_path: Path) -> None:
    cfg = compose_task(task, tmp_path)
    check(cfg)
    check_values(cfg)
    metrics = train(cfg)
    monitor = MONITORED[task]
    assert cfg.monitor == monitor
    assert monitor is None or monitor in metrics
    assert cfg.test is any(name.startswith("test") for name in metrics)
    for name in ("best", "last"):
        checkpoint = tmp_path / "checkpoints" / f"{name}.ckpt"
        module = restore(checkpoint)
        assert f"{type(module).__module__}.{type(module).__qualname__}" == cfg.model._target_
        for key, tensor in load_checkpoint(checkpoint)["state_dict"].items():
            assert torch.equal(module.state_dict()[key], tensor)
