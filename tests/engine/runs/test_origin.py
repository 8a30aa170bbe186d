"""What a run comes from, in a real repository."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from src.engine.runs import origin
from src.engine.runs.origin import compare_origins, describe_origin, environment

CPU = torch.device("cpu")


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a commit, which is taken for the project."""
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "a.py").write_text("a = 1\n")
    (folder / ".gitignore").write_text("ignored\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    monkeypatch.setattr(origin, "ROOT", folder)
    return folder


def test_a_clean_run_has_its_commit_and_no_patch(project: Path, tmp_path: Path) -> None:
    (project / "ignored").touch()
    found = describe_origin(tmp_path, CPU)
    commit = git(project, "rev-parse", "HEAD").strip()
    assert (found["commit"], found["changes"], found["left_out"]) == (commit, None, [])
    assert environment()["git_commit"] == commit
    assert not (tmp_path / "changes.patch").exists()
    assert found["packages"]["torch"].startswith(torch.__version__.split("+")[0])


def test_the_patch_makes_the_run_s_files_of_its_commit(project: Path, tmp_path: Path) -> None:
    (project / "a.py").write_text("a = 2\n")
    (project / "new*[1].py").write_text("b = 1\n")
    (project / "bytes").write_bytes(bytes(range(256)))
    git(project, "config", "diff.noprefix", "true")
    before = git(project, "status", "--porcelain")
    found = describe_origin(tmp_path, CPU)
    assert environment()["git_commit"].endswith("-dirty")
    assert git(project, "status", "--porcelain") == before  # the index is as it was
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(project), str(clone))
    git(clone, "apply", str(tmp_path / "changes.patch"))
    names = ("a.py", "new*[1].py", "bytes")
    assert [(clone / name).read_bytes() for name in names] == [(project / name).read_bytes() for name in names]
    (project / "a.py").write_text("a = 3\n")
    again = describe_origin(tmp_path, CPU)
    assert compare_origins(found, again) == f"changes: {found['changes']} -> {again['changes']}"


def test_what_is_too_large_is_left_out_and_named(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "MAX_BYTES", 1000)
    (project / "small").write_text("x")
    (project / "large").write_text("x" * 1000)
    assert describe_origin(tmp_path, CPU)["left_out"] == ["large"]
    assert "small" in (tmp_path / "changes.patch").read_text()
    (project / "a.py").write_text("a = 2\n" * 1000)
    found = describe_origin(tmp_path, CPU)
    assert found["changes"] is None
    assert found["left_out"][1].endswith(" bytes")
    assert not (tmp_path / "changes.patch").exists()


def test_what_runs_write_is_no_change(project: Path, tmp_path: Path) -> None:
    run = project / "out" / "run"
    run.mkdir(parents=True)
    (run / "status.json").touch()
    (run / "weights").touch()
    assert describe_origin(tmp_path, CPU)["changes"] is None


def test_without_a_repository_there_is_no_commit(project: Path, tmp_path: Path) -> None:
    shutil.rmtree(project / ".git")
    assert describe_origin(tmp_path, CPU)["commit"] is None


def test_what_differs_is_named() -> None:
    one = {"threads": 1, "commit": "a", "packages": {"torch": "1", "new": "1"}, "data": {}}
    assert compare_origins(one, one) == ""
    other = {"threads": 2, "commit": "b", "packages": {"torch": "2", "more": "1"}}
    expected = "commit: a -> b, threads: 1 -> 2, more: None -> 1, new: 1 -> None, torch: 1 -> 2"
    assert compare_origins(one, other) == expected
    assert compare_origins({}, other) == ""  # of a release that has not kept it
