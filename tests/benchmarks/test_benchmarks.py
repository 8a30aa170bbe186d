"""``make bench`` runs, and computes its ratios as its table says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from src.engine.settings.check import ROOT
from tests.benchmarks.__main__ import compare, make_table


def test_a_ratio_is_the_median_of_the_turns() -> None:
    figure = compare("an epoch", "s", [1.0, 6.0, 8.0], "bare", [1.0, 2.0, 4.0], "at most 1.05")

    assert (figure["ratio"], figure["from"], figure["to"]) == (2.0, 1.0, 3.0)
    assert make_table([figure]).splitlines()[-1] == (
        "| an epoch | 6.00 s | bare | 2.00 s | 2.00 (1.00, 3.00) | at most 1.05 |"
    )


def test_of_a_slower_peer_the_ratio_is_the_other_way_round() -> None:
    assert compare("an epoch", "s", [2.0], "recipe", [8.0], "at least 3", inverse=True)["ratio"] == 4.0


@pytest.mark.slow
def test_all_parts_run_on_a_few_batches(tmp_path: Path, mnist_root: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "--quick", "--turns", "1", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "bench.json").read_text())["figures"]
    peers = {
        "bare", "tuned", "barebones", "imports", "import hydra", "bare inference", "one process", "only resized",
        "no bar",
    }  # fmt: skip
    assert {figure["peer"] for figure in figures} >= peers
    assert all(min(figure["template"]) > 0 and min(figure["theirs"]) > 0 for figure in figures)
    assert (tmp_path / "bench.md").read_text() in result.stdout
    assert (tmp_path / "scale.svg").stat().st_size > 1000
