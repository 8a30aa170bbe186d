"""How the weights are spread, and how large their gradients are."""

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.pictures import Pictures, find_writers

MAX_VALUES = 10_000  # of a parameter that go into its histogram
NUM_BINS = 64


class Weights(Pictures):
    """Writes a histogram of each parameter after each validation, and the norm of all gradients.

    Values that are not finite are left out. ``train/grad_norm`` is logged every ``trainer.log_every_n_steps`` steps,
    before clipping.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Log the gradients' norm."""
        is_automatic = pl_module.automatic_optimization  # else several optimizers may step in a batch
        step = trainer.global_step if is_automatic else trainer.fit_loop.epoch_loop.total_batch_idx
        if (step + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        for writer in find_writers(trainer):
            norm = torch.nn.utils.get_total_norm(p.grad for p in pl_module.parameters() if p.grad is not None)
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None and optimizer.defaults.get("fused"):
                norm /= scaler.get_scale()  # a fused optimizer unscales by itself, later
            writer.add_scalar("train/grad_norm", norm, step)

    def draw(self, pl_module: pl.LightningModule, writer: SummaryWriter, step: int) -> None:
        """Write the histograms."""
        for name, parameter in pl_module.named_parameters():
            values = parameter.detach().float().flatten()
            values = values[:: max(1, -(-len(values) // MAX_VALUES))]  # spread over all of them
            values = values[values.isfinite()]  # a histogram of others raises, and would end the training
            if len(values):
                writer.add_histogram(f"weights/{name}", values, step, bins=NUM_BINS)
