"""Where the callbacks that draw put their pictures."""

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch.utils.tensorboard import SummaryWriter


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
