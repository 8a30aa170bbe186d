"""What a run is, as text beside its curves."""

import json
import logging
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import move_data_to_device
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.pictures import find_loggers, find_writers

log = logging.getLogger(__name__)

CODE = "    "  # what makes a line one of code in Markdown


class Description(Callback):
    """Writes to TensorBoard: config and data as text, the graph, and charts of training and validation together.

    The config is the run's ``config.yaml``, the data is the ``state_dict`` of the data module, and the graph is that of
    a module with an ``example_input_array``. There is a chart for each metric of both ``train`` and ``val``.
    """

    def __init__(self) -> None:
        self._has_charts = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the texts and the graph. A resumed run adds its config, which may have changed."""
        record = Path(trainer.default_root_dir) / "config.yaml"
        datamodule = getattr(trainer, "datamodule", None)
        data = {key: value for key, value in datamodule.state_dict().items() if key != "loader"} if datamodule else {}
        for writer in find_writers(find_loggers(trainer)):
            if record.is_file():
                writer.add_text("config", textwrap.indent(record.read_text(), CODE), trainer.global_step)
            if data:
                text = json.dumps(data, indent=2, skipkeys=True, default=lambda value: f"({type(value).__name__})")
                writer.add_text("data", textwrap.indent(text, CODE))
            if pl_module.example_input_array is not None and trainer.global_step == 0:
                _add_graph(writer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the charts, once, as soon as an epoch has shown what is logged; TensorBoard reads the first ones."""
        names = [name for name in trainer.callback_metrics if name.startswith("val")]
        pairs = [(f"train{name[3:]}", name) for name in names if f"train{name[3:]}" in trainer.callback_metrics]
        if self._has_charts or not pairs:
            return
        self._has_charts = True
        charts = {"train and val": {val[4:]: ["Multiline", [train, val]] for train, val in pairs}}
        if hasattr(pl_module, "confusion"):
            charts["classes"] = {"acc of each": ["Multiline", [r"val_class_acc/.*"]]}
        for writer in find_writers(find_loggers(trainer)):
            writer.add_custom_scalars(charts)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the charts of a run of one epoch."""
        self.on_train_epoch_start(trainer, pl_module)


def _add_graph(writer: SummaryWriter, module: pl.LightningModule) -> None:
    """Trace the module; one that torch.jit.trace cannot follow trains without its picture."""
    example: Any = move_data_to_device(module.example_input_array, module.device)
    try:
        with warnings.catch_warnings(), isolate_rng():  # dropout draws numbers
            warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and touches what is, too
            writer.add_graph(module, example)
    except Exception as error:  # whatever your net raises
        log.warning("no graph in TensorBoard: %s", str(error).strip().split("\n")[0])
