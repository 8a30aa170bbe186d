"""What callbacks that draw have in common, with one of a user's own."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from src.callbacks.pictures import Pictures, find_loggers, show
from tests.callbacks.tasks import Classifier, make_images, make_trainer, read


class Mean(Pictures):
    """Draws the mean of a validation's images."""

    def look(self, pl_module: pl.LightningModule, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        assert logits.argmax(dim=1).shape == labels.shape
        self.seen.append((images.cpu(),))

    def draw(self, pl_module: pl.LightningModule, step: int) -> None:
        mean = torch.cat([images for (images,) in self.seen]).mean(dim=(0, 1))
        show(self.loggers, "val/mean", mean.clamp(0, 1).mul(255).byte().numpy(), step)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_a_picture_of_ones_own_is_at_the_step_of_the_metrics_and_sees_the_first_loader(tmp_path: Path) -> None:
    train, validation, other = (DataLoader(make_images(num, drawn_by=num), 8) for num in (24, 26, 10))
    make_trainer(tmp_path / "one", [Mean()], max_epochs=2).fit(Classifier(), train, validation)
    make_trainer(tmp_path / "two", [Mean()], max_epochs=2).fit(Classifier(), train, [validation, other])
    events, both = read(tmp_path / "one"), read(tmp_path / "two")
    steps = [event.step for event in events.Scalars("val/acc")]
    assert [event.step for event in events.Images("val/mean")] == steps == [2, 5]
    assert [event.encoded_image_string for event in events.Images("val/mean")] == [
        event.encoded_image_string for event in both.Images("val/mean")
    ]


def test_nothing_is_drawn_where_the_first_process_would_wait_or_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=TensorBoardLogger(str(tmp_path)), enable_checkpointing=False)
    assert len(find_loggers(trainer)) == 1
    trainer.sanity_checking = True
    assert find_loggers(trainer) == []
    trainer.sanity_checking = False
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    assert find_loggers(trainer) == []
    monkeypatch.undo()
    monkeypatch.setattr(type(trainer), "strategy", FSDPStrategy())
    assert find_loggers(trainer) == []
