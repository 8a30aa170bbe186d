"""How the weights are spread, and how large their gradients are."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.optim import Optimizer

from src.callbacks.writers import find_writers, get_step

MAX_VALUES = 10_000  # of a parameter that go into its histogram
NUM_BINS = 64


class Weights(Callback):
    """Writes a histogram of each parameter after each validation, and the norm of all gradients, to TensorBoard.

    Values that are not finite are left out. ``train/grad_norm`` is logged every ``trainer.log_every_n_steps`` steps,
    before clipping.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Log the gradients' norm."""
        if (trainer.global_step + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        for writer in find_writers(trainer):
            norm = torch.nn.utils.get_total_norm(p.grad for p in pl_module.parameters() if p.grad is not None)
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
                norm /= scaler.get_scale()  # a fused optimizer unscales by itself, later
            writer.add_scalar("train/grad_norm", norm, get_step(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the histograms."""
        for writer in find_writers(trainer):
            for name, parameter in pl_module.named_parameters():
                values = parameter.detach().float().flatten()
                values = values[:: max(1, -(-len(values) // MAX_VALUES))]  # spread over all of them
                values = values[values.isfinite()]  # a histogram of others raises, and may end no training
                if len(values):
                    writer.add_histogram(f"weights/{name}", values, get_step(trainer), bins=NUM_BINS)
