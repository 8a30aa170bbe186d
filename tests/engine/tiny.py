"""What the engine is tested on: a five-line net, a task of its own, and data that are drawn in a millisecond.

Nothing here knows LeNet-5, MNIST or ``ImageClassifier``: the engine must serve any LightningModule and DataModule.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from tests.configs import compose_fast

TINY_CONF = Path(__file__).with_name("conf")
# For commands: python -m src.train *TINY
TINY = (
    f"--config-dir={TINY_CONF}", "data=tiny", "model=tiny", "scheduler=[]", "trainer=cpu",
    "trainer.log_every_n_steps=3",
)  # fmt: skip


def compose_tiny(output_dir: Path, *overrides: str, config_name: str = "train") -> DictConfig:
    """The config of a training that takes a second and writes to ``output_dir``."""
    paths = [f"output_dir={output_dir}", f"root_dir={output_dir}", f"hydra.searchpath=[file://{TINY_CONF}]"]
    return compose_fast(config_name, *paths, *TINY[1:], "callbacks=minimal", "logger=[]", *overrides)


class TinyNet(nn.Sequential):
    """Maps rows (B, 4) to logits (B, 2)."""

    def __init__(self, num_hidden: int = 8, dropout: float = 0.1) -> None:
        super().__init__(nn.Linear(4, num_hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(num_hidden, 2))


class TinyTask(pl.LightningModule):
    """Logs ``train/loss``, ``val/loss``, ``val/acc``, ``test/loss`` and ``test/acc``, only by ``self.log``."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.scheduler = scheduler

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.net(rows)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> None:
        logits = self(batch[0])
        accuracy = (logits.argmax(dim=1) == batch[1]).float().mean()
        self.log_dict({f"{split}/loss": F.cross_entropy(logits, batch[1]), f"{split}/acc": accuracy}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        assert self.optimizer is not None
        optimizer = self.optimizer(self.parameters())
        if not self.scheduler:
            return optimizer
        scheduler = self.scheduler["scheduler"](optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {**self.scheduler, "scheduler": scheduler}}


class TinyLoader:
    """Batches of rows in an order that (seed, epoch) decide, a process's share of each; its state says where it is.

    Args:
        rows: (N, 4); a row's class says whether its sum is above 0.
        batch_size: Rows that the processes share.
        seed: None: in their own order.
        process: The number of this process, and of how many.
    """

    def __init__(self, rows: Tensor, batch_size: int, seed: int | None, process: tuple[int, int]) -> None:
        self.rows, self.batch_size, self.seed, self.process = rows, batch_size, seed, process
        self.epoch = self.position = self._first = 0
        self.sampler, self.batch_sampler = self, None  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.rows))
        if self.seed is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(1000 * self.seed + self.epoch))
        first, self._first = self._first, 0
        for index in range(first, len(self)):
            self.position = index + 1
            batch = order[index * self.batch_size : (index + 1) * self.batch_size]
            rows = self.rows[batch[self.process[0] :: self.process[1]]]
            yield rows, (rows.sum(dim=1) > 0).long()

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position % len(self)}

    def rewind(self, num_batches: int) -> None:
        self.position = num_batches

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._first = state["position"]


class TinyData(pl.LightningDataModule):
    """Rows of four numbers to tell their sum's sign from.

    ``noise`` is drawn for each batch to train on, as an augmentation is.
    """

    def __init__(self, num_rows: int = 240, batch_size: int = 20, seed: int = 0, noise: float = 0.0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected 1 or more")
        self.num_rows, self.batch_size, self.seed, self.noise = num_rows, batch_size, seed, noise
        self._loader: TinyLoader | None = None
        self._state: dict[str, int] | None = None

    def _make_loader(self, num_rows: int, drawn_by: int, seed: int | None = None) -> TinyLoader:
        rows = torch.randn(num_rows, 4, generator=torch.Generator().manual_seed(drawn_by))
        process = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return TinyLoader(rows, self.batch_size, seed, process)

    def train_dataloader(self) -> TinyLoader:
        self._loader = self._make_loader(self.num_rows, 0, self.seed)
        if self._state:
            self._loader.load_state_dict(self._state)
            self._state = None
        return self._loader

    def val_dataloader(self) -> TinyLoader:
        return self._make_loader(self.num_rows // 4, 1)

    def test_dataloader(self) -> TinyLoader:
        return self._make_loader(self.num_rows // 4, 2)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        rows, labels = batch
        if self.noise and self.trainer and self.trainer.training:
            rows = rows + self.noise * torch.randn_like(rows)
        return rows, labels

    def state_dict(self) -> dict[str, Any]:
        return {"loader": self._loader.state_dict() if self._loader else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict["loader"]
