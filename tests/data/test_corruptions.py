"""200 random damages to the files: each is found and named, unless nothing could tell it from what it was."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from src.data.mnist import MNISTDataModule
from src.data.sources import Digits
from src.engine.errors import DataError
from src.engine.settings.explain import explain
from tests.mnist.files import NUM_TEST, NUM_TRAIN, Mirror, write_digits

NUM_EACH = 50  # by gzipped or not, with checksums or without: 200

CHECKS = {
    "checksum": "its MD5 checksum is",
    "gzip": r"\.gz is damaged: (Error|CRC|Compressed|Incorrect|Not a|Unknown)",
    "magic number": "wrong magic number",
    "length": "what its header says",
    "label": r"/raw has labels 0 to \d+",
}


def damage(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Flip one to three bits, half of the time in the first 20 bytes, where the headers are; or cut; or append."""
    kind = str(rng.choice(["flip", "cut", "append"]))
    if kind == "cut":
        return kind, content[: rng.integers(len(content))]
    if kind == "append":
        return kind, content + rng.bytes(int(rng.integers(1, 40)))
    flipped = bytearray(content)
    for place in rng.choice(20 if rng.random() < 0.5 else len(content), rng.integers(1, 4), replace=False):
        flipped[place] ^= 1 << int(rng.integers(8))
    return kind, bytes(flipped)


def read(root: Path, **settings: object) -> MNISTDataModule:
    datamodule = MNISTDataModule(str(root), val_size=60, num_classes=10, **settings)  # type: ignore[arg-type]
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def differences(splits: Mapping[str, Digits], truth: Mapping[str, Digits]) -> int:
    """In how many pixels and labels they differ."""
    return sum(
        int((ours != theirs).sum()) for split in truth for ours, theirs in zip(splits[split], truth[split], strict=True)
    )


@pytest.mark.parametrize("checksums", [True, False], ids=["md5", "no md5"])
@pytest.mark.parametrize("gzipped", [True, False], ids=["gzipped", "plain"])
def test_damage_is_found_and_named(gzipped: bool, checksums: bool, tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    write_digits(folder, gzipped)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    md5 = {name: hashlib.md5(files[name], usedforsecurity=False).hexdigest() if checksums else None for name in files}
    truth = read(tmp_path, source="files", md5=md5).splits
    rng = np.random.default_rng([gzipped, checksums])
    found: Counter[str] = Counter()

    for _ in range(NUM_EACH):
        path = folder / str(rng.choice(list(files)))
        kind, damaged = damage(files[path.name], rng)
        path.write_bytes(damaged)
        try:
            splits = read(tmp_path, source="files", md5=md5).splits
        except DataError as error:
            said = explain(error)
            (check,) = [check for check in CHECKS if re.search(CHECKS[check], said)]
            found[check] += 1
            assert said.startswith(f"error: {folder if check == 'label' else path} ")
            assert said.endswith("another data.root")
            assert ("data.md5=null" in said) == checksums
            assert len(said.splitlines()) <= 2
        else:
            found["nothing"] += 1
            assert not checksums
            assert kind != "cut"
            assert {split: len(labels) for split, (_, labels) in splits.items()} == {
                "train": NUM_TRAIN - 60, "val": 60, "test": NUM_TEST,
            }  # fmt: skip
            assert all(images.shape[1:] == (28, 28) and labels.max() <= 9 for images, labels in splits.values())
            # gzip has a checksum of its own; of plain files, a pixel or a label may be another one.
            assert differences(splits, truth) <= (0 if gzipped else 3)
        path.write_bytes(files[path.name])
        assert differences(read(tmp_path, source="files", md5=md5).splits, truth) == 0

    print(f"{'gzipped' if gzipped else 'plain'}, {'with' if checksums else 'without'} MD5: found by {dict(found)}")
    assert found.total() == NUM_EACH
    if checksums:
        assert found.keys() <= {"checksum", "gzip"}
    else:
        assert found["gzip" if gzipped else "length"] > NUM_EACH / 2


def test_damaged_download_is_fetched_again(
    serve: Callable[..., Mirror],
    mnist_files: dict[str, bytes],
    mnist_md5: dict[str, str],
    mnist_root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mirror = serve(mnist_files)
    folder = tmp_path / "MNIST" / "raw"
    truth = read(mnist_root, source="files").splits
    rng = np.random.default_rng(0)
    kept: list[bytes] = []

    for _ in range(5):
        settings = {"source": str(rng.choice(["auto", "download"])), "md5": mnist_md5, "mirrors": [mirror.url]}
        assert read(tmp_path, **settings).used_source == ("files" if kept else "download")
        caplog.clear()
        path = folder / str(rng.choice(list(mnist_files)))
        kept.append(damage(mnist_files[path.name], rng)[1])
        path.write_bytes(kept[-1])

        datamodule = read(tmp_path, **settings)
        assert datamodule.used_source == "download"
        assert differences(datamodule.splits, truth) == 0
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert str(path) in record.getMessage()
    assert sorted(each.read_bytes() for each in folder.glob("*.damaged*")) == sorted(kept)


def test_damage_that_no_mirror_can_mend_is_named(
    serve: Callable[..., Mirror], mnist_files: dict[str, bytes], mnist_md5: dict[str, str], tmp_path: Path
) -> None:
    read(tmp_path, source="download", md5=mnist_md5, mirrors=[serve(mnist_files).url])
    path = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(mnist_files[path.name][:-1])

    with pytest.raises(DataError, match=f"{re.escape(str(path))} is damaged.*no mirror") as error:
        read(tmp_path, source="download", md5=mnist_md5)
    assert len(explain(error.value).splitlines()) == 1
    assert path.read_bytes() == mnist_files[path.name][:-1]
