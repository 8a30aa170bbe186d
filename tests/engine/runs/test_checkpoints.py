"""Which checkpoint is taken."""

import os
from pathlib import Path

import pytest
import torch

from src.engine.errors import CheckpointError
from src.engine.runs.checkpoints import find_checkpoint


def test_the_last_checkpoint_is_preferred_to_a_younger_one(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for age, name in enumerate(["best.ckpt", "last.ckpt", "older.ckpt"]):
        torch.save({}, folder / name)
        os.utime(folder / name, (10 - age, 10 - age))
    assert find_checkpoint(tmp_path) == folder / "last.ckpt"
    for name, next_name in (("last.ckpt", "best.ckpt"), ("best.ckpt", "older.ckpt")):
        (folder / name).write_bytes((folder / name).read_bytes()[:-30])
        assert find_checkpoint(tmp_path) == folder / next_name
    (folder / "older.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r": last\.ckpt: not .*; older\.ckpt: not .*; start the run anew"):
        find_checkpoint(tmp_path)
