"""The predict command: pictures redrawn from MNIST's digits are taken for what the digits are taken for."""

import csv
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from src.data.mnist import preprocess
from src.data.sources import read_package
from src.engine.errors import ConfigError, SkippedError
from src.engine.runs import report
from src.engine.runs.build import restore, restore_datamodule
from src.engine.runs.command_line import arrange
from src.engine.runs.inputs import Inputs
from src.engine.runs.predict import Rows, predict_files
from src.engine.runs.predictions import CLASS_COLUMNS
from src.predict import check_inputs, predict, print_rows
from tests.compose import compose_cfg
from tests.forks import run_command, start
from tests.marks import by_default
from tests.mnist.files import write_idx
from tests.processes import wait_until

CPU = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}


def classify(checkpoint: Path, images: Tensor) -> tuple[list[int], list[float]]:
    """Classes and their probabilities, without the code under test; uint8 images (N, 28, 28)."""
    with torch.no_grad():
        best = restore(checkpoint)(preprocess(images)).softmax(dim=1).max(dim=1)
    return best.indices.tolist(), best.values.tolist()


def predict_pictures(checkpoint: Path, files: Sequence[Path], batch_size: int) -> tuple[Rows, list[str]]:
    rows: Rows = []
    failed = predict_files(restore(checkpoint), restore_datamodule(checkpoint), files, batch_size, CPU, rows.extend)
    return rows, failed


def draw_large(digit: Tensor, path: Path) -> None:
    """Dark on light, 12 times as large, in a corner of a picture that is neither square nor the digit's shape."""
    large = Image.fromarray(255 - digit.numpy()).resize((336, 336), Image.Resampling.BICUBIC)
    page = Image.new("L", (700, 450), 255)
    page.paste(large, (10, 90))
    page.save(path)


def test_large_dark_digits_are_taken_for_what_mnist_has(trained: Path, tmp_path: Path) -> None:
    digits = read_package()
    chosen = torch.arange(7, 5000, 50)  # 100, as many of each class
    files = [tmp_path / f"{index:04}.png" for index in chosen.tolist()]
    for file, digit in zip(files, digits.images[chosen], strict=True):
        draw_large(digit, file)
    rows, failed = predict_pictures(trained, files, 64)
    expected, _ = classify(trained, digits.images[chosen])
    found = [row["class"] for row in rows]
    assert failed == []
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert np.mean(np.array(found) == expected) >= 0.95
    assert np.mean(np.array(found) == digits.labels[chosen].numpy()) >= 0.95


def test_every_digit_of_an_idx_file_gets_a_row(trained: Path, tmp_path: Path) -> None:
    digits = read_package().images[::50]  # 100
    path = tmp_path / "mine-idx3-ubyte"
    write_idx(path, digits.numpy(), gzipped=False)
    Image.fromarray(digits[3].numpy()).save(tmp_path / "one.png")
    labels, probabilities = classify(trained, digits)
    for batch_size in (7, 1000):
        rows, failed = predict_pictures(trained, [path, tmp_path / "one.png"], batch_size)
        assert failed == []
        assert [row["file"] for row in rows] == [f"{path}#{index}" for index in range(100)] + [
            str(tmp_path / "one.png")
        ]
        assert [row["class"] for row in rows] == [*labels, labels[3]]
        assert [row["probability"] for row in rows] == pytest.approx([*probabilities, probabilities[3]], abs=1e-5)
        assert all(row["runner_up"] != row["class"] for row in rows)
        assert all(0 <= row["runner_up_probability"] <= row["probability"] for row in rows)


