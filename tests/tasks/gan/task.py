"""A GAN: two optimizers that the module steps itself, no validation, no test."""

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class GAN(pl.LightningModule):
    """Learns to draw points of the plane that look like those of the data (Goodfellow et al., 2014)."""

    def __init__(
        self, num_latent: int = 4, num_hidden: int = 32, lr: float = 2e-3, betas: tuple[float, float] = (0.5, 0.999)
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(num_latent, num_hidden), nn.ReLU(), nn.Linear(num_hidden, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, num_hidden), nn.ReLU(), nn.Linear(num_hidden, 1))
        self.example_input_array = torch.zeros(2, num_latent)  # what src.export traces

    def forward(self, latent: Tensor) -> Tensor:
        """Points (B, 2) for noise (B, num_latent)."""
        return self.generator(latent)

    def _judge(self, points: Tensor, is_real: bool) -> Tensor:
        logits = self.discriminator(points)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(is_real)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (real,) = batch
        generator, discriminator = self.optimizers()
        drawn = self(torch.randn(len(real), self.hparams.num_latent, device=self.device))

        self.toggle_optimizer(generator)
        g_loss = self._judge(drawn, is_real=True)
        generator.zero_grad()
        self.manual_backward(g_loss)
        generator.step()
        self.untoggle_optimizer(generator)

        self.toggle_optimizer(discriminator)
        d_loss = (self._judge(real, is_real=True) + self._judge(drawn.detach(), is_real=False)) / 2
        discriminator.zero_grad()
        self.manual_backward(d_loss)
        discriminator.step()
        self.untoggle_optimizer(discriminator)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss}, prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        options = {"lr": self.hparams.lr, "betas": self.hparams.betas}
        return [torch.optim.Adam(part.parameters(), **options) for part in (self.generator, self.discriminator)]


class Ring(pl.LightningDataModule):
    """Points (2,) on a circle; only to train on."""

    def __init__(self, num_points: int = 240, batch_size: int = 20) -> None:
        super().__init__()
        self.num_points, self.batch_size = num_points, batch_size

    def train_dataloader(self) -> DataLoader:
        angles = torch.linspace(0, 2 * torch.pi, self.num_points)
        points = torch.stack([angles.cos(), angles.sin()], dim=1)
        return DataLoader(TensorDataset(points), self.batch_size, shuffle=True)
