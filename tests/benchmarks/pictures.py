"""How many pictures of digits ``src.predict`` gets right, beside the same net on their pixels as they are: a JSON line.

Three kinds: MNIST's test digits written as PNG, the same drawn large, dark on grey paper, away from the middle, and
files ``*_is_<digit>.png`` of a folder.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from src.engine.runs.build import preprocess, restore, restore_datamodule
from src.engine.runs.predict import Rows, predict_files

CPU = {"accelerator": "cpu", "devices": 1}


def draw_large(digit: NDArray[np.uint8]) -> Image.Image:
    """A dark digit of 8 times its size in a corner of grey paper."""
    ink = Image.fromarray(digit).resize((224, 224), Image.Resampling.BICUBIC)
    page = Image.new("L", (400, 300), 200)
    page.paste(40, (150, 60), ink)
    return page


def write(folder: Path, pictures: list[Image.Image], labels: list[int]) -> dict[Path, int]:
    """Pictures as PNG files, and their digits."""
    folder.mkdir()
    files = {folder / f"{index:05}.png": label for index, label in enumerate(labels)}
    for file, picture in zip(files, pictures, strict=True):
        picture.save(file)
    return files


def count(module: Any, datamodule: Any, files: Mapping[Path, int]) -> dict[str, float]:
    """Percent that are right: as ``src.predict`` reads them, and only resized to 28x28, light on dark."""
    rows: Rows = []
    failed = predict_files(module, datamodule, files, 256, CPU, rows.extend)
    assert not failed, failed
    labels = torch.tensor(list(files.values()))
    plain = [np.array(Image.open(file).convert("L").resize((28, 28), Image.Resampling.BICUBIC)) for file in files]
    plain = [255 - pixels if np.median(pixels) > 127 else pixels for pixels in plain]
    with torch.no_grad():
        as_they_are = module(preprocess(torch.from_numpy(np.stack(plain)), datamodule)).argmax(dim=1)
    found = torch.tensor([int(row["class"]) for row in rows])
    right = {"template": found == labels, "plain": as_they_are == labels}
    return {"count": len(files), **{side: 100 * float(hits.float().mean()) for side, hits in right.items()}}


def main() -> None:
    """Count all kinds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("root")
    parser.add_argument("--pictures", type=Path, help="a folder of files *_is_<digit>.png")
    parser.add_argument("--limit", type=int, default=2000)
    arguments = parser.parse_args()
    module = restore(arguments.checkpoint)
    datamodule = restore_datamodule(arguments.checkpoint, root=arguments.root)
    datamodule.setup()
    images, labels = (part[: arguments.limit] for part in datamodule.splits["test"])
    result = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = {
            "MNIST's test digits as PNG": write(
                folder / "a", list(map(Image.fromarray, images.numpy())), labels.tolist()
            ),
            "the same, large on grey paper": write(
                folder / "b", list(map(draw_large, images.numpy())), labels.tolist()
            ),
        }
        if arguments.pictures:
            kinds["pictures of others"] = {
                file: int(file.stem[-1]) for file in sorted(arguments.pictures.glob("*_is_?.png"))
            }
        for kind, files in kinds.items():
            result[kind] = count(module, datamodule, files)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
