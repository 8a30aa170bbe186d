"""notebooks/results.py, and that the README and the recipes say what results.json holds."""

import json
import re
import statistics
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from notebooks import results
from notebooks.draw import draw_paper
from src.engine.settings.check import CONF, ROOT
from tests.forks import run_command

README = (ROOT / "notebooks" / "README.md").read_text()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep with two settings of two seeds each, all of them tested."""
    root = tmp_path_factory.mktemp("results")
    result = run_command(
        "train", "-m", "data=mnist5k", "trainer=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=6",
        "callbacks=minimal", "test=all", "optimizer.lr=0.001,0.01", "seed=range(2)", f"hydra.sweep.dir={root}/rates",
        PROJECT_ROOT=str(root),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return root / "rates"


@pytest.mark.slow
def test_a_sweep_is_summarised_run_by_run(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.json")
    results.main([str(sweep)])
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept.keys() == {"rates"}
    assert kept["rates"]["data"]["num_images"] == {"train": 4000, "val": 500, "test": 500}
    runs = kept["rates"]["runs"]
    assert [run["values"] for run in runs] == [
        {"optimizer.lr": rate, "seed": seed} for rate in (0.001, 0.01) for seed in (0, 1)
    ]
    for run in runs:
        folder = sweep / ",".join(f"{key}={value}" for key, value in run["values"].items())
        tested = json.loads((folder / "test" / "metrics.json").read_text())
        assert run["test/acc"] == tested["metrics"]["test/acc"]
        events = EventAccumulator(str(folder)).Reload()
        assert run["val/acc"] == [round(point.value, 5) for point in events.Scalars("val/acc")]
        assert len(run["val/acc"]) == 2
    assert str(sweep.parent) not in (tmp_path / "results.json").read_text()


@pytest.mark.slow
def test_a_sweep_takes_the_place_of_an_older_one(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.json")
    results.write_results({"rates": {"data": {}, "runs": []}, "other": {"data": {}, "runs": []}})
    kept = results.read_results() | {"rates": results.read_sweep(sweep)}
    results.write_results(kept)
    assert results.read_results() == kept
    assert len(kept["rates"]["runs"]) == 4


@pytest.mark.slow
def test_what_is_no_tested_sweep_is_named(sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: no sweep.csv there")):
        results.read_sweep(tmp_path)
    (tmp_path / "sweep.csv").write_text("rank,job,seed,test/acc\n1,seed=0,0,\n")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/seed=0: not tested; run the sweep with test=all")):
        results.read_sweep(tmp_path)


def test_the_readme_has_the_tables_of_the_results() -> None:
    kept = results.read_results()
    for line in [*results.make_recipes_table(kept), *results.make_ablation_table(kept)]:
        assert line in README


@pytest.mark.parametrize("name", ["baseline", "baseline_fashion", "best", "fast", "paper1998", "paper1998_distorted"])
def test_each_recipe_says_its_result(name: str) -> None:
    runs = results.read_results()[name]["runs"]
    assert len(runs) == 5
    accuracies = [100 * run["test/acc"] for run in runs]
    said = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} %"
    assert (
        f"# result:   {said} of the 10,000 test images, n=5 seeds" in (CONF / "experiment" / f"{name}.yaml").read_text()
    )


def test_the_drawing_beside_the_papers_is_that_of_the_results(tmp_path: Path) -> None:
    draw_paper(results.read_results(), tmp_path / "paper.svg")
    drawn, kept = (
        [float(number) for number in re.findall(r"-?\d+\.\d+", (folder / "paper.svg").read_text())]
        for folder in (tmp_path, ROOT / "notebooks" / "figures")
    )
    assert drawn == pytest.approx(kept, abs=0.01)
