"""notebooks/robustness.py: what it does to images, and that its table is of what the classifier says of them."""

import re
from pathlib import Path

import pytest
import torch

from notebooks import robustness
from notebooks.robustness import STRENGTHS, corrupt
from src.engine.runs.build import preprocess, restore, restore_datamodule
from src.engine.settings.check import ROOT


def test_corruptions_are_what_they_are_called() -> None:
    images = torch.zeros(10, 28, 28, dtype=torch.uint8)
    images[:, 8:20, 8:20] = torch.randint(
        256, (10, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    values = images.float() / 255

    def change(kind: str, strength: float) -> torch.Tensor:
        return corrupt(images, kind, strength).float() / 255

    assert torch.equal(corrupt(images, "none", 0), images)
    assert torch.equal(corrupt(images, "shift", 3)[:, 3:, 3:], images[:, :-3, :-3])
    assert torch.equal(corrupt(images, "rotation", 90), images.rot90(1, (1, 2)))
    ink = values[(values > 0.4) & (values < 0.6)]
    assert float((change("noise", 0.1)[(values > 0.4) & (values < 0.6)] - ink).std()) == pytest.approx(0.1, abs=0.02)
    torch.testing.assert_close(change("blur", 1).sum(), values.sum(), rtol=0.01, atol=0)  # ink spreads
    assert float(change("blur", 2).std()) < float(change("blur", 1).std()) < float(values.std())
    assert torch.equal(corrupt(images, "inversion", 1), 255 - images)
    assert corrupt(images.unsqueeze(1), "blur", 1).equal(corrupt(images, "blur", 1).unsqueeze(1))


def test_the_table_is_of_the_classifiers_answers(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(robustness, "FIGURES", tmp_path)
    robustness.main([str(trained)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"| corruption | strength | `{trained.parents[1].name}` |"
    assert len(lines) == 2 + 1 + 5 * 3
    datamodule = restore_datamodule(trained)
    datamodule.setup()
    images, labels = datamodule.splits["test"]
    with torch.no_grad():
        for line, changed in (("| none |  |", images), ("| inversion | 1 share", 255 - images)):
            right = restore(trained)(preprocess(changed, datamodule)).argmax(dim=1) == labels
            (found,) = [each for each in lines if each.startswith(line)]
            assert found.endswith(f"| {100 * float(right.float().mean()):.1f} % |")
    assert (tmp_path / "robustness.svg").is_file()


def test_what_cannot_be_compared_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for names, reason in ((["a/x/b.ckpt"], "b.ckpt"), (["a/x/b.ckpt", "a/x/last.ckpt"], "have one name")):
        with pytest.raises(SystemExit):
            robustness.main([str(tmp_path / name) for name in names])
        assert reason in capsys.readouterr().err


def test_the_readme_has_a_row_for_each_strength() -> None:
    text = (ROOT / "notebooks" / "README.md").read_text()
    for kind, (strengths, unit) in STRENGTHS.items():
        for strength in strengths:
            assert re.search(rf"^\| {kind} \| {strength:g} {re.escape(unit)} \|( [\d.]+ % \|)+$", text, re.MULTILINE)
