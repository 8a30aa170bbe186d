"""The rooms of the house: which may import which, and what stays out of those that are yours to replace."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from src.engine.settings.check import CONF, ROOT

FLOORS = ("src.engine.errors", "src.engine.settings", "src.engine.runs", "src.engine.sweeps", "hydra_plugins")
ERRORS = FLOORS[0]
PUBLIC = ("_replace", "_asdict", "_fields", "_make")  # of named tuples, which have no other way to say so


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PATHS = [path for room in ("src", "hydra_plugins") for path in sorted((ROOT / room).rglob("*.py"))]
MODULES = {_name(path): path for path in PATHS if "skeleton" not in path.parts}  # which is another project's
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
ENGINE = [name for name in MODULES if name.startswith(("src.engine", "hydra_plugins"))]
DOORS = [name for name in MODULES if name not in ENGINE and '__name__ == "__main__"' in MODULES[name].read_text()]
FRONT = [name for name, tree in TREES.items() if name not in ["src", *ENGINE, *DOORS] and len(tree.body) > 1]


@cache
def _imported(name: str) -> set[str]:
    """What a module imports, at its top or in a function."""
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@cache
def _own(name: str) -> set[str]:
    """The project's modules among them; a package's empty __init__ is none."""
    return {imported for imported in _imported(name) if imported in MODULES and TREES[imported].body}


def _floor(name: str) -> int:
    return next(number for number, room in enumerate(FLOORS) if f"{name}.".startswith(f"{room}."))


@pytest.mark.parametrize("name", [name for name in ENGINE if name.count(".") > 1 or name.startswith("hydra_plugins")])
def test_the_engine_imports_from_its_own_floor_and_below(name: str) -> None:
    assert [imported for imported in _own(name) if imported not in ENGINE] == []
    assert [imported for imported in _own(name) if _floor(imported) > _floor(name)] == []


@pytest.mark.parametrize("name", FRONT)
def test_front_rooms_import_no_door_and_of_the_engine_only_errors(name: str) -> None:
    assert {imported for imported in _own(name) if imported in DOORS or imported in ENGINE} <= {ERRORS}


def test_doors_do_not_lead_into_each_other() -> None:
    assert {(name, imported) for name in DOORS for imported in _own(name) if imported in DOORS} == set()


@pytest.mark.parametrize("name", [name for name in FRONT if name.startswith("src.models.")])
def test_models_import_only_torch(name: str) -> None:
    others = {imported.partition(".")[0] for imported in _imported(name)} - sys.stdlib_module_names
    assert others <= {"torch", "src"}
    assert {imported for imported in _own(name) if not imported.startswith("src.models.")} <= {ERRORS}


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter({name: _own(name) for name in MODULES}).prepare()  # a CycleError shows the way


def _private(tree: ast.AST) -> Iterator[str]:
    """Names of others that are not for us, and state that is the whole process's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and node.attr not in PUBLIC:
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in ("os.environ", "ContextVar"):
            yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"line {node.lineno}: {name}" for name in names if re.match(r"_[^_]", name))


@pytest.mark.parametrize("name", [*FRONT, *DOORS])
def test_front_rooms_and_doors_use_no_private_names(name: str) -> None:
    assert list(_private(TREES[name])) == []


@cache
def _classes(room: str) -> set[str]:
    names = {"front": FRONT, "engine": ENGINE}[room]
    return {node.name for name in names for node in ast.walk(TREES[name]) if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_names_no_class_of_the_front_rooms(name: str) -> None:
    tree = TREES[name]
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    named |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert named & (_classes("front") - _classes("engine")) == set()
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert [text for text in texts if any(f"{text}.".startswith(f"{front}.") for front in FRONT)] == []


@cache
def _needed(path: Path) -> set[str]:
    """The project's modules that a file of tests needs to be collected, by way of other files of tests, too."""
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
    named = {f"{node.module}{name}" for node in top for name in ("", *(f".{each.name}" for each in node.names))}
    others = [ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in named if name.startswith("tests.")]
    return named.intersection(MODULES).union(*(_needed(other) for other in others if other.is_file()))


@cache
def _with_its_own(name: str) -> set[str]:
    """A module and all that it imports."""
    return {name}.union(*(_with_its_own(imported) for imported in _own(name)))


def test_a_test_imports_no_front_room_but_its_own() -> None:
    """You may delete a module in front, or a room, with its tests: test_<module>.py, test_<module>_<more>.py."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        room, stem = path.parent.relative_to(ROOT / "tests").parts, path.stem.removeprefix("test_")
        names = {name: name.rpartition(".")[2] for name in MODULES if name.split(".")[1:-1] == [*room]}
        own = [name for name, last in names.items() if f"{stem}_".startswith(f"{last}_")]
        allowed = {"src.train"}.union(*map(_with_its_own, own))
        if room == ("data",) and stem not in ("image_folder", "loader"):
            allowed |= _with_its_own("src.data.mnist")  # MNIST's files go together
        elif own and own[0] in DOORS:
            allowed |= {name for name in FRONT if name.startswith("src.data.")}  # of the commands (conftest.py)
        others = _needed(path) & {*FRONT, *DOORS} - allowed
        assert room[:1] in (("mnist",), ("benchmarks",)) or not others, f"{path.name} needs {', '.join(sorted(others))}"


def test_the_callbacks_share_pictures_only() -> None:
    """Each may be deleted without the others; figures draws the layers that the demo shows, too."""
    arrows = {(name, imported) for name in FRONT if name.startswith("src.callbacks.") for imported in _own(name)}
    shared = {"src.callbacks.pictures", ERRORS}
    assert {arrow for arrow in arrows if arrow[1] not in shared} == {("src.callbacks.figures", "src.callbacks.layers")}


@pytest.mark.slow
def test_the_engine_is_tested_without_the_front_rooms(tmp_path: Path) -> None:
    """Without models, data and all that minimal runs do not need, its tests are those that they were."""
    root = tmp_path / "project"
    for room in ("src", "hydra_plugins", "conf", "tests"):
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.md"), ROOT / "pyproject.toml"]:
        shutil.copy(path, root)
    for room in ("models", "data"):
        shutil.rmtree(root / "src" / room)
    for room in ("models", "data", "mnist", "callbacks", "notebooks"):
        shutil.rmtree(root / "tests" / room)
    minimal = (CONF / "callbacks" / "minimal.yaml").read_text()
    needed = {name for name in FRONT if f"{name}." in minimal}
    needed |= {imported for name in needed for imported in _own(name)}
    for path in [root / "src" / "demo.py", *(root / "src" / "callbacks").glob("[!_]*.py")]:
        if f"src.callbacks.{path.stem}" not in needed:
            path.unlink()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    for arguments in (["--collect-only", "tests/engine"], ["tests/engine/runs/test_determinism.py"]):
        result = subprocess.run([*command, *arguments], cwd=root, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-2000:]
