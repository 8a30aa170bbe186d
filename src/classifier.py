"""The task: classify images with any net from (B, C, H, W) to logits."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from src.engine.errors import ArgumentError, DivergenceError

Batch = tuple[Tensor, Tensor]
COMPILED = "_orig_mod."


class ImageClassifier(pl.LightningModule):
    """Trains a net; logs ``loss`` and ``acc`` of ``train/``, ``val/`` and ``test/`` once an epoch.

    The training figures are means over the epoch's batches as they were trained on, counted on the device: one
    ``self.log`` a step would cost a tenth of LeNet-5's step.

    Args:
        net: Maps images, float (B, C, H, W), to logits, (B, num_classes); the largest is the class it takes them for.
        num_classes: Number of classes.
        optimizer: Makes the optimizer of the parameters given to it. None will do where nothing is trained.
        scheduler: Lightning's learning-rate scheduler configuration (``interval``, ``monitor`` and so on) with a
            ``scheduler`` that makes the scheduler of an optimizer. A ``total_steps`` that is None there is filled in
            with the run's number of optimizer steps. None or empty: the learning rate stays.
        input_size: (C, H, W) of an image, for the graph in TensorBoard and the shapes in the model summary.
        loss: Mean loss, a scalar, of logits (B, num_classes) and labels (B,).

    Raises:
        ArgumentError: If the optimizer or the scheduler takes none of a name that it is to be given.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int = 10,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: dict[str, Any] | None = None,
        input_size: tuple[int, int, int] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        super().__init__()
        _check_arguments("optimizer", optimizer)
        _check_arguments("scheduler.scheduler", (scheduler or {}).get("scheduler"))
        # The same numbers in another memory layout: about 1.4x faster on a CPU.
        self.net = net.to(memory_format=torch.channels_last)
        self.num_classes = num_classes  # by which predict, export and demo know a classifier
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.loss = loss
        self.example_input_array = torch.zeros(1, *input_size) if input_size else None
        # Of the running epoch: sum of the images' losses, correct images, images. No buffer: DDP would spread those of
        # its first process to all before each step.
        self.train_sums = torch.zeros(3)
        self._loaded_sums: Tensor | None = None
        self.register_load_state_dict_pre_hook(_fit_names)
        self.eval_loss = MeanMetric()
        # (num_classes, num_classes): images of class i that were taken for class j. Accuracy is read off it.
        self.eval_confusion = MulticlassConfusionMatrix(num_classes, validate_args=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Take a short way where Lightning notes which hook is running, some 40 times a step.

        nn.Module looks whether a value is a parameter, a module or a buffer, which takes a microsecond.
        """
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        logits: Tensor = self.net(images)
        return logits

    def on_train_start(self) -> None:
        """Count on the device, from where a checkpoint left off."""
        loaded, self._loaded_sums = self._loaded_sums, None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        if loaded is None:
            loaded = torch.zeros(world_size, 3)
        elif len(loaded) != world_size:
            loaded = torch.cat([loaded.sum(dim=0, keepdim=True), torch.zeros(world_size - 1, 3)])
        self.train_sums = loaded[rank].to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums of all processes, (world_size, 3)."""
        sums = [self.train_sums.cpu()] * self.trainer.world_size
        if len(sums) > 1:
            torch.distributed.all_gather_object(sums, sums[0])
        checkpoint["train_sums"] = torch.stack(sums)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums until training starts; a checkpoint of another tool has none."""
        self._loaded_sums = checkpoint.get("train_sums")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the batch."""
        images, labels = batch
        logits = self.net(images)
        loss = self.loss(logits, labels)
        with torch.no_grad():
            correct = (logits.argmax(dim=1) == labels).sum()
            self.train_sums += torch.stack([loss * len(labels), correct, torch.full_like(loss, len(labels))])
        if self.trainer.world_size > 1 and self.trainer.is_last_batch:
            # Of this batch alone the processes may have unequal shares, and their gradients' plain mean is taken.
            count = self.trainer.strategy.reduce(torch.full_like(loss, len(labels)), reduce_op="mean")
            loss = loss * len(labels) / count
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the epoch's means behind its last batch, before validation and all callbacks' ends of the epoch.

        Raises:
            DivergenceError: If the loss of a batch was not finite; looked up as often as losses are logged, since it
                makes a GPU wait.
        """
        if self.trainer.is_last_batch or (batch_idx + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            loss = self.train_sums[:1].clone()  # reduced in place; all processes shall stop, or none
            self._require_finite("training", self.trainer.strategy.reduce(loss, reduce_op="sum"))
        if self.trainer.is_last_batch:
            loss_sum, correct, count = self.trainer.strategy.reduce(self.train_sums, reduce_op="sum").tolist()
            self.train_sums.zero_()
            metrics = {"train/loss": loss_sum / count, "train/acc": correct / count}
            # The same in all processes; Lightning would weight them by their shares of the batch, and wrongly.
            self.log_dict(metrics, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Count the batch; its logits, (B, num_classes), are for callbacks."""
        return self._count(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_counts("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the batch."""
        self._count(batch)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics; the confusion matrix stays in ``confusion``."""
        self._log_counts("test")

    def _count(self, batch: Batch) -> Tensor:
        images, labels = batch
        logits: Tensor = self.net(images)
        self.eval_loss.update(self.loss(logits, labels), weight=len(labels))
        self.eval_confusion.update(logits.argmax(dim=1), labels)
        return logits

    def _log_counts(self, split: str) -> None:
        self.confusion: Tensor = self.eval_confusion.compute()
        accuracy = self.confusion.trace() / self.confusion.sum()
        loss = self.eval_loss.compute()
        self.log_dict({f"{split}/loss": loss, f"{split}/acc": accuracy}, sync_dist=True)
        self.eval_loss.reset()
        self.eval_confusion.reset()
        if split == "val":
            self._require_finite("validation", loss)

    def _require_finite(self, stage: str, loss: Tensor) -> None:
        if not loss.isfinite():
            raise DivergenceError(
                f"the {stage} loss is {loss.item()} in epoch {self.current_epoch}, by step {self.global_step}: "
                "try a lower optimizer.lr, or trainer.gradient_clip_val=1"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, with its scheduler if there is one."""
        if self.optimizer is None:
            raise ValueError("this module was built without an optimizer: it can be tested, not trained")
        optimizer = self.optimizer(self.net.parameters())
        if not self.scheduler:
            return optimizer
        make = self.scheduler["scheduler"]
        runtime = {}
        if make.keywords.get("total_steps", 0) is None:
            runtime["total_steps"] = int(self.trainer.estimated_stepping_batches)
        return {  # type: ignore[return-value]
            "optimizer": optimizer,
            "lr_scheduler": {**self.scheduler, "scheduler": make(optimizer, **runtime)},
        }


def _check_arguments(name: str, make: Any) -> None:
    """Look now: a partial is called when the data are there and the run has begun."""
    if isinstance(make, partial):
        parameters = inspect.signature(make.func).parameters
        takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
        for key in make.keywords:
            if key not in parameters and not takes_all:
                target = f"{make.func.__module__}.{make.func.__qualname__}"
                raise ArgumentError(f"{name}.{key}: {target} takes no such argument")


def _fit_names(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Rename what torch.compile has renamed, so that compiled and plain nets load each other's weights."""
    own = {name.replace(COMPILED, ""): name for name in module.state_dict()}
    for name in list(state_dict):
        state_dict[own.get(name.replace(COMPILED, ""), name)] = state_dict.pop(name)
