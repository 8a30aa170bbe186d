"""Weights that stay as they are, for some epochs or for the whole run."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import nn

from src.engine.runs.groups import matches, require_match


class Freeze(Callback):
    """Keeps parameters as they are, and the statistics of batch norms among them, until an epoch begins.

    The optimizer has them from the start, and leaves them alone as long as they have no gradients: neither weight decay
    nor momentum moves them. Of several processes, and with an ``until_epoch``, the gradients are computed and dropped,
    since DistributedDataParallel cannot learn of parameters later.

    Args:
        match: Names of parameters or modules, or shell patterns of them.
        until_epoch: The first epoch, from 0, that trains them; None: no epoch does.

    Raises:
        ConfigError: If a name fits nothing.
    """

    def __init__(self, match: str | Sequence[str], until_epoch: int | None = None) -> None:
        self.match = match
        self.until_epoch = until_epoch
        self._is_frozen = True
        self._parameters: list[nn.Parameter] = []  # those that would be trained
        self._modules: list[nn.Module] = []  # those that would change their statistics

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find what is frozen, before an optimizer or a strategy looks at the parameters."""
        parameters = dict(pl_module.named_parameters())
        names = [*parameters, *dict(pl_module.named_buffers())]
        require_match("callbacks.freeze.match", self.match, names)
        if stage != "fit":
            return
        trained = {name: each for name, each in parameters.items() if each.requires_grad}
        self._parameters = [each for name, each in trained.items() if matches(name, self.match)]
        for path, module in pl_module.named_modules():
            buffers = [f"{path}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)]
            if module.training and buffers and all(matches(name, self.match) for name in buffers):
                self._modules.append(module)
        for parameter in self._parameters if self.until_epoch is None else ():
            parameter.requires_grad_(False)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Freeze or not: an epoch may be resumed, and a module may have called ``train``."""
        self._is_frozen = self.until_epoch is None or trainer.current_epoch < self.until_epoch
        has_gradients = not self._is_frozen or (self.until_epoch is not None and trainer.world_size > 1)
        for parameter in self._parameters:
            parameter.requires_grad_(has_gradients)
        for module in self._modules:
            module.training = not self._is_frozen  # of this one only, not of those in it

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Drop the gradients that there are."""
        for parameter in self._parameters if self._is_frozen else ():
            parameter.grad = None
