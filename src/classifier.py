"""The task that ships: classify images with any net from (B, C, H, W) to logits."""

from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

Batch = tuple[Tensor, Tensor]


class Counts(Metric):
    """Mean loss, accuracy and confusion matrix of the images that it has been given.

    It keeps sums only: they are exact over unequal batches and several processes, and a resumed run counts on from
    them. ``update`` takes 30 microseconds on a CPU, ``self.log`` in each step would take a millisecond.

    Args:
        num_classes: Number of classes, 1 or more.
    """

    loss_sum: Tensor
    loss_rest: Tensor
    confusion: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("loss_rest", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: its mean loss, a scalar, logits (B, num_classes), and labels (B,)."""
        # Kahan's sum: what rounding cuts off is added with the next batch. Not all devices have float64.
        added = loss.detach().float() * len(labels) + self.loss_rest
        total = self.loss_sum + added
        self.loss_rest, self.loss_sum = added - (total - self.loss_sum), total
        ones = torch.ones_like(labels, dtype=torch.long)
        self.confusion.index_put_((labels, logits.argmax(dim=1)), ones, accumulate=True)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, accuracy, and the confusion matrix, (num_classes, num_classes): a row a true class."""
        count = self.confusion.sum()
        return self.loss_sum / count, self.confusion.trace() / count, self.confusion.clone()


class ImageClassifier(pl.LightningModule):
    """Trains a net; logs ``loss`` and ``acc`` of ``train/``, ``val/`` and ``test/`` once an epoch.

    Args:
        net: Maps images, float (B, C, H, W), to logits, (B, num_classes); the largest is the predicted class.
        num_classes: Number of classes.
        optimizer: Makes the optimizer of the parameters given to it; None if you only test or predict.
        scheduler: Lightning's learning-rate scheduler configuration (``interval``, ``monitor`` and so on) with a
            ``scheduler`` that makes the scheduler of an optimizer. None or empty: the learning rate stays.
        input_size: (C, H, W) of an image, for the graph in TensorBoard and the shapes in the model summary.
        loss: Mean loss, a scalar, of logits (B, num_classes) and labels (B,); of soft labels, (B, num_classes), too,
            where batches are mixed up to train on. Or arguments of torch's cross-entropy: ``weight``, a number a class.
        metrics: By name, what else is logged of each split: of probabilities (B, num_classes) and labels (B,).

    Attributes:
        confusion: After a validation or test, its confusion matrix, (num_classes, num_classes): a row a true class.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int = 10,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: dict[str, Any] | None = None,
        input_size: tuple[int, int, int] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | dict[str, Any] = F.cross_entropy,
        metrics: dict[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        # The same numbers in another memory layout: about 1.4x faster on a CPU.
        self.net = net.to(memory_format=torch.channels_last)
        self.num_classes = num_classes  # by which predict, export and demo know a classifier
        self.optimizer = optimizer
        self.scheduler = scheduler
        if not callable(loss):
            weight = None if loss.get("weight") is None else torch.tensor(loss["weight"]).float()
            loss = nn.CrossEntropyLoss(**{**loss, "weight": weight})
        self.loss: Callable[[Tensor, Tensor], Tensor] = loss
        self.example_input_array = torch.zeros(1, *input_size) if input_size else None
        self.train_counts, self.val_counts, self.test_counts = (Counts(num_classes) for _ in range(3))
        # Groups of metrics share states, which a run that is resumed within an epoch would not find.
        chosen = MetricCollection(dict(metrics or {}), compute_groups=False)
        self.train_metrics, self.val_metrics, self.test_metrics = (
            chosen.clone(prefix=f"{split}/") for split in ("train", "val", "test")
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the batch."""
        return self._step("train", batch)[0]

    def on_train_epoch_end(self) -> None:
        """Log the means over the epoch's batches as they were trained on."""
        if self.train_counts.update_count:  # else the last validation has just logged them
            self._log("train")

    def running_metrics(self) -> dict[str, Tensor]:
        """Loss and accuracy of the epoch so far, of this process's batches, for the progress bar."""
        loss_sum, confusion = self.train_counts.loss_sum, self.train_counts.confusion
        return {"loss": loss_sum / confusion.sum(), "acc": confusion.trace() / confusion.sum()}

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Count the batch; its logits, (B, num_classes), are for callbacks."""
        return self._step("val", batch)[1]

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics; where it counts steps, not epochs, those of training since the last time, too."""
        self.confusion = self._log("val")
        if self.trainer.check_val_every_n_epoch is None:
            self.on_train_epoch_end()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the batch."""
        self._step("test", batch)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self.confusion = self._log("test")

    def _step(self, split: str, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = self.net(images)
        loss = self.loss(logits, labels)
        hard = labels.argmax(dim=1) if labels.dim() > 1 else labels
        getattr(self, f"{split}_counts").update(loss, logits, hard)
        if metrics := getattr(self, f"{split}_metrics"):
            metrics.update(logits.detach().softmax(dim=1), hard)
        return loss, logits

    def _log(self, split: str) -> Tensor:
        counts, metrics = getattr(self, f"{split}_counts"), getattr(self, f"{split}_metrics")
        loss, accuracy, confusion = counts.compute()
        self.log_dict({f"{split}/loss": loss, f"{split}/acc": accuracy, **metrics.compute()}, sync_dist=True)
        counts.reset()
        metrics.reset()
        return confusion  # type: ignore[no-any-return]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, with its scheduler if there is one."""
        if self.optimizer is None:
            raise ValueError("optimizer=null: this module was built without one: it can be tested, not trained")
        optimizer = self.optimizer(self.parameters())
        if not self.scheduler:
            return optimizer
        scheduler = self.scheduler["scheduler"](optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {**self.scheduler, "scheduler": scheduler}}  # type: ignore[return-value]
