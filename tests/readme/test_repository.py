"""What stands beside the code agrees with it: the release, the container, the forms."""

import json
import re
import tomllib

import pytest
import yaml

from src.engine.settings.check import ROOT
from tests.readme.table import READMES

TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
TESTED = re.findall(r'"(3\.\d+)"', (ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_the_release_has_one_number_and_one_date() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert f"\n## {version} - {citation['date-released']}\n" in READMES["CHANGELOG.md"]


def test_the_containers_have_a_python_that_is_tested_and_files_that_are_there() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    devcontainer = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    images = [*re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE), devcontainer["image"]]
    assert {re.fullmatch(r"python:([\d.]+)(-slim)?", image)[1] for image in images} <= set(TESTED)  # type: ignore[index]
    assert [name for name in re.findall(r"^COPY (\S+)", dockerfile, re.MULTILINE) if not (ROOT / name).exists()] == []
    make, target = devcontainer["postCreateCommand"].split()
    assert (make, {target} & TARGETS) == ("make", {target})


def test_a_commit_is_checked_by_make_lint() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (hook,) = (hook for repository in config["repos"] for hook in repository["hooks"])
    assert hook["entry"] == "make lint"


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_a_form_asks_for_what_is_needed(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] == "textarea"]
    assert all(field["attributes"]["label"].endswith(("?", "run")) for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
