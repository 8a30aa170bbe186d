"""Rows of predictions, of files and of loaders, for data modules and modules as users have them."""

import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from src.engine.errors import ConfigError
from src.engine.runs.inputs import Inputs
from src.engine.runs.predict import Rows, find_reader, make_rows, predict_batches, predict_files
from src.engine.runs.predictions import Predictions

CPU = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}


def predict_loaders(module: pl.LightningModule, datamodule: pl.LightningDataModule) -> Rows:
    rows: Rows = []
    predict_batches(module, datamodule, CPU, rows.extend)
    return rows


class Photos(pl.LightningDataModule):
    """A user's own."""

    def read_images(self, path: Path) -> Tensor:
        return torch.full((1, 3, 8, 8), float(path.stem))


class Detector(pl.LightningModule):
    """A user's own, whose ``predict_step`` says what comes out."""

    def predict_step(self, images: Tensor) -> dict[str, Any]:
        return {"mean": images.mean(dim=(1, 2, 3)), "corners": images[:, 0, ::7, ::7], "name": ["a"] * len(images)}


def test_files_are_read_as_the_data_module_says_and_predicted_as_the_module_does() -> None:
    rows: Rows = []
    files = [Path("7.jpg"), Path("eight.jpg"), Path("9.jpg")]
    assert predict_files(Detector(), Photos(), files, 2, CPU, rows.extend) == ["eight.jpg"]
    assert rows == [
        {"file": f"{value}.jpg", "mean": value, "corners": [[value, value], [value, value]], "name": "a"}
        for value in (7, 9)
    ]
    with pytest.raises(ConfigError, match=r"LightningDataModule.* method read_images"):
        find_reader(pl.LightningDataModule())


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("", "csv"), ("/*.jpg", "json"), ("", "parquet")], ids=str)
def test_memory_does_not_grow_with_the_number_of_files(
    kinds: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.engine.runs.predictions.ROW_GROUP", 50)
    pattern, suffix = kinds

    def measure_peak(num_files: int) -> int:
        folder = tmp_path / str(num_files)
        folder.mkdir()
        for index in range(num_files):
            (folder / f"{index}.jpg").touch()
        tracemalloc.start()
        with Predictions(tmp_path / f"rows.{suffix}") as predictions:
            predict_files(Detector(), Photos(), Inputs(f"{folder}{pattern}"), 10, CPU, predictions.extend)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert predictions.count == num_files
        return peak

    measure_peak(20)  # what is imported, and made once
    many = min(measure_peak(2000), measure_peak(2001))  # Python may enlarge its table of names by megabytes meanwhile
    growth = (many - measure_peak(100)) / 1900
    print(f"{growth:.0f} bytes a file")
    assert growth < 350  # names, while a folder is put in order; a row as a dict would take 1,000


class Blurred(Photos):
    """Its pictures are doubtful from number 8 on, and may hold two."""

    def read_images(self, path: Path, split: bool = False) -> Tensor:
        if int(path.stem) > 7:
            warnings.warn("blurred", stacklevel=1)
        return torch.full((1 + split, 3, 8, 8), float(path.stem))


def test_what_the_data_module_warns_of_is_told_in_the_table() -> None:
    files = [Path("7.jpg"), Path("8.jpg")]
    rows: Rows = []
    predict_files(Detector(), Blurred(), files, 2, CPU, rows.extend)
    assert [(row["file"], row.get("sure")) for row in rows] == [("7.jpg", None), ("8.jpg", "blurred")]
    rows.clear()
    predict_files(Detector(), Blurred(), files, 3, CPU, rows.extend, split=True)
    assert [(row["file"], row.get("sure")) for row in rows] == [
        ("7.jpg#0", None), ("7.jpg#1", None), ("8.jpg#0", "blurred"), ("8.jpg#1", "blurred"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"Photos.* method read_images\(path, split\)"):
        predict_files(Detector(), Photos(), files, 2, CPU, rows.extend, split=True)


class Sines(pl.LightningDataModule):
    """Batches are dicts."""

    def predict_dataloader(self) -> Any:
        rows: Any = [{"x": torch.tensor([float(index)]), "y": torch.tensor(2.0 * index)} for index in range(5)]
        return [DataLoader(rows, batch_size=2), DataLoader(rows[:1])]


class Regressor(pl.LightningModule):
    """``forward`` has columns of its own, and takes a batch; it is no classifier, though its outputs are (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = self.line(batch["x"])
        return outputs


def test_without_files_the_data_modules_own_loaders_are_predicted() -> None:
    module = Regressor().eval()
    rows = predict_loaders(module, Sines())
    with torch.no_grad():
        expected = [module.line(torch.tensor([float(index)])).tolist() for index in (*range(5), 0)]
    assert [row.keys() for row in rows] == [{"prediction"}] * 6
    np.testing.assert_allclose([row["prediction"] for row in rows], expected, rtol=1e-6)


def test_rows_are_made_of_whatever_comes_out() -> None:
    pair = torch.tensor([1.0, 2.0])
    assert make_rows(pair) == [{"prediction": 1.0}, {"prediction": 2.0}]
    assert make_rows((pair, pair.int())) == [
        {"prediction_0": 1, "prediction_1": 1},
        {"prediction_0": 2, "prediction_1": 2},
    ]
    assert make_rows([{"boxes": pair}, {"boxes": pair[:0]}]) == [{"boxes": [1, 2]}, {"boxes": []}]
    assert make_rows({"loss": torch.tensor(0.5), "each": pair}) == [{"loss": 0.5, "each": [1, 2]}]  # of the batch
    assert make_rows("text") == [{"prediction": "text"}]
    logits = torch.tensor([[0.0, np.log(3.0)]])
    (row,) = make_rows(logits, 2, ("cat", "dog"))
    assert (row["class"], row["runner_up"], row["sure"]) == ("dog", "cat", "below 0.9")
    assert (row["probability"], row["runner_up_probability"]) == pytest.approx((0.75, 0.25))
    assert make_rows(logits[:, :1], 1, range(1)) == [
        {"class": 0, "probability": 1, "runner_up": None, "runner_up_probability": None, "sure": "yes"}
    ]
    assert make_rows(logits, 3) == [{"prediction": pytest.approx([0, np.log(3)])}]


class Forward(pl.LightningModule):
    """Takes the first part of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 2)

    def forward(self, numbers: Tensor) -> Tensor:
        outputs: Tensor = self.line(numbers)
        return outputs


class Pairs(pl.LightningDataModule):
    """Has a test split only, which is there once it is set up; doubles the numbers on the device."""

    def setup(self, stage: str) -> None:
        if stage == "test":
            self.numbers = torch.arange(5.0)[:, None]

    def test_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.numbers, self.numbers), 2)  # by position, which Lightning cannot predict

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [2 * part for part in batch]