def test_the_command_skips_and_names_what_it_cannot_read(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    for index in range(3):
        draw_large(read_package().images[500 * index], folder / f"{index}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:-300])
    Image.new("L", (50, 50), 255).save(folder / "empty.png")
    (folder / "note.txt").write_text("not meant")
    arguments = (f"ckpt_path={trained}", "inputs=digits", "output=out/p.csv", "hydra.run.dir=run", "accelerator=cpu")
    result = run_command("predict", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 3, result.stderr
    assert lines[0].startswith("digits/broken.png: skipped: ")
    assert lines[1].startswith("digits/empty.png: skipped: blank")
    assert lines[2] == "error: 2 of 5 files could not be read and were skipped: digits/broken.png, digits/empty.png"
    with (tmp_path / "out/p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["class"]) for row in rows] == [(f"digits/{index}.png", str(index)) for index in range(3)]
    for row in rows:
        assert f"{float(row['probability']):.4f}" in result.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["p.csv"]
    assert (tmp_path / "run/config.yaml").is_file()  # what could be predicted is kept, and so is its record


def test_the_start_of_a_long_value_is_shown_and_all_of_a_files_name(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([{"file": "a" * 50, "boxes": list(range(10_000)), "score": 0.5}, {"file": "b", "score": None}], 2)
    said = capsys.readouterr().out
    assert f" {'a' * 50} " in said
    assert " [0, 1, 2, " in said
    assert len(said) < 2000


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_shows_the_file_and_why_its_answer_is_not_sure(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "make_console", lambda: Console(width=width))
    values = ("digits/7 on paper.png", 7, 0.8, 1, 0.125)
    print_rows([dict(zip(("file", *CLASS_COLUMNS), values, strict=True)) | {"sure": "below 0.9"}], 1)
    said = capsys.readouterr().out
    for word in ("digits/7 on paper.png", " 7 ", " 0.8000 ", " below 0.9 "):
        assert word in said
    assert (" 0.1250 " in said) == (width == 120)
    assert max(map(len, said.splitlines())) <= width


def test_brackets_in_a_files_name_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("[draft] 7.png", "x[/old].png", "[bold].png")
    print_rows([dict(zip(("file", *CLASS_COLUMNS), (name, 7, 0.9, 1, 0.1), strict=True)) for name in names], 3)
    said = capsys.readouterr().out
    for name in names:
        assert f" {name} " in said


def test_a_files_name_cannot_steer_the_terminal(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in (b"red\x1b[31m\n.png", b"no utf-8 \xff.png"):
        draw_large(read_package().images[0], tmp_path / "good.png")
        (tmp_path / "good.png").rename(tmp_path / os.fsdecode(name))
    (tmp_path / "\x1b]0;title\x07.png").write_bytes(b"no picture")
    cfg = compose_cfg(tmp_path, f"ckpt_path={trained}", f"inputs={tmp_path}", "accelerator=cpu", config_name="predict")
    with pytest.raises(SkippedError, match=r"\\x1b\]0;title\\x07\.png"):
        predict(cfg)
    said = capfd.readouterr()
    assert not set((said.out + said.err + caplog.text).replace("\n", "")) & {chr(code) for code in range(32)}
    assert r"red\x1b[31m\n.png" in said.out.replace("\n", "")
    assert b"no utf-8 \xff.png" in (tmp_path / "predictions.csv").read_bytes()


def test_output_that_is_there_is_kept_unless_you_say_so(tmp_path: Path) -> None:
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text("mine")
    arguments = (f"inputs={tmp_path}/a.png", f"output={tmp_path}/rows.csv")
    with pytest.raises(ConfigError, match=r"output=.*rows\.csv: is there already; overwrite=true replaces it"):
        check_inputs(compose_cfg(tmp_path, *arguments, config_name="predict"))
    check_inputs(compose_cfg(tmp_path, *arguments, "overwrite=true", config_name="predict"))


@pytest.mark.parametrize("name", ["7 (1).png", "n,1.png", "é.png", "x=y.png", "q'uote.png", "[1].png", "a b/c.png"])
def test_a_value_that_is_a_path_needs_no_second_quoting(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    (override,) = arrange([f"inputs={name}"], "predict", "inputs")
    cfg = compose_cfg(tmp_path, override, config_name="predict")
    assert cfg.inputs == name
    assert list(Inputs(cfg.inputs)) == [Path(name)]


def test_csv_json_and_parquet_say_the_same(trained: Path, tmp_path: Path) -> None:
    write_idx(tmp_path / "a-idx3-ubyte", read_package().images[::400].numpy(), gzipped=False)
    overrides = [f"ckpt_path={trained}", f"inputs=[{tmp_path}/a-idx3-ubyte]", "accelerator=cpu"]
    for suffix in ("csv", "json", "parquet"):
        cfg = compose_cfg(tmp_path, *overrides, f"output={tmp_path}/rows.{suffix}", config_name="predict")
        check_inputs(cfg)
        predict(cfg)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["file"] for row in rows] == [f"{tmp_path}/a-idx3-ubyte#{index}" for index in range(13)]
    assert pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist() == rows
    with (tmp_path / "rows.csv").open() as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()} for row in rows]


@pytest.mark.slow
def test_what_is_classified_is_kept_when_the_command_is_stopped(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    draw_large(read_package().images[0], tmp_path / "in" / "0000.png")
    for index in range(1, 4000):
        (tmp_path / "in" / f"{index:04}.png").hardlink_to(tmp_path / "in" / "0000.png")
    (tmp_path / "in" / "0100.png").unlink()
    (tmp_path / "in" / "0100.png").touch()
    log = tmp_path / "log"
    arguments = (f"ckpt_path={trained}", "inputs=in", "output=out.csv", "batch_size=1", "accelerator=cpu")
    process = start("predict", [*arguments, "hydra.run.dir=run"], log, {}, cwd=tmp_path)
    wait_until(lambda: log.is_file() and "0100.png: skipped" in log.read_text(), 60)
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    with (tmp_path / "out.csv").open() as file:
        names = [row["file"] for row in csv.DictReader(file)]
    assert 95 < len(names) < 3999
    assert names == [f"in/{index:04}.png" for index in range(4000) if index != 100][: len(names)]
    assert f"ended early: the first {len(names):,} rows are in out.csv" in log.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "log", "out.csv", "run"}


def test_answers_that_should_not_be_trusted_are_told(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = read_package().images[::100]
    labels, probabilities = classify(trained, digits)
    surest = sorted(range(len(digits)), key=lambda index: -probabilities[index])[:2]
    page = Image.new("L", (900, 450), 255)
    for place, index in enumerate(surest):
        draw_large(digits[index], tmp_path / f"{place}.png")
        page.paste(Image.open(tmp_path / f"{place}.png").crop((0, 0, 450, 450)), (450 * place, 0))
    page.save(tmp_path / "two.png")
    noise = np.random.default_rng(0).normal(128, 20, (90, 90)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    output = tmp_path / "rows.json"
    overrides = [f"ckpt_path={trained}", "accelerator=cpu", f"output={output}", "overwrite=true"]
    predict(compose_cfg(tmp_path, *overrides, f"inputs={tmp_path}", config_name="predict"))
    rows = json.loads(output.read_text())
    sure = {Path(row["file"]).name: row["sure"] for row in rows}
    assert "no clear ink" in sure.pop("noise.png")
    assert sure == {"0.png": "yes", "1.png": "yes", "two.png": "2 digits, read as one"}
    assert "2, see there why" in capsys.readouterr().out
    predict(compose_cfg(tmp_path, *overrides, f"inputs={tmp_path}/two.png", "split=true", config_name="predict"))
    rows = json.loads(output.read_text())
    assert [(Path(row["file"]).name, row["class"], row["sure"]) for row in rows] == [
        (f"two.png#{place}", labels[index], "yes") for place, index in enumerate(surest)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    by_default([
        ([], "train first"),
        (["inputs=[]"], "inputs=[]: name files, folders or patterns"),
        (["inputs=nothing/*.png"], "inputs=nothing/*.png: no such file"),
        (["inputs=.", "output=rows.xlsx"], "output=rows.xlsx: expected a file that ends in .csv, .json or .parquet"),
        (["inputs=.", "batch_size=0"], "batch_size=0: expected a whole number of 1 or more"),
    ], 2),
)  # fmt: skip
def test_a_bad_setting_is_said_and_nothing_written(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run_command("predict", *arguments, cwd=tmp_path, PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_and_several_devices_are_said(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    overrides: list[Any] = [f"ckpt_path={trained}", f"inputs={tmp_path}/a.png", "output=a.parquet"]
    with pytest.raises(ConfigError, match=r"accelerator.devices=2: expected 1"):
        predict(compose_cfg(tmp_path, *overrides, "accelerator=cpu", "accelerator.devices=2", config_name="predict"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"output=a.parquet: needs pyarrow: pip install -e '.\[export\]'"):
        check_inputs(compose_cfg(tmp_path, *overrides, config_name="predict"))
