"""src/data/loader.py: which images come when."""

from itertools import chain, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric.utilities.data import _set_sampler_epoch

from src.data.loader import BatchLoader

NUM = 23  # a prime: the last batch is never whole


def make_loader(
    batch_size: int = 5, shuffle: bool = True, seed: int = 0, num: int = NUM, rank: int = 0, world_size: int = 1
) -> BatchLoader:
    """Over images that show their own number, which is their label too."""
    labels = torch.arange(num)
    images = labels.view(-1, 1, 1).expand(-1, 2, 2)
    return BatchLoader(images, labels, batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)


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


def test_order_depends_on_seed_and_epoch_only() -> None:
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


def test_state_counts_images_from_the_epochs_start() -> None:
    loader = make_loader()
    loader.load_state_dict({"epoch": 0, "images": 10})
    next(iter(loader))

    assert loader.state_dict() == {"epoch": 0, "images": 15}


def test_state_of_release_0_1_0_counts_batches_of_todays_size() -> None:
    loader = make_loader()
    loader.load_state_dict({"epoch": 2, "position": 3})
    assert order_of(loader, epoch=2) == order_of(make_loader(), epoch=2)[15:]


@given(st.data())
def test_an_epoch_resumed_with_another_batch_size_has_the_images_that_are_left(data: st.DataObject) -> None:
    sizes, num = st.integers(1, 40), data.draw(st.integers(1, 60))
    loader = make_loader(data.draw(sizes), num=num)
    loader.set_epoch(3)
    done = data.draw(st.integers(0, len(loader)))
    seen = [int(label) for _, labels in islice(loader, done) for label in labels]

    resumed = make_loader(data.draw(sizes), num=num)
    resumed.load_state_dict(loader.state_dict())
    first = resumed.batches_done
    rest = [labels.tolist() for _, labels in resumed]  # the epoch that is saved is the one that comes
    assert seen + list(chain(*rest)) == order_of(make_loader(num=num), epoch=3)
    assert first + len(rest) == len(resumed) == resumed.batches_done  # as Lightning will count
    assert all(len(labels) == resumed.batch_size for labels in rest[:-1])


def test_state_of_another_epoch_does_not_shorten_this_one() -> None:
    loader = make_loader()
    loader.load_state_dict({"epoch": 0, "images": 23})

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
    state = {"epoch": 2, "images": 15}
    loader.load_state_dict(state)

    assert loader.state_dict() == state


def test_abandoned_epoch_starts_afresh() -> None:
    loader = make_loader()
    next(iter(loader))

    assert order_of(loader) == order_of(make_loader())


@pytest.mark.parametrize("shuffle", [False, True])
def test_lightning_finds_where_to_set_the_epoch(shuffle: bool) -> None:
    loader = make_loader(shuffle=shuffle)
    _set_sampler_epoch(loader, 3)
    assert loader.epoch == 3


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        BatchLoader(torch.zeros(3, 2, 2), torch.zeros(2), batch_size=1)


@st.composite
def divisions(draw: st.DrawFn) -> tuple[int, int, int]:
    """Numbers of processes, of images and of images a batch, at least one image for each process."""
    world_size = draw(st.integers(1, 8))
    return world_size, draw(st.integers(world_size, 100)), draw(st.integers(world_size, 120))


def batches_of(loader: BatchLoader, epoch: int = 0) -> list[list[int]]:
    """The labels of each batch."""
    loader.set_epoch(epoch)
    batches = [labels.tolist() for _, labels in loader]
    assert len(batches) == len(loader)
    return batches


@given(divisions(), st.booleans(), st.integers(0, 3))
def test_processes_share_the_batches_of_one(division: tuple[int, int, int], shuffle: bool, epoch: int) -> None:
    world_size, num, batch_size = division
    alone = batches_of(make_loader(batch_size, shuffle, num=num), epoch)
    shares = [
        batches_of(make_loader(batch_size, shuffle, num=num, rank=rank, world_size=world_size), epoch)
        for rank in range(world_size)
    ]
    together = [list(chain(*parts)) for parts in zip(*shares, strict=True)]  # as many batches for each process

    left = num % batch_size
    if 0 < left < world_size and len(alone) > 1:  # too few for a batch
        alone[-2:] = [alone[-2] + alone[-1]]
    assert together == alone
    assert sorted(chain(*together)) == list(range(num))
    for parts in zip(*shares, strict=True):
        sizes = [len(part) for part in parts]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


@given(divisions(), st.data())
def test_means_of_the_shares_average_to_the_mean_of_the_batch(
    division: tuple[int, int, int], data: st.DataObject
) -> None:
    world_size, num, batch_size = division
    seen = data.draw(st.integers(0, num))
    loaders = [make_loader(batch_size, num=num, rank=rank, world_size=world_size) for rank in range(world_size)]
    for loader in loaders:
        loader.load_state_dict({"epoch": 0, "images": seen})
    first = loaders[0].batches_done
    batches = [[labels.double() for _, labels in loader] for loader in loaders]

    for index, parts in enumerate(zip(*batches, strict=True), first):
        shares = [loader.share(index) for loader in loaders]
        average = sum(share * part.mean() for share, part in zip(shares, parts, strict=True)) / world_size
        assert float(average) == pytest.approx(float(torch.cat(parts).mean()))
        if len({len(part) for part in parts}) == 1:
            assert shares == [1.0] * world_size


@given(divisions(), st.data())
def test_each_process_resumes_at_its_share_of_the_batches_that_are_left(
    division: tuple[int, int, int], data: st.DataObject
) -> None:
    world_size, num, batch_size = division
    loaders = [make_loader(batch_size, num=num, rank=rank, world_size=world_size) for rank in range(world_size)]
    wholes = [batches_of(loader, epoch=1) for loader in loaders]
    done = data.draw(st.integers(0, len(wholes[0])))
    for loader in loaders:
        loader.set_epoch(0)
        loader.set_epoch(1)
        list(islice(loader, done))
    states = [loader.state_dict() for loader in loaders]
    assert states == [states[0]] * world_size  # the checkpoint holds the first process's alone

    for rank, whole in enumerate(wholes):
        resumed = make_loader(batch_size, num=num, rank=rank, world_size=world_size)
        resumed.load_state_dict(states[0])
        resumed.set_epoch(1)
        assert [labels.tolist() for _, labels in resumed] == whole[done:]


@pytest.mark.parametrize(
    ("num", "batch_size", "message"),
    [
        (NUM, 2, "batch_size=2: expected 3"),
        (NUM, 0, "batch_size=0: expected 3"),
        (2, 5, "2 images: expected 3"),
    ],
)
def test_a_process_without_an_image_is_refused(num: int, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(batch_size, num=num, rank=2, world_size=3)


def test_batches_are_made_where_the_images_lie() -> None:
    images, labels = torch.zeros(NUM, 2, 2, device="meta"), torch.zeros(NUM, device="meta")
    for shuffle in (False, True):
        for batch in BatchLoader(images, labels, batch_size=4, shuffle=shuffle):
            assert [part.device.type for part in batch] == ["meta", "meta"]
