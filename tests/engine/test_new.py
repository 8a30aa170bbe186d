"""``make new``: a project of one's own trains, is tested, and is linted; the template's checkpoints load there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from src.engine.settings.check import ROOT

SCRIPT = ROOT / "src" / "engine" / "new"
# Another package of this name may be installed in this environment: what is in the folder must win, as it does for -m.
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PROJECT_ROOT": ""}
ENV.pop("PROJECT_ROOT")


def run(folder: Path, *words: str) -> str:
    result = subprocess.run(words, cwd=folder, env=ENV, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (words, result.stdout[-3000:], result.stderr[-3000:])
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun") / "my digits"
    run(ROOT, sys.executable, str(SCRIPT), "digit_reader", str(folder))
    return folder


def test_nothing_of_the_template_is_left(project: Path) -> None:
    names = subprocess.run(["git", "ls-files"], cwd=project, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert not [name for name in names if re.search("lenet|mnist|demo|notebook|(^|/)src/", name)]
    texts = {name: (project / name).read_text() for name in names if name and not name.endswith(".txt")}
    left = {name: re.findall(r"^.*(?<!--)\bsrc\b.*$", text, re.MULTILINE) for name, text in texts.items()}
    assert {name: lines for name, lines in left.items() if lines} == {
        "digit_reader/engine/settings/trust.py": ['RENAMED: dict[str, str] = {"src.": "digit_reader."}']
    }
    for name in [name for name in texts if name.endswith(".md")]:
        links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", texts[name])
        assert [link for link in links if not ((project / name).parent / link).exists()] == [], name


def test_its_page_on_the_configuration_tells_of_what_is_there(project: Path) -> None:
    text, conf = (project / "conf" / "README.md").read_text(), project / "conf"
    rows = re.findall(r"^\| `(\w+)` \| (`\w+`(?:, `\w+`)*) \|", text, re.MULTILINE)
    told = {group: sorted(options.replace("`", "").split(", ")) for group, options in rows}
    assert told == {group: sorted(path.stem for path in (conf / group).glob("*.yaml")) for group in told}
    assert {"data", "model", "optimizer", "experiment", "sweep"} <= told.keys()
    own, _, elsewhere = text.partition("## Coming from lightning-hydra-template")
    assert elsewhere
    assert not re.search("mnist|lenet|<!--", own, re.IGNORECASE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["My-Project", "new"], "error: NAME=My-Project: expected"),
        (["src", "new"], "error: NAME=src: expected"),
        (["json", "new"], "error: NAME=json: expected"),
        (["class", "new"], "error: NAME=class: expected"),
        (["torch", "new"], "error: NAME=torch: expected"),
        (["pytorch_lightning", "new"], "error: NAME=pytorch_lightning: expected"),
        (["", "new"], "error: NAME=: expected"),
        (["mine", "/dev/null/new"], "error: DIR=/dev/null/new: "),
        (["mine", str(ROOT / "mine")], f"error: DIR={ROOT / 'mine'}: expected"),
        (["mine", str(ROOT.parent)], f"error: DIR={ROOT.parent}: expected"),
    ],
)
def test_what_will_not_do_is_told_in_a_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(said)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_trains_and_its_tests_and_linters_pass(project: Path) -> None:
    said = run(project, sys.executable, "-m", "digit_reader.train", "trainer=cpu", "trainer.max_epochs=2")
    assert "test/acc" in said
    run(project, sys.executable, "-m", "ruff", "check", ".")
    run(project, sys.executable, "-m", "ruff", "format", "--check", ".")
    run(project, sys.executable, "-m", "mypy")
    run(project, sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider")


@pytest.mark.slow
def test_with_mnist_the_templates_checkpoints_predict_the_same(tmp_path: Path) -> None:
    run(ROOT, sys.executable, str(SCRIPT), "reader", str(tmp_path / "kept"), "--keep", "mnist")
    path = ROOT / "tests" / "mnist" / "release-0.1.0.ckpt"
    code = (
        "import sys; from {0}.engine.runs.build import restore; import torch; torch.manual_seed(0); "
        "print(restore(sys.argv[1])(torch.rand(3, 1, 32, 32)).tolist())"
    )
    said = [
        run(folder, sys.executable, "-c", code.format(package), str(path)).splitlines()[-1]
        for folder, package in ((ROOT, "src"), (tmp_path / "kept", "reader"))
    ]
    assert said[0] == said[1]
    run(
        tmp_path / "kept",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "tests/mnist/test_release.py",
        "tests/models",
    )
