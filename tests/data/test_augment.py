"""src/data/augment.py: measured on a blob, whose centre of mass moves as the image does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from src.data import augment
from src.data.augment import random_affine, random_elastic
from src.data.mnist import BACKGROUND

NUM, SIZE = 2000, 32

Change = Callable[[Tensor, float], Tensor]
both = pytest.mark.parametrize("change", [random_affine, random_elastic])


def make_blobs(x: float, y: float) -> Tensor:
    """Copies of a soft dot that lies (x, y) pixels right and below of the centre, (NUM, 1, SIZE, SIZE)."""
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    dot = torch.exp(-((axis.view(1, -1) - x) ** 2 + (axis.view(-1, 1) - y) ** 2) / (2 * 1.5**2))
    return (dot + BACKGROUND).expand(NUM, 1, SIZE, SIZE)


def centres(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels from the image's centre to that of its mass, rightwards and downwards, (NUM,) each."""
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    mass = (images - BACKGROUND).squeeze(1)
    total = mass.sum(dim=(1, 2))
    return (mass.sum(dim=1) * axis).sum(dim=1) / total, (mass.sum(dim=2) * axis).sum(dim=1) / total


def keep_only(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in {"MAX_DEGREES", "MAX_SHIFT", "MAX_BENT_SHIFT", "MAX_SCALE", "MAX_SHEAR", "BEND"} - {change}:
        monkeypatch.setattr(augment, limit, 0.0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (5, 3, 28, 20)])
@both
def test_shape_and_dtype_are_kept(change: Change, shape: tuple[int, ...]) -> None:
    changed = change(torch.rand(shape), 0.0)

    assert changed.shape == shape
    assert changed.dtype == torch.float32


@both
def test_images_given_are_not_changed(change: Change) -> None:
    images = torch.rand(4, 1, 32, 32)
    before = images.clone()
    change(images, BACKGROUND)

    assert torch.equal(images, before)


@both
def test_background_stays_background(change: Change) -> None:
    images = torch.full((8, 1, 32, 32), BACKGROUND)

    assert torch.equal(change(images, BACKGROUND), images)


@both
def test_each_image_gets_a_change_of_its_own(change: Change) -> None:
    changed = change(make_blobs(5, 5), BACKGROUND)

    assert len({image.numpy().tobytes() for image in changed}) == NUM


@both
def test_values_stay_in_their_range(change: Change) -> None:
    images = BACKGROUND + 3 * torch.rand(64, 1, 32, 32)
    changed = change(images, BACKGROUND)

    assert changed.min() >= BACKGROUND - 1e-5
    assert changed.max() <= images.max() + 1e-5


@both
def test_without_limits_nothing_changes(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_only("", monkeypatch)
    images = make_blobs(5, 5)

    torch.testing.assert_close(change(images, BACKGROUND), images)


def test_rotation_keeps_the_radius_and_stays_below_10_degrees(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_only("MAX_DEGREES", monkeypatch)
    x, y = centres(random_affine(make_blobs(8, 0), BACKGROUND))
    degrees = torch.atan2(y, x).rad2deg()

    torch.testing.assert_close(torch.hypot(x, y), torch.full((NUM,), 8.0), atol=0.05, rtol=0)
    assert_fills(degrees, -10, 10)


@pytest.mark.parametrize(
    ("change", "name", "limit"), [(random_affine, "MAX_SHIFT", 2), (random_elastic, "MAX_BENT_SHIFT", 1)]
)
def test_shift_stays_below_its_limit(change: Change, name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_only(name, monkeypatch)
    x, y = centres(change(make_blobs(8, -4), BACKGROUND))

    assert_fills(x - 8, -limit, limit)
    assert_fills(y + 4, -limit, limit)
    assert torch.stack([x, y]).corrcoef()[0, 1].abs() < 0.1


def test_scale_stays_below_10_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_only("MAX_SCALE", monkeypatch)
    x, y = centres(random_affine(make_blobs(6, -3), BACKGROUND))

    assert_fills(x / 6, 0.9, 1.1)
    torch.testing.assert_close(y, -x / 2, atol=0.05, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(24, 64), (64, 24)])
@pytest.mark.parametrize("is_along_x", [True, False])
def test_a_rotation_is_one_where_images_are_not_square(
    height: int, width: int, is_along_x: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_only("MAX_DEGREES", monkeypatch)
    rows, columns = ((torch.arange(size) - (size - 1) / 2) for size in (height, width))
    column, row = (8.0, 0.0) if is_along_x else (0.0, 8.0)
    dot = torch.exp(-((rows.view(-1, 1) - row) ** 2 + (columns - column) ** 2) / 4.5)
    mass = random_affine(dot.expand(NUM, 1, -1, -1), 0.0).squeeze(1)
    total = mass.sum(dim=(1, 2))
    x, y = (mass.sum(dim=1) * columns).sum(dim=1) / total, (mass.sum(dim=2) * rows).sum(dim=1) / total

    torch.testing.assert_close(torch.hypot(x, y), torch.full((NUM,), 8.0), atol=0.1, rtol=0)
    assert_fills(torch.rad2deg(torch.atan2(y, x)) - (0 if is_along_x else 90), -10, 10)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_type_is_changed_alike(change: Change, dtype: torch.dtype) -> None:
    images = torch.rand(6, 1, 32, 32)
    torch.manual_seed(0)
    expected = change(images, 0.5)
    torch.manual_seed(0)
    changed = change(images.to(dtype), 0.5)

    assert changed.dtype == dtype
    torch.testing.assert_close(changed.float(), expected, atol=0.02, rtol=0)


def test_shear_slants_by_a_tenth_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_only("MAX_SHEAR", monkeypatch)
    x, y = centres(random_affine(make_blobs(0, 8), BACKGROUND))

    assert_fills(x / 8, -0.1, 0.1)
    torch.testing.assert_close(y, torch.full((NUM,), 8.0), atol=0.05, rtol=0)


def test_all_changes_together_stay_small() -> None:
    x, y = centres(random_affine(make_blobs(0, 0), BACKGROUND))

    # Both shifts at their limit, enlarged by scale and shear.
    assert torch.hypot(x, y).max() <= 2 * 2**0.5 * 1.1 * 1.05 + 0.05


def test_bending_moves_pixels_a_little_and_neighbours_together(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_only("BEND", monkeypatch)
    moves = []  # by the same fields, of dots at three places
    for x in (0, 1, 12):
        torch.manual_seed(1)
        moves.append(torch.stack(centres(random_elastic(make_blobs(x, 0), BACKGROUND))) - torch.tensor([[x], [0.0]]))
    near, next_to_it, far = moves
    assert near.mean().abs() < 0.1
    assert 0.6 < near.std() < 0.8
    assert torch.stack([near.flatten(), next_to_it.flatten()]).corrcoef()[0, 1] > 0.9
    assert torch.stack([near.flatten(), far.flatten()]).corrcoef()[0, 1].abs() < 0.2


def assert_fills(values: Tensor, low: float, high: float) -> None:
    """From one limit to the other (within 2 % of the way), evenly: the quarters lie where they should."""
    tolerance = (high - low) / 50
    assert low - tolerance <= values.min() <= low + tolerance
    assert high - tolerance <= values.max() <= high + tolerance
    quartiles = values.quantile(torch.tensor([0.25, 0.5, 0.75]))
    truth = low + (high - low) * torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(quartiles, truth, atol=2 * tolerance, rtol=0)
