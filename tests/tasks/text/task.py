"""A character-level transformer that is trained by steps, on an endless stream of windows of a text."""

from collections.abc import Iterator
from itertools import count

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 40


class Transformer(pl.LightningModule):
    """Predicts each next character of a text from those before it."""

    def __init__(
        self,
        vocab_size: int,
        context_size: int,
        num_layers: int = 1,
        num_heads: int = 2,
        width: int = 16,
        dropout: float = 0.1,
        lr: float = 1e-2,
        warmup_steps: int = 5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context_size, width)
        layer = nn.TransformerEncoderLayer(width, num_heads, 2 * width, dropout, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab_size)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context_size), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        hidden = self.tokens(tokens) + self.positions.weight[:length]  # (B, T, width)
        return self.head(self.layers(hidden, mask=self.mask[:length, :length], is_causal=True))  # (B, T, vocab_size)

    def _measure(self, name: str, batch: list[Tensor]) -> Tensor:
        tokens, targets = batch  # (B, T) each
        loss = F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())
        self.log(name, loss, prog_bar=True)
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self._measure("train/loss", batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._measure("val/loss", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._measure("test/loss", batch)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr, betas=(0.9, 0.95))
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=self.hparams.warmup_steps)
        return [optimizer], [{"scheduler": warm_up, "interval": "step"}]


class Stream(IterableDataset):
    """Windows of a text at random places, without end; the n-th depends on the seed and n only."""

    def __init__(self, text: Tensor, context_size: int, seed: int, first: int) -> None:
        self.text, self.context_size, self.seed, self.first = text, context_size, seed, first

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in count(self.first):
            rng = torch.Generator().manual_seed(1_000_003 * self.seed + number)
            start = int(torch.randint(len(self.text) - self.context_size, (1,), generator=rng))
            window = self.text[start : start + self.context_size + 1]
            yield window[:-1], window[1:]


class Windows(Dataset):
    """All windows of a text, one after the other."""

    def __init__(self, text: Tensor, context_size: int) -> None:
        self.windows = text.unfold(0, context_size + 1, context_size)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.windows[number, :-1], self.windows[number, 1:]


class Characters(pl.LightningDataModule):
    """The characters of a text as numbers; the last fifth is to validate and to test on."""

    def __init__(self, context_size: int = 16, batch_size: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.context_size, self.batch_size, self.seed = context_size, batch_size, seed
        self.alphabet = sorted(set(TEXT))
        text = torch.tensor([self.alphabet.index(character) for character in TEXT])
        self.parts = text.split([len(text) * 8 // 10, len(text) // 10, len(text) - len(text) * 9 // 10])

    def train_dataloader(self) -> DataLoader:
        # Of a run that resumes, the next windows: the trainer knows how many steps are done.
        stream = Stream(self.parts[0], self.context_size, self.seed, self.trainer.global_step * self.batch_size)
        return DataLoader(stream, self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Windows(self.parts[1], self.context_size), self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(Windows(self.parts[2], self.context_size), self.batch_size)
