"""Metrics in the midst of an epoch, which Lightning leaves out of its checkpoints."""

from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor
from torchmetrics import Metric


def collect_metrics(pl_module: pl.LightningModule) -> dict[str, dict[str, Any]]:
    """The states of the module's torchmetrics that have counted something, by their names in it."""
    return {
        name: {"update_count": metric.update_count, "states": dict(metric.metric_state)}
        for name, metric in pl_module.named_modules()
        if isinstance(metric, Metric) and metric.update_count
    }


def restore_metrics(pl_module: pl.LightningModule, collected: dict[str, dict[str, Any]]) -> None:
    """Let the metrics count on from what was collected."""
    for name, metric in pl_module.named_modules():
        if isinstance(metric, Metric) and name in collected:
            for key, state in collected[name]["states"].items():
                setattr(metric, key, move_data_to_device(state, pl_module.device))
            metric._update_count = collected[name]["update_count"]


def collect_means(trainer: pl.Trainer) -> dict[str, list[Tensor]]:
    """Sums and weights of what ``self.log(..., on_epoch=True)`` has been given in this epoch, by the names it has."""
    return {
        name: [result.value, result.cumulated_batch_size if result.meta.is_mean_reduction else torch.tensor(0)]
        for name, result in trainer.fit_loop.epoch_loop._results.items()
        if result.is_tensor and result.meta.on_epoch and not result.has_reset
    }


def restore_means(trainer: pl.Trainer, collected: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Add what was collected; to be called after a step, since the first ``self.log`` makes what it is added to.

    Returns:
        What has not been logged yet, for a later step.
    """
    results = trainer.fit_loop.epoch_loop._results
    for name, result in results.items():
        if name in collected:
            value, weight = (tensor.to(result.value.device) for tensor in collected[name])
            if result.meta.is_max_reduction or result.meta.is_min_reduction:
                result.value = result.meta.reduce_fx(result.value, value)
            else:
                result.value = value + result.value
            if result.meta.is_mean_reduction:
                result.cumulated_batch_size = weight + result.cumulated_batch_size
    return {name: mean for name, mean in collected.items() if name not in results}
