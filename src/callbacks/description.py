"""What a run is, as text beside its curves."""

import logging
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

CHARTS = {
    "train and val": {
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "acc": ["Multiline", ["train/acc", "val/acc"]],
    },
    "classes": {"acc of each": ["Multiline", [r"val_class_acc/.*"]]},
}

CONTAINERS: tuple[type, ...] = (dict, list, tuple)
PLAIN: tuple[type, ...] = (type(None), bool, int, float, str)


class Description(Callback):
    """Writes to TensorBoard: config and data as text, the net's graph, and charts of train and validation together."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write all of it at step 0; a run that goes on adds its config, which may be another one."""
        data = getattr(trainer, "datamodule").state_dict()  # noqa: B009 (mypy does not know of it)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                writer = logger.experiment
                writer.add_text("config", _as_code(dict(pl_module.hparams)), trainer.global_step)
                writer.add_text("data", _as_code({key: data[key] for key in data if key != "loader"}))
                writer.add_custom_scalars(CHARTS)
                if isinstance(pl_module.example_input_array, torch.Tensor) and trainer.global_step == 0:
                    _add_graph(writer, pl_module, pl_module.example_input_array.to(pl_module.device))


def _add_graph(writer: SummaryWriter, module: pl.LightningModule, images: torch.Tensor) -> None:
    """Trace the net; one that torch.jit.trace cannot follow trains without its picture."""
    try:
        with warnings.catch_warnings(), isolate_rng():  # dropout draws numbers
            warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and touches what is, too
            writer.add_graph(module, images)
    except Exception as error:  # whatever the user's net raises
        log.warning("no graph in TensorBoard: %s", str(error).strip().split("\n")[0])
    finally:
        torch._C._jit_clear_class_registry()  # else traces are never freed (pytorch#35600): 2 MB a job of a sweep


def _as_code(content: dict[str, Any]) -> str:
    """YAML as a Markdown code block."""
    return "".join(f"    {line}\n" for line in yaml.safe_dump(_keep_plain(content), sort_keys=False).splitlines())


def _keep_plain(value: Any) -> Any:
    """What YAML has words for; the rest, such as the tensors in the state of a user's data module, is left out."""
    if isinstance(value, dict):
        return {str(key): _keep_plain(each) for key, each in value.items() if isinstance(each, CONTAINERS + PLAIN)}
    if isinstance(value, list | tuple):
        return [_keep_plain(each) for each in value if isinstance(each, CONTAINERS + PLAIN)]
    return next((kind(value) for kind in PLAIN[1:] if isinstance(value, kind)), None)  # NumPy's float is a subclass
