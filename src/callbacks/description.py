"""What a run is, as text beside its curves."""

import warnings

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger

CHARTS = {
    "train and val": {
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "acc": ["Multiline", ["train/acc", "val/acc"]],
    }
}


class Description(Callback):
    """Writes to TensorBoard: config and data as text, the net's graph, and charts of train and validation together."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write all of it at step 0."""
        data = getattr(trainer, "datamodule").state_dict()  # noqa: B009 (mypy does not know of it)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                writer = logger.experiment
                writer.add_text("config", _as_code(dict(pl_module.hparams)))
                writer.add_text("data", _as_code({key: data[key] for key in data if key != "loader"}))
                writer.add_custom_scalars(CHARTS)
                if isinstance(pl_module.example_input_array, torch.Tensor):
                    with warnings.catch_warnings():
                        # The graph is made by torch.jit.trace, which is deprecated and touches what is, too.
                        warnings.simplefilter("ignore", FutureWarning)
                        warnings.simplefilter("ignore", DeprecationWarning)
                        writer.add_graph(pl_module, pl_module.example_input_array.to(pl_module.device))


def _as_code(content: dict) -> str:
    """YAML as a Markdown code block."""
    return "".join(f"    {line}\n" for line in yaml.safe_dump(content, sort_keys=False).splitlines())
