import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from src.engine.errors import CheckpointError
from src.engine.runs.build import load_checkpoint
from src.engine.runs.checkpoint_io import AtomicCheckpointIO
from tests import forks
from tests.processes import wait_until


def test_a_save_that_fails_leaves_the_previous_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)

    class Unsavable:
        def __reduce__(self) -> tuple:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"last\.ckpt: cannot be written \(No space left on device\); free some space"):
        io.save_checkpoint({"weights": torch.zeros(100_000), "step": Unsavable()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(path.parent.iterdir()) == [path]


def test_a_save_replaces_the_previous_checkpoint(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)
    io.save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 2}


def test_a_full_disk_leaves_the_previous_checkpoint(mount_disk: Callable[[str], Path]) -> None:
    disk = mount_disk("2m")
    io, path = AtomicCheckpointIO(), disk / "last.ckpt"
    io.save_checkpoint({"step": 1, "weights": torch.zeros(300_000)}, path)  # 1.2 MB: two have no room
    with pytest.raises(OSError, match=r"last\.ckpt: cannot be written \(No space left on device\); free some space"):
        io.save_checkpoint({"step": 2, "weights": torch.zeros(300_000)}, path)
    assert torch.load(path, weights_only=True)["step"] == 1
    assert list(disk.iterdir()) == [path]


def save_for_good(path: Path, said: Path) -> None:
    """Save one step after the other, and write down those that are done."""
    with said.open("w", buffering=1) as file:
        for step in range(10**9):
            AtomicCheckpointIO().save_checkpoint({"step": step, "weights": torch.full((200_000,), step)}, path)
            file.write(f"{step}\n")


@pytest.mark.slow
def test_a_kill_during_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path, rng, left_aside = tmp_path / "run" / "last.ckpt", random.Random(0), 0
    path.parent.mkdir()
    for turn in range(10):
        said = tmp_path / str(turn)
        process = forks.CONTEXT.Process(target=save_for_good, args=(path, said), daemon=True)
        process.start()
        wait_until(lambda said=said: said.is_file() and said.read_text() != "", seconds=60)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        saved = [int(line) for line in said.read_text().split()]
        content = torch.load(path, weights_only=True)
        assert content["step"] >= (saved[-1] if saved else 0)
        assert (content["weights"] == content["step"]).all()
        left_aside += len(list(path.parent.iterdir())) - 1
    assert left_aside  # some kills did come in the midst of a save
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    content = {"state_dict": {"weight": torch.arange(500.0)}, "hyper_parameters": {"model": {"depth": 3}}, "epoch": 7}
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


def test_a_damaged_checkpoint_is_refused_or_holds_what_it_held(checkpoint: Path, tmp_path: Path) -> None:
    whole, rng = checkpoint.read_bytes(), random.Random(0)
    held = load_checkpoint(checkpoint)
    refused = []
    for _ in range(300):
        damaged = bytearray(whole)
        damage = rng.choice(["flip", "cut", "zeros"])
        if damage == "flip":
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        elif damage == "cut":
            del damaged[rng.randrange(len(whole)) :]
        else:
            start = rng.randrange(len(whole) - 64)
            damaged[start : start + 64] = bytes(64)
        path = tmp_path / "damaged.ckpt"
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError as error:
            refused.append(str(error))
        else:  # a bit of the padding
            assert torch.equal(loaded["state_dict"]["weight"], held["state_dict"]["weight"])
            assert loaded["hyper_parameters"] == held["hyper_parameters"]
    assert len(refused) > 150
    assert all("damaged.ckpt" in message for message in refused)
