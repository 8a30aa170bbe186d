import json
import logging.config
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from sklearn.metrics import recall_score

from src.engine.runs.report import (
    class_accuracies,
    describe_data,
    print_confusion,
    print_next,
    print_table,
    shown,
    write_json,
)
from src.engine.settings.check import CONF


def test_class_accuracies_are_sklearns_recalls() -> None:
    labels, predictions = [0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 1, 0]
    confusion = torch.zeros(3, 3, dtype=torch.long)
    for label, prediction in zip(labels, predictions, strict=True):
        confusion[label, prediction] += 1
    assert class_accuracies(confusion.tolist()) == pytest.approx(list(recall_score(labels, predictions, average=None)))


def test_a_class_without_images_has_no_accuracy() -> None:
    assert class_accuracies([[3, 1], [0, 0]]) == [0.75, None]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    (tmp_path / ".metrics.json.part").write_text("{")  # left by a kill
    write_json(path, {"acc": 0.5})
    with pytest.raises(TypeError):
        write_json(path, {"acc": object()})
    assert json.loads(path.read_text()) == {"acc": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_paths_are_shown_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "logs" / "run") == "logs/run"
    assert shown(tmp_path.parent) == str(tmp_path.parent)


def test_data_are_described_in_a_line() -> None:
    assert describe_data({"source": "files", "num_images": {"train": 55000, "val": 5000}}) == (
        "files: 55,000 train, 5,000 val"
    )


def test_a_hint_runs_in_the_shell_that_it_is_printed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")  # the environment is not active
    print_next({"python -c 'print(6 * 7)'": "try it"})
    said = capsys.readouterr().out.strip()
    assert said.endswith("  # try it")
    assert subprocess.run(said, shell=True, capture_output=True, text=True, check=True).stdout == "42\n"
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # as if it were
    print_next({"python -m src.test": "test it"})
    assert capsys.readouterr().out == "  python -m src.test  # test it\n"
    print_next({"python -m src.train " + "seed=1 " * 30: "long"})
    assert len(capsys.readouterr().out.splitlines()) == 1  # so that it can be copied


def test_brackets_in_names_and_paths_are_shown_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    names = ("[draft] 7.png", "x[/old].png", "[bold]", "data\\[1]")
    print_table("title", {f"the {name}": f"logs/{name}" for name in names})
    print_next({f"python {name}": f"try {name}" for name in names})
    said = capsys.readouterr().out
    for name in names:
        for text in (f" the {name} ", f" logs/{name} ", f"  python {name}  # try {name}\n"):
            assert text in said


STEERING = "red\x1b[31m\x07"


def test_what_a_checkpoint_says_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of classes and what is logged may be a stranger's."""
    print_confusion([[1, 0], [0, 1]], [STEERING, "b"])
    print_table("tested", {STEERING: STEERING})
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert said.count(r"red\x1b[31m\x07") == 4
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("test", return_hydra_config=True).hydra.job_logging, resolve=False)
    formatter = config["formatters"][config["handlers"]["console"]["formatter"]]
    record = logging.makeLogRecord({"msg": f"it has {STEERING}\n\tin two lines"})
    assert logging.config.DictConfigurator({}).configure_formatter(formatter).format(record) == (
        "it has red\\x1b[31m\\x07\n\tin two lines"
    )
