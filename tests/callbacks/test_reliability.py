"""The reliability diagram, compared with scikit-learn's calibration curve."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.calibration import calibration_curve
from torch.utils.data import DataLoader

from src.callbacks.reliability import BAR, NUM_BINS, Reliability, draw_reliability
from tests.callbacks.tasks import Classifier, make_images, make_trainer, read


def test_a_bar_is_as_high_as_the_share_of_right_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = 0.3 + 0.7 * torch.rand(2000, generator=generator)
    right = torch.rand(2000, generator=generator) < probabilities**2  # surer than it should be
    picture = draw_reliability(probabilities, right)
    shares, _ = calibration_curve(right, probabilities, n_bins=NUM_BINS)
    empty = NUM_BINS - len(shares)
    assert empty == 4
    is_bar = (picture[:, 5::BAR] == (9, 105, 218)).all(axis=2)[:, :NUM_BINS]
    np.testing.assert_allclose(is_bar.sum(axis=0)[empty:] / len(picture), shares, atol=0.01)
    assert not is_bar[:, :empty].any()


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_each_validation_is_drawn_with_all_of_its_batches(tmp_path: Path) -> None:
    validation = make_images(103, drawn_by=1)
    module = Classifier()
    make_trainer(tmp_path, [Reliability()], max_epochs=2).fit(
        module, DataLoader(make_images(80, drawn_by=0), 8), DataLoader(validation, 30)
    )
    drawn = read(tmp_path).Images("val/reliability")
    assert len(drawn) == 2
    images, labels = validation.tensors
    with torch.no_grad():
        probabilities, answers = module.net(images).softmax(dim=1).max(dim=1)
    picture = np.asarray(Image.open(io.BytesIO(drawn[-1].encoded_image_string)))
    np.testing.assert_array_equal(picture, draw_reliability(probabilities, answers == labels))
