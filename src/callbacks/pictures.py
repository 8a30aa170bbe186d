"""What callbacks have in common: when to draw, how a picture gets to any logger, and at which step."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

GROWTH = 1.1  # from one validation that is drawn to the next; the first twelve all are


class Pictures(Callback):
    """Draws something of a validation for all loggers that take pictures. Subclasses implement ``look`` and ``draw``.

    The first validations are drawn, and later ones ever more rarely: 66 of 2,000.

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
        self.loggers: list[Logger] = []
        self.classes: Sequence[Any] = ()
        self.image: Tensor | None = None  # the first one of the validation, (1, C, H, W)
        self.seen: list[tuple[Tensor, ...]] = []  # what ``look`` keeps of the validation
        self.num_validations = 0

    def state_dict(self) -> dict[str, int]:
        """The number of validations so far, for a run that is resumed."""
        return {"num_validations": self.num_validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue to count."""
        self.num_validations = state_dict["num_validations"]

    def look(self, pl_module: pl.LightningModule, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Keep in ``self.seen`` what you need of a batch.

        Args:
            pl_module: The module.
            images: (B, C, H, W).
            labels: Whole numbers, (B,).
            logits: (B, num_classes).
        """

    def draw(self, pl_module: pl.LightningModule, step: int) -> None:
        """Draw what was seen, or what the module has, at the step of the validation's metrics, for ``self.loggers``."""

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether this validation is to be drawn."""
        count = self.num_validations
        is_next = count == 1 or math.floor(math.log(count, GROWTH)) > math.floor(math.log(count - 1, GROWTH))
        return is_next or trainer.state.fn != TrainerFn.FITTING

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last validation."""
        self.num_validations += not trainer.sanity_checking
        self.image, self.seen = None, []
        self.loggers = find_loggers(trainer) if self.num_validations and self.is_due(trainer) else []
        classes = getattr(getattr(trainer, "datamodule", None), "classes", None)
        self.classes = classes if isinstance(classes, list | tuple) else ()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Look at a batch of images."""
        images = batch[0] if isinstance(batch, tuple | list) and batch else None
        if not self.loggers or dataloader_idx or not isinstance(images, Tensor) or images.dim() != 4:
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
        if self.loggers:
            self.draw(pl_module, find_step(trainer))
        self.image, self.seen = None, []

    def name(self, label: int) -> str:
        """The class of a number."""
        return str(self.classes[label] if label < len(self.classes) else label)


def show(loggers: Iterable[Logger], name: str, picture: NDArray[np.uint8], step: int) -> None:
    """Log a picture: to TensorBoard, and to each logger with ``log_image(key, images, step)``, as W&B's has it.

    Args:
        loggers: Those of a trainer; loggers that take no pictures are left out.
        name: As of a metric, ``val/confusion``.
        picture: Grey (H, W), or in colour, (H, W, 3).
        step: As of the metrics beside it.
    """
    picture = np.stack([picture] * 3, axis=-1) if picture.ndim == 2 else picture
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, step, dataformats="HWC")
        elif callable(log_image := getattr(logger, "log_image", None)):
            log_image(name, [picture], step)


def find_loggers(trainer: pl.Trainer) -> list[Logger]:
    """The loggers of the run's first process.

    There are none in the other processes and in the sanity check, nor if the model is divided among the processes: the
    first one has only a part of the weights, and would wait for the others forever.
    """
    is_divided = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
    return [] if trainer.sanity_checking or is_divided or not trainer.is_global_zero else trainer.loggers


def find_writers(loggers: Iterable[Logger]) -> list[SummaryWriter]:
    """The writers of those that are TensorBoard's, for what only TensorBoard shows."""
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


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


def logged_step(trainer: pl.Trainer) -> int | None:
    """The step that an optimizer is about to take, as Lightning counts it, if training logs at it."""
    is_automatic = trainer.lightning_module.automatic_optimization  # else several optimizers may step in a batch
    step = trainer.global_step if is_automatic else trainer.fit_loop.epoch_loop.total_batch_idx
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return step if every and (step + 1) % every == 0 else None
