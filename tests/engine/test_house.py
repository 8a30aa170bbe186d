"""The rooms of the house: which may import which, and what stays out of those that are yours to replace."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from src.engine.settings.check import ROOT

ERRORS = "src.engine.errors"
PUBLIC = ("_replace", "_asdict", "_fields", "_make")  # of named tuples, which have no other way to say so


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_name(path): path for room in ("src", "hydra_plugins") for path in sorted((ROOT / room).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
ENGINE = [name for name in MODULES if name.startswith(("src.engine", "hydra_plugins"))]
DOORS = [name for name in MODULES if name not in ENGINE and '__name__ == "__main__"' in MODULES[name].read_text()]
FRONT = [name for name, tree in TREES.items() if name not in ENGINE and name not in DOORS and len(tree.body) > 1]


def _imported(name: str) -> set[str]:
    """What a module imports, at its top or in a function."""
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def _own(name: str) -> set[str]:
    """The project's modules among them; a package's empty __init__ is none."""
    return {imported for imported in _imported(name) if imported in MODULES and TREES[imported].body}


@pytest.mark.parametrize("name", FRONT)
def test_front_rooms_import_no_door_and_of_the_engine_only_errors(name: str) -> None:
    assert {imported for imported in _own(name) if imported in DOORS or imported in ENGINE} <= {ERRORS}


def test_doors_do_not_lead_into_each_other() -> None:
    arrows = {(name, imported) for name in DOORS for imported in _own(name) if imported in DOORS}
    assert arrows <= {("src.demo", "src.predict")}


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
