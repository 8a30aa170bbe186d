"""Which files ``inputs=`` means."""

import os
from pathlib import Path

import pytest

from src.engine.errors import ConfigError
from src.engine.runs.inputs import Inputs


def test_inputs_are_files_folders_and_patterns(tmp_path: Path) -> None:
    pictures = ["a.png", "b.JPG", "sub/c.jpeg", "sub/t10k-images-idx3-ubyte.gz"]
    for name in [*pictures, "sub/labels-idx1-ubyte", "notes.txt", ".h.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*inputs: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in Inputs([f"{tmp_path}/{name}" for name in inputs])]

    assert found("") == pictures
    assert found("sub") == ["sub/c.jpeg", "sub/t10k-images-idx3-ubyte.gz"]
    assert found("*.png", "a.png", "notes.txt") == ["a.png", "notes.txt"]
    assert found("**/*.jp*g") == ["sub/c.jpeg"]
    assert list(Inputs(str(tmp_path / "a.png"))) == [tmp_path / "a.png"]
    (tmp_path / "[1].png").touch()
    assert found("[1].png") == ["[1].png"]  # a file, though it reads like a pattern
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "x*.png", "empty"):
        with pytest.raises(
            ConfigError, match=rf"inputs=.*{name.replace('*', '.')}: no such file, or no image or IDX file"
        ):
            found("a.png", name)


def test_hidden_folders_pipes_and_circles_of_links_are_no_inputs(tmp_path: Path) -> None:
    pictures = ["a.png", "b.jfif", "sub/train-images-idx4-float", "sub/x.JPG"]
    for name in [*pictures, ".ipynb_checkpoints/a-checkpoint.png", ".git/b.png", "one.heic", "two.HEIC", "c.avif"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "sub" / "back").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "sub")
    files = Inputs([str(tmp_path)])

    assert len(files) == len(pictures)
    assert {path.resolve() for path in files} == {tmp_path / name for name in pictures}
    assert files.others == {".heic": 2, ".avif": 1}
    with pytest.raises(ConfigError, match=r"pipe\.png: no such file"):
        Inputs([str(tmp_path / "pipe.png")])
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "three.heic").touch()
    with pytest.raises(ConfigError, match=r"there are 1 \.heic, which cannot be read: save them as PNG or JPEG"):
        Inputs([str(tmp_path / "phone")])


def test_what_several_names_mean_comes_in_their_order_and_once(tmp_path: Path) -> None:
    names = ["a-b/1.png", "a/2.png", "a/c/3.png", "a/d.png", "z.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(*inputs: str) -> list[str]:
        files = Inputs([f"{tmp_path}/{name}" for name in inputs])
        assert len(files) == len(list(files))
        return [str(path.relative_to(tmp_path)) for path in files]

    in_order = ["a/2.png", "a/c/3.png", "a/d.png", "a-b/1.png", "z.png"]  # by folder, as a file manager has them
    assert found("") == found("*") == found("**") == in_order
    assert found("a/d.png", "a", "a") == ["a/d.png", "a/2.png", "a/c/3.png"]
    assert found("z.png", "**/*.png", "") == ["z.png", *in_order[:-1]]
