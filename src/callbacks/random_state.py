"""Random states in the checkpoints."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states
from pytorch_lightning.callbacks import Callback


class RandomState(Callback):
    """Keeps every process's random states (Python, NumPy, torch, CUDA) in the checkpoints.

    A continued run then draws the augmentations, dropout masks and so on that the uninterrupted one would have drawn.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Collect the states, in the order of the ranks."""
        states = [_plain(_collect_rng_states())]
        if trainer.world_size > 1:
            states *= trainer.world_size
            torch.distributed.all_gather_object(states, states[0])
        checkpoint["random_states"] = states

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the states until training starts: what is set up meanwhile draws numbers, too."""
        self._loaded = checkpoint.get("random_states")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set this process's states; another number of processes than the checkpoint's cannot have them."""
        if self._loaded and len(self._loaded) == trainer.world_size:
            state = self._loaded[trainer.global_rank]
            name, keys, *rest = state["numpy"]
            _set_rng_states({**state, "numpy": (name, np.array(keys, np.uint32), *rest)})
        self._loaded = None


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Without NumPy's array, which a checkpoint under weights_only must not hold."""
    name, keys, *rest = state["numpy"]
    return {**state, "numpy": (name, keys.tolist(), *rest)}
