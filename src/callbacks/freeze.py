"""Weights that stay as they are, for some epochs or for the whole run."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.optim import Optimizer

from src.engine.errors import ConfigError


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
        self.match = [match] if isinstance(match, str) else list(match)
        self.until_epoch = until_epoch
        self._frozen: dict[str, nn.Parameter] = {}  # those that were to be trained
        self._still: list[nn.Module] = []  # those with statistics, in training mode before

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze for good, before an optimizer or a strategy looks at the parameters."""
        names = [name for name, _ in [*pl_module.named_parameters(), *pl_module.named_buffers()]]
        for pattern in self.match:
            if not any(_fits(name, [pattern]) for name in names):
                raise ConfigError(f"callbacks.freeze.match={pattern}: fits no name in the module, as {names[0]} would")
        if stage == "fit" and self.until_epoch is None:
            self._freeze(pl_module, drops=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze or not, also in an epoch that is resumed."""
        if self.until_epoch is not None and trainer.current_epoch >= self.until_epoch:
            self._thaw()
            return
        self._freeze(pl_module, drops=self.until_epoch is not None and trainer.world_size > 1)
        for path, module in pl_module.named_modules():
            names = [f"{path}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)]
            if module.training and names and all(_fits(name, self.match) for name in names):
                module.training = False  # of this one only, not of those in it
                self._still.append(module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same at the beginning of each epoch; a module may have called ``train``."""
        self.on_train_start(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Drop the gradients that there are."""
        for parameter in self._frozen.values():
            parameter.grad = None

    def _freeze(self, module: nn.Module, drops: bool) -> None:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and _fits(name, self.match):
                parameter.requires_grad_(drops)
                self._frozen[name] = parameter

    def _thaw(self) -> None:
        for parameter in self._frozen.values():
            parameter.requires_grad_(True)
        for module in self._still:
            module.training = True
        self._frozen, self._still = {}, []


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)
