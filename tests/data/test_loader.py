"""src/data/loader.py: which images come when."""

from itertools import islice

import pytest
import torch

from src.data.loader import BatchLoader

NUM = 23  # a prime: the last batch is never whole


def make_loader(batch_size: int = 5, shuffle: bool = True, seed: int = 0) -> BatchLoader:
    """Over images that show their own number, which is their label too."""
    labels = torch.arange(NUM)
    return BatchLoader(labels.view(-1, 1, 1).expand(-1, 2, 2), labels, batch_size, shuffle=shuffle, seed=seed)


def order_of(loader: BatchLoader, epoch: int = 0) -> list[int]:
    loader.set_epoch(epoch)
    return [int(label) for _, labels in loader for label in labels]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, NUM, 100])
def test_an_epoch_has_each_image_once_with_its_label(batch_size: int, shuffle: bool) -> None:
    loader = make_loader(batch_size, shuffle)

    for epoch in range(3):
        loader.set_epoch(epoch)
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert sorted(labels.tolist()) == list(range(NUM))
        assert torch.equal(images, labels.view(-1, 1, 1).expand(-1, 2, 2))


def test_last_batch_has_what_is_left() -> None:
    loader = make_loader(batch_size=5)

    assert [len(labels) for _, labels in loader] == [5, 5, 5, 5, 3]
    assert len(loader) == 5


def test_without_shuffle_the_images_come_as_they_are() -> None:
    assert order_of(make_loader(shuffle=False), epoch=1) == list(range(NUM))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    used = make_loader(batch_size=4, seed=3)
    for epoch in range(3):
        order_of(used, epoch)
    torch.manual_seed(1)
    order = order_of(used, epoch=7)
    torch.manual_seed(2)

    assert order == order_of(make_loader(seed=3), epoch=7)


def test_every_seed_and_epoch_has_an_order_of_its_own() -> None:
    orders = {tuple(order_of(make_loader(seed=seed), epoch)) for seed in range(5) for epoch in range(5)}

    assert len(orders) == 25


def test_shuffling_leaves_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    order_of(make_loader())

    assert torch.equal(torch.get_rng_state(), before)


def test_epoch_set_behind_iter_counts() -> None:  # Lightning does it in this order
    loader = make_loader()
    batches = iter(loader)
    loader.set_epoch(4)

    assert [int(label) for _, labels in batches for label in labels] == order_of(make_loader(), epoch=4)


@pytest.mark.parametrize("done", range(6))  # of 5 batches: from none of them to all
def test_resumed_epoch_has_the_batches_that_are_left(done: int) -> None:
    loader = make_loader()
    loader.set_epoch(2)
    batches = iter(loader)
    seen = [labels for _, labels in islice(batches, done)]
    state = loader.state_dict()
    rest = [labels.tolist() for _, labels in batches]

    resumed = make_loader()
    resumed.load_state_dict(state)
    resumed.set_epoch(2)
    assert len(seen) == done
    assert [labels.tolist() for _, labels in resumed] == rest
    for epoch in (2, 3):  # resumed once, then whole
        assert order_of(resumed, epoch) == order_of(make_loader(), epoch)


def test_state_of_an_epoch_resumed_counts_from_its_start() -> None:
    loader = make_loader()
    loader.load_state_dict({"epoch": 0, "position": 2})
    next(iter(loader))

    assert loader.state_dict() == {"epoch": 0, "position": 3}


def test_state_of_another_epoch_does_not_shorten_this_one() -> None:
    loader = make_loader()
    loader.load_state_dict({"epoch": 0, "position": 5})

    assert order_of(loader, epoch=1) == order_of(make_loader(), epoch=1)


def test_epoch_that_has_not_begun_is_resumed_whole() -> None:
    loader = make_loader()
    order_of(loader, epoch=0)
    loader.set_epoch(1)  # a checkpoint saved now, as in on_train_epoch_start

    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    assert order_of(resumed, epoch=1) == order_of(make_loader(), epoch=1)


def test_state_is_kept_until_it_is_used() -> None:
    loader = make_loader()
    state = {"epoch": 2, "position": 3}
    loader.load_state_dict(state)

    assert loader.state_dict() == state


def test_abandoned_epoch_starts_afresh() -> None:
    loader = make_loader()
    next(iter(loader))

    assert order_of(loader) == order_of(make_loader())


def test_batch_size_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        make_loader(batch_size=0)


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        BatchLoader(torch.zeros(3, 2, 2), torch.zeros(2), batch_size=1)
