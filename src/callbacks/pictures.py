"""What the callbacks that draw have in common."""

import logging
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.layers import Layer, trace

log = logging.getLogger(__name__)


class Pictures(Callback):
    """Draws something of each validation to TensorBoard. Subclasses implement ``look`` and ``draw``.

    They serve any LightningModule. What a picture needs is optional: without it the picture is not drawn, and the
    training is not disturbed.

    - ``module.net``, a module that maps images to anything, for the pictures of its layers.
    - ``module.confusion``, a tensor (num_classes, num_classes), images of class i that were taken for class j, set when
      the validation ends, for the confusion matrix.
    - The data module's ``classes``, names of the classes in the order of their numbers; without, these are shown.
    - Batches (images, ...) with images (B, C, H, W), for the pictures of the net's layers.
    - Batches (images, labels) with labels, whole numbers (B,), of which ``validation_step`` returns the logits,
      (B, num_classes), for all that compares labels with predictions.

    Of several validation loaders the first one's batches are looked at, and of several processes the first one's.
    """

    def __init__(self) -> None:
        self.writers: list[SummaryWriter] = []
        self.classes: Sequence[Any] = ()
        self.image: Tensor | None = None  # the first one of the validation, (1, C, H, W)
        self.seen: list[tuple[Tensor, ...]] = []  # what ``look`` keeps of the validation
        self._can_trace = True

    def look(self, pl_module: pl.LightningModule, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Keep in ``self.seen`` what you need of a batch.

        Args:
            pl_module: The module.
            images: (B, C, H, W).
            labels: Whole numbers, (B,).
            logits: (B, num_classes).
        """

    def draw(self, pl_module: pl.LightningModule, writer: SummaryWriter, step: int) -> None:
        """Draw what was seen, or what the module has, at the step of the validation's metrics."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last validation."""
        self.writers, self.image, self.seen = find_writers(trainer), None, []
        classes = getattr(getattr(trainer, "datamodule", None), "classes", None)
        self.classes = classes if isinstance(classes, list | tuple) else ()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at a batch of images."""
        images = batch[0] if isinstance(batch, tuple | list) and batch else None
        if not self.writers or dataloader_idx or not isinstance(images, Tensor) or images.dim() != 4:
            return
        self.image = images[:1] if self.image is None else self.image
        labels = batch[1] if len(batch) == 2 else None
        if not isinstance(labels, Tensor) or not isinstance(outputs, Tensor):
            return
        is_of_classes = labels.dim() == 1 and not (labels.is_floating_point() or labels.is_complex())
        if is_of_classes and outputs.dim() == 2 and len(images) == len(labels) == len(outputs):
            self.look(pl_module, images, labels.long(), outputs)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw."""
        for writer in self.writers:
            self.draw(pl_module, writer, find_step(trainer))
        self.image, self.seen = None, []

    def name(self, label: int) -> str:
        """The class of a number."""
        return str(self.classes[label] if label < len(self.classes) else label)

    def trace(self, pl_module: pl.LightningModule, images: Tensor) -> list[Layer]:
        """What each layer of ``net`` makes of images; nothing without one, or if it does not take images only."""
        net = getattr(pl_module, "net", None)
        if not isinstance(net, nn.Module) or not self._can_trace:
            return []
        try:
            return trace(net, images)[0]
        except Exception as error:  # whatever your net raises
            self._can_trace = False
            log.warning("no pictures of the net's layers: %s", str(error).strip().split("\n")[0])
            return []


def find_writers(trainer: pl.Trainer) -> list[SummaryWriter]:
    """The TensorBoard writers of the run's first process.

    There are none in the other processes and in the sanity check, nor if the model is divided among the processes: the
    first one has only a part of the weights, and would wait for the others forever.
    """
    is_divided = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
    if trainer.sanity_checking or is_divided or not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def find_step(trainer: pl.Trainer) -> int:
    """The step at which Lightning logs the metrics of a validation.

    It counts the batches after which an optimizer has stepped, however many optimizers there are, and counts the
    current batch only after its validation.
    """
    loop = trainer.fit_loop.epoch_loop
    is_within_batch = trainer.state.fn == TrainerFn.FITTING  # not in trainer.validate
    if not trainer.lightning_module.automatic_optimization:  # gradients are never accumulated
        return loop.total_batch_idx + (not is_within_batch)
    has_stepped = trainer.is_last_batch or (loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return trainer.global_step - (is_within_batch and has_stepped)
