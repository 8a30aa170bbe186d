"""A variational autoencoder of 8x8 pictures that logs what it draws; its batches have no labels."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.utils import make_grid


class VAE(pl.LightningModule):
    """Trains an encoder and a decoder with the evidence lower bound as objective (Kingma, Welling, 2013)."""

    def __init__(self, num_latent: int = 4, num_hidden: int = 32, beta: float = 1.0, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, num_hidden), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(num_hidden, num_latent), nn.Linear(num_hidden, num_latent)
        self.decoder = nn.Sequential(nn.Linear(num_latent, num_hidden), nn.ReLU(), nn.Linear(num_hidden, 64))

    def forward(self, pictures: Tensor) -> Tensor:
        """The mean of what stands for pictures (B, 1, 8, 8): (B, num_latent)."""
        return self.mean(self.encoder(pictures))

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(latent).unflatten(1, (1, 8, 8))

    def _measure(self, stage: str, pictures: Tensor) -> Tensor:
        hidden = self.encoder(pictures)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        error = F.binary_cross_entropy_with_logits(self.decode(latent), pictures, reduction="sum") / len(pictures)
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(dim=1).mean()
        loss = error + self.hparams.beta * divergence
        self.log_dict({f"{stage}/loss": loss, f"{stage}/kl": divergence}, on_step=False, on_epoch=True)
        return loss

    def training_step(self, pictures: Tensor, batch_idx: int) -> Tensor:
        return self._measure("train", pictures)

    def validation_step(self, pictures: Tensor, batch_idx: int) -> None:
        self._measure("val", pictures)

    def test_step(self, pictures: Tensor, batch_idx: int) -> None:
        self._measure("test", pictures)

    def on_validation_epoch_end(self) -> None:
        if isinstance(self.logger, TensorBoardLogger):
            latent = torch.randn(16, self.hparams.num_latent, device=self.device)
            grid = make_grid(self.decode(latent).sigmoid(), nrow=4)
            self.logger.experiment.add_image("drawn", grid, self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class Bars(pl.LightningDataModule):
    """Pictures (1, 8, 8) of a bright bar each, upright or level."""

    def __init__(self, num_pictures: int = 240, batch_size: int = 20) -> None:
        super().__init__()
        self.num_pictures, self.batch_size = num_pictures, batch_size

    def _make_loader(self, num_pictures: int, drawn_by: int, **options: Any) -> DataLoader:
        rng = torch.Generator().manual_seed(drawn_by)
        places = torch.randint(8, (num_pictures,), generator=rng)
        pictures = F.one_hot(places, 8).float()[:, None, :, None].expand(-1, 1, 8, 8).clone()
        pictures[::2] = pictures[::2].transpose(2, 3)
        return DataLoader(pictures, batch_size=self.batch_size, **options)  # type: ignore[arg-type]  # a tensor is a dataset, too

    def train_dataloader(self) -> DataLoader:
        return self._make_loader(self.num_pictures, 0, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._make_loader(self.num_pictures // 4, 1)

    def test_dataloader(self) -> DataLoader:
        return self._make_loader(self.num_pictures // 4, 2)

    predict_dataloader = test_dataloader
