"""Fewer, larger kernels."""

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import nn


class Compile(Callback):
    """Compiles the module's ``net`` by ``torch.compile`` when training starts; the weights' names stay.

    The first steps take a minute, and so does the first batch of another size. A compiled net computes the same up to
    rounding, so a plain net resumes from its checkpoints, and the other way round.

    Args:
        mode: As of ``torch.compile``: ``default``, ``reduce-overhead`` (on a GPU: CUDA graphs) or ``max-autotune``.
    """

    def __init__(self, mode: str = "default") -> None:
        self.mode = mode

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compile in place; what is computed by ``net.forward``, as callbacks do, is not compiled."""
        if isinstance(net := getattr(pl_module, "net", None), nn.Module):
            net.compile(mode=self.mode)