class Dicts(pl.LightningDataModule):
    def test_dataloader(self) -> Any:
        return DataLoader([{"number": 1.0}])  # type: ignore[arg-type]  # a list is a dataset, too


def test_without_a_step_or_a_loader_forward_predicts_the_test_split() -> None:
    module = Forward().eval()
    rows = predict_loaders(module, Pairs())
    with torch.no_grad():
        expected = module(2 * torch.arange(5.0)[:, None]).tolist()
    np.testing.assert_allclose([row["prediction"] for row in rows], expected, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"Forward has no predict_step, and its forward takes no batch .* predict_st"):
        predict_loaders(Forward().eval(), Dicts())
    with pytest.raises(ConfigError, match=r"LightningModule has no predict_step, and its forward takes no .*missing"):
        predict_loaders(pl.LightningModule(), Pairs())


class Named(Forward):
    """Takes its inputs by name, as Hugging Face's models do."""

    def forward(self, number: Tensor, scale: float = 2.0) -> Tensor:
        return super().forward(scale * number[:, None].float())


class AnyNames(Forward):
    """Takes whatever comes by name."""

    def forward(self, **inputs: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward((inputs["number"] + inputs["labels"])[:, None].float())


class Labelled(pl.LightningDataModule):
    def test_dataloader(self) -> Any:
        return DataLoader([{"number": 1.0, "labels": 1.0}])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Named, AnyNames])
def test_forward_takes_a_dicts_entries_by_their_names(kind: type[Forward]) -> None:
    module = kind().eval()
    rows = predict_loaders(module, Labelled())
    assert rows == [{"prediction": pytest.approx(module.line(torch.tensor([2.0])).tolist())}]


def test_without_files_and_a_loader_it_is_said_what_is_missing() -> None:
    message = "inputs=null: LightningDataModule has no predict_dataloader and no test_dataloader; name files, folders"
    with pytest.raises(ConfigError, match=message):
        predict_loaders(Regressor(), pl.LightningDataModule())
