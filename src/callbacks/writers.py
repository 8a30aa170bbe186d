"""What the callbacks that draw have in common: where their pictures go, and what a batch of validation says."""

import logging
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.layers import Layer, trace

log = logging.getLogger(__name__)


def find_writers(trainer: pl.Trainer) -> list[SummaryWriter]:
    """The TensorBoard writers of the run's first process.

    There are none in the others and in the sanity check, nor where the model is divided among the processes: the first
    alone has but a part of the weights, and would wait for the others forever.
    """
    is_divided = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
    if trainer.sanity_checking or is_divided or not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def get_step(trainer: pl.Trainer) -> int:
    """The step at which Lightning logs at this moment."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def count_images(batch: Any) -> int:
    """The length of a batch's first tensor, whatever the batch is made of; 0 where there is none."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def find_images(batch: Any) -> Tensor | None:
    """The images, (B, C, H, W), of a batch (images, ...); None of one that is made of something else."""
    images = batch[0] if isinstance(batch, tuple | list) and batch else None
    return images if isinstance(images, Tensor) and images.dim() == 4 else None


def find_predictions(outputs: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """What a validation step said of which images, where it is a classifier's.

    Args:
        outputs: What ``validation_step`` returned; users' modules return the loss, dictionaries or nothing.
        batch: What it was given.

    Returns:
        Images, (B, C, H, W), labels, whole numbers (B,), and logits, (B, num_classes), of a batch (images, labels);
        None of anything else.
    """
    images = find_images(batch)
    labels = batch[1] if images is not None and len(batch) == 2 else None
    if images is None or not isinstance(labels, Tensor) or not isinstance(outputs, Tensor):
        return None
    is_of_classes = labels.dim() == 1 and not (labels.is_floating_point() or labels.is_complex())
    if not is_of_classes or outputs.dim() != 2 or not len(images) == len(labels) == len(outputs):
        return None
    return images, labels.long(), outputs


def trace_layers(net: nn.Module, images: Tensor) -> list[Layer]:
    """What each layer of a net makes of images; nothing, said in a line, where the net does not take images alone."""
    try:
        return trace(net, images)[0]
    except Exception as error:  # whatever the user's net raises
        log.warning("no pictures of the net's layers: %s", str(error).strip().split("\n")[0])
        return []
