"""The notebooks run from their own folder, on what runs have left, and are kept with their outputs."""

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
    newest = max(root.glob("logs/**/best.ckpt"), key=lambda path: path.stat().st_mtime).parents[1]
    score = json.loads((newest / "metrics.json").read_text())["best"]["score"]
    said = next(output.text for output in outputs if output.get("name") == "stdout")
    assert said == f"{newest.name}: val/acc {score:.4f} of 500 images\n"


def check_rows(root: Path, outputs: list[NotebookNode]) -> None:
    """The table has a row a run: its name, the rate in which they differ, the score; the best comes first."""
    (html,) = (output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
    expected = []
    for path in root.glob("logs/multirun/*/optimizer.lr=*/metrics.json"):
        rate = float(path.parent.name.removeprefix("optimizer.lr="))
        score = json.loads(path.read_text())["best"]["score"]
        expected.append((str(path.parent.relative_to(root / "logs")), rate, "val/acc", score))
    assert len(expected) == 2
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in html.partition("<tbody>")[2].split("<tr>")[1:]]
    found: list[object] = [(run, float(rate), monitor, float(score)) for run, rate, monitor, score in rows]
    assert found == [(*row[:3], pytest.approx(row[3], abs=1e-4)) for row in sorted(expected, key=lambda row: -row[3])]


@pytest.mark.slow
@pytest.mark.parametrize("scores", [[0.9], [0.9, 0.8], [None, None]])
def test_runs_that_differ_in_nothing_or_have_no_monitor_are_drawn(
    scores: list[float | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, score in enumerate(scores):
        folder = tmp_path / "logs" / "train" / f"run{index}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("seed: 0\n")
        (folder / "status.json").write_text(json.dumps({"overrides": []}))
        best = {"monitor": score and "val/loss", "score": score, "mode": score and "min"}
        (folder / "metrics.json").write_text(json.dumps({"best": best}))
    cells = execute("03_compare_runs.ipynb", tmp_path, monkeypatch).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


NUMBERS: dict[str, Callable[[Path, list[NotebookNode]], None]] = {
    "01_data.ipynb": lambda root, outputs: None,
    "02_inspect_run.ipynb": check_accuracy,
    "03_compare_runs.ipynb": check_rows,
}


@pytest.mark.slow
def test_a_notebook_without_a_run_says_which_command_makes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, command in (("02_inspect_run", "python -m src.train"), ("03_compare_runs", "python -m src.train")):
        with pytest.raises(CellExecutionError, match=f"no .* below .*{command}"):
            execute(f"{name}.ipynb", tmp_path, monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_is_kept_with_its_outputs(name: str) -> None:
    """Something to see where code is hosted: run from the top, without an error or a path of one's own."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES[name]
    assert {output.output_type for output in outputs} <= {"display_data", "execute_result", "stream"}
    words = [text for output in outputs for key, text in output.get("data", output).items() if key.startswith("text")]
    assert not re.search(r"(^|[\s'\"(])/\w", "".join(words))
    assert (FOLDER / name).stat().st_size < 500_000
