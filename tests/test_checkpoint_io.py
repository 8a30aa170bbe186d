from pathlib import Path

import pytest
import torch

from src.checkpoint_io import AtomicCheckpointIO


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
