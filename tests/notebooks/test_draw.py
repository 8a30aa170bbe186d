from pathlib import Path

from notebooks.draw import draw_architecture
from src.engine.settings.check import ROOT


def test_the_drawing_in_the_readme_is_that_of_the_code(tmp_path: Path) -> None:
    draw_architecture(tmp_path / "lenet5.svg")
    drawn, kept = (folder / "lenet5.svg" for folder in (tmp_path, ROOT / "notebooks" / "figures"))
    # The text: the lines may differ in their last digits from one machine to another.
    assert _labels(drawn) == _labels(kept)
    assert {"28x28x6", "10x10x16", "48,120"} <= _labels(drawn)


def _labels(path: Path) -> set[str]:
    """What is written in a figure; matplotlib keeps the text of each label as a comment."""
    return {line.split("<!--")[1].split("-->")[0].strip() for line in path.read_text().splitlines() if "<!--" in line}
