"""The notebooks run from their own folder, on what a sweep has left, and are kept without outputs."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from src.engine.settings.check import ROOT
from tests.compose import run_command

FOLDER = ROOT / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
PICTURES = {"01_data.ipynb": 2, "02_inspect_run.ipynb": 5, "03_compare_runs.ipynb": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``PROJECT_ROOT`` with a sweep of two tiny runs."""
    root = tmp_path_factory.mktemp("notebooks")
    result = run_command(
        "train", "-m", "data=mnist5k", "trainer=cpu", "trainer.max_epochs=1", "callbacks=minimal", "test=false",
        "optimizer.lr=0.001,0.01", PROJECT_ROOT=str(root),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return root


def execute(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> NotebookNode:
    """Run a notebook as Jupyter does: in its own folder, in a process of its own."""
    folders = ("PROJECT_ROOT", "IPYTHONDIR", "JUPYTER_DATA_DIR")  # nothing of the user's own
    for key, value in {**dict.fromkeys(folders, root), "OMP_NUM_THREADS": 1, "PYTHONPATH": ""}.items():
        monkeypatch.setenv(key, str(value))
    notebook: NotebookNode = nbformat.read(FOLDER / name, as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_and_draws(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cell for cell in execute(name, root, monkeypatch).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == PICTURES[name]
    NUMBERS[name](root, outputs)


def check_accuracy(root: Path, outputs: list[NotebookNode]) -> None:
    """What is printed is the best score of the newest run, which the training has counted batch by batch."""
    (path, said) = next(output.text for output in outputs if output.get("name") == "stdout").splitlines()
    record = json.loads((Path(path).parents[1] / "metrics.json").read_text())
    assert Path(path) == max(root.glob("logs/**/best.ckpt"), key=lambda path: path.stat().st_mtime)
    assert said == f"val/acc {record['best']['score']:.4f} of 500 images"


def check_rows(root: Path, outputs: list[NotebookNode]) -> None:
    """The table has a row a job, with its score."""
    (html,) = (output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in html.split("<tr>")]
    expected = []
    for folder in root.glob("logs/multirun/*/optimizer.lr=*"):
        record = json.loads((folder / "metrics.json").read_text())
        expected.append((folder.name, "finished", record["best"]["score"], record["seconds"]))
    found = [(name, status, float(score), float(seconds)) for name, status, score, seconds in filter(None, rows)]
    assert len(found) == 2
    for row, wanted in zip(sorted(found), sorted(expected), strict=True):
        assert row[:2] == wanted[:2]
        assert row[2:] == pytest.approx(wanted[2:], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["", "seed,", "optimizer.lr,seed,"])
def test_sweeps_over_nothing_and_over_seeds_are_drawn(
    keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "logs" / "multirun" / "sweep"
    folder.mkdir(parents=True)
    values = "0," * keys.count(",")
    (folder / "sweep.csv").write_text(f"rank,job,{keys}status,best val/acc,seconds\n1,job,{values}finished,0.9,1.5\n")
    (folder / "job").mkdir()
    cells = execute("03_compare_runs.ipynb", tmp_path, monkeypatch).cells
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", [])) == 2


NUMBERS: dict[str, Callable[[Path, list[NotebookNode]], None]] = {
    "01_data.ipynb": lambda root, outputs: None,
    "02_inspect_run.ipynb": check_accuracy,
    "03_compare_runs.ipynb": check_rows,
}


@pytest.mark.slow
def test_a_notebook_without_a_run_says_which_command_makes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, command in (("02_inspect_run", "python -m src.train"), ("03_compare_runs", "python -m src.train -m")):
        with pytest.raises(CellExecutionError, match=f"no .* below .*{command}"):
            execute(f"{name}.ipynb", tmp_path, monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_is_kept_without_outputs(name: str) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
