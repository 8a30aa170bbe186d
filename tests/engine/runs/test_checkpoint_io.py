import random
import shutil
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from src.engine.errors import CheckpointError
from src.engine.runs.build import load_checkpoint
from src.engine.runs.checkpoint_io import AtomicCheckpointIO
from src.engine.runs.checkpoints import check_checkpoint
from src.train import train
from tests import forks
from tests.engine.tiny import compose_tiny
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
    content = {
        "state_dict": {"weight": torch.arange(500.0)},
        "hyper_parameters": {"model": {"_target_": "Net"}},
        "epoch": 7,
    }
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


def test_only_checkpoints_of_the_run_are_removed(tmp_path: Path) -> None:
    io, run, other = AtomicCheckpointIO(), tmp_path / "run" / "checkpoints", tmp_path / "other"
    for name in ("old.ckpt", "best.ckpt"):
        io.save_checkpoint({"step": 1}, run / name)
    (run / "folder.ckpt").mkdir()
    (run / "notes.txt").touch()
    (run / "link.ckpt").symlink_to(other / "mine.ckpt")
    (other / "precious").mkdir(parents=True)
    (other / "mine.ckpt").touch()
    before = {path for path in tmp_path.rglob("*") if path.name != "old.ckpt"}
    for path in (other, other / "mine.ckpt", other / "precious", run, run / "folder.ckpt", run / "notes.txt",
                 run / "link.ckpt", f"local://{other}", run / ".." / ".." / "other" / "mine.ckpt"):  # fmt: skip
        with suppress(OSError):
            io.remove_checkpoint(path)
    io.remove_checkpoint(run / "old.ckpt")
    io.remove_checkpoint(run / "old.ckpt")  # gone already
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_strangers_checkpoint_has_no_folder_removed(tmp_path: Path) -> None:
    """ModelCheckpoint believes what its state names as its k best files, and removes the worst."""
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.mkdir()
    (victim / "mine.ckpt").write_text("precious")
    common = ("scheduler=[]", "+callbacks.checkpoint.save_top_k=1", "test=false")
    train(compose_tiny(folder, "trainer.max_epochs=1", *common))
    path = folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    (state,) = [state for state in content["callbacks"].values() if "best_k_models" in state]
    worst = torch.tensor(-1.0)
    for place in (str(victim), f"local://{victim}", f"{folder}/checkpoints/../../victim", str(victim / "mine.ckpt")):
        state |= {
            "best_k_models": {place: worst},
            "kth_best_model_path": place,
            "kth_value": worst,
            "best_model_path": place,
        }
        torch.save(content, path)
        train(compose_tiny(folder, "trainer.max_epochs=2", f"ckpt_path={path}", f"resume={folder}", *common))
        assert (victim / "mine.ckpt").read_text() == "precious"


def test_a_moved_runs_best_checkpoint_is_found(tmp_path: Path) -> None:
    io, first, second = AtomicCheckpointIO(), tmp_path / "first", tmp_path / "second"
    score = torch.tensor(0.5)
    state = {
        "best_model_path": str(first / "best.ckpt"), "dirpath": str(first), "last_model_path": "",
        "best_k_models": {str(first / "best.ckpt"): score, str(first / "gone.ckpt"): score},
        "kth_best_model_path": str(first / "gone.ckpt"),
    }  # fmt: skip
    for name in ("best.ckpt", "last.ckpt"):
        io.save_checkpoint({"callbacks": {"ModelCheckpoint": state, "Other": {"a": 1}}}, first / name)
    first.rename(second)
    found = io.load_checkpoint(second / "last.ckpt", weights_only=True)["callbacks"]
    assert found["Other"] == {"a": 1}
    best = str(second / "best.ckpt")
    assert found["ModelCheckpoint"] == {
        "best_model_path": best, "dirpath": str(second), "last_model_path": "", "best_k_models": {best: score},
        "kth_best_model_path": "",
    }  # fmt: skip


@pytest.mark.parametrize("place", ["..", "../..", "/", "", "/etc", None, 5])
def test_a_folder_that_a_checkpoint_names_is_not_looked_into(place: Any, tmp_path: Path) -> None:
    io, folder = AtomicCheckpointIO(), tmp_path / "run" / "checkpoints"
    state = {"best_model_path": "mine.ckpt", "dirpath": place, "best_k_models": {"mine.ckpt": torch.tensor(0.5)}}
    io.save_checkpoint({"callbacks": {"ModelCheckpoint": state}}, folder / "last.ckpt")
    for above in (tmp_path, tmp_path / "run"):
        (above / "mine.ckpt").touch()
    found = io.load_checkpoint(folder / "last.ckpt", weights_only=True)["callbacks"]["ModelCheckpoint"]
    assert (found["dirpath"], found["best_model_path"], found["best_k_models"]) == (str(folder), "", {})


def test_a_checkpoint_that_is_larger_inside_is_refused_unread(tmp_path: Path) -> None:
    plain, bomb, many = (tmp_path / f"{name}.ckpt" for name in ("plain", "bomb", "many"))
    torch.save({"state_dict": {"weight": torch.zeros(1_000_000)}, "hyper_parameters": {"model": {}}}, plain)
    check_checkpoint(plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    shutil.copy(plain, many)
    with zipfile.ZipFile(many, "a") as target:  # its directory names each part 20 times
        target.filelist *= 20
        target.comment = b"so that it is written anew"
    assert bomb.stat().st_size < plain.stat().st_size / 100
    assert many.stat().st_size < plain.stat().st_size * 1.1
    for path, num_bytes in ((bomb, r"4,\d{3},\d{3}"), (many, r"8\d,\d{3},\d{3}")):
        with pytest.raises(CheckpointError, match=rf"{path.name}: damaged \(of compressed parts, {num_bytes} bytes in"):
            check_checkpoint(path)


def test_a_part_that_is_compressed_is_refused_whatever_its_size(tmp_path: Path) -> None:
    noise = tmp_path / "noise.ckpt"
    with zipfile.ZipFile(noise, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data.pkl", random.Random(0).randbytes(10_000))
    assert sum(entry.file_size for entry in zipfile.ZipFile(noise).infolist()) < noise.stat().st_size
    with pytest.raises(CheckpointError, match=r"noise\.ckpt: damaged \(of compressed parts"):
        check_checkpoint(noise)
