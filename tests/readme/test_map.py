"""The READMEs lead where they say, and the engine's map lists what the code does."""

import ast
import re
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from omegaconf import OmegaConf

from src.engine.settings.check import CONF, ROOT
from tests.compose import compose_cfg
from tests.readme.table import READMES

ENGINE = READMES["src/engine/README.md"]
ELSEWHERE = {
    "key",
    "weights_only",
    "install",
    "data.fold",
}  # no settings of a command, or none that a file has
PUBLIC = {"_replace", "_asdict", "_fields", "_exit"}  # documented: of named tuples and of os


def test_the_readme_is_short() -> None:
    assert len(READMES["README.md"].split()) <= 1_800


@pytest.mark.parametrize("name", READMES)
def test_each_relative_link_leads_to_a_file_and_a_heading(name: str) -> None:
    text = re.sub(r"```.*?```", "", READMES[name], flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link
    for _, reference in re.findall(r"\[([^\]]+)\]\[([^\]]+)\]", text):
        assert f"\n[{reference}]: " in text


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Every key that a command has, with all callbacks and loggers."""
    everything = [f"{group}=[{','.join(sorted(list_options(group)))}]" for group in ("callbacks", "logger")]
    configs = {"train": everything, "test": [], "predict": [], "export": [], "demo": []}
    folder = tmp_path_factory.mktemp("known")
    composed = [compose_cfg(folder, *overrides, config_name=name) for name, overrides in configs.items()]
    keys = {key for cfg in composed for key in list_keys(OmegaConf.to_container(cfg, resolve=False))}
    return keys | {f"trainer.{name}" for name in signature(pl.Trainer).parameters} | ELSEWHERE


def list_options(group: str) -> set[str]:
    shown = re.findall(rf"# conf/{group}/(\w+)\.yaml", "".join(READMES.values()))  # the reader's own
    return {path.stem for path in (CONF / group).glob("*.yaml")} | set(shown)


def list_keys(node: Any, path: str = "") -> Iterator[str]:
    yield path
    for key, child in node.items() if isinstance(node, dict) else ():
        yield from list_keys(child, f"{path}.{key}".lstrip("."))


@pytest.mark.parametrize("name", sorted(READMES.keys() - {"CHANGELOG.md"}))  # which tells of what is gone
def test_each_setting_named_is_there(name: str, known: set[str]) -> None:
    text = READMES[name].split("\n## Coming from")[0]  # the rest has another template's names
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    words = [word.strip("'\"") for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()]
    for word in words:
        key, has_value, value = word.lstrip("+~").partition("=")
        if "<" in word or "._" in word or key.startswith(("hydra", "-")) or key.endswith((".py", ".log", ".json")):
            continue
        if (CONF / key).is_dir():
            assert set(re.findall(r"[a-z]\w*", value.partition("(")[0])) - {"glob", "null"} <= list_options(key), word
        elif re.fullmatch(r"[a-z_]+(\.[a-z_\d]+)*", key) and (has_value or key.partition(".")[0] in known):
            assert key in known, word


def find_private_names(path: Path) -> set[str]:
    """What a file takes from others that is private there: attributes, keys, and what comes from private modules."""
    own: set[str] = set()
    found: set[str] = set()
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.Attribute):
            is_own = isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
            (own if is_own else found).add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)  # getattr(trainer, "_x"), checkpoint["_x"]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = {alias.name for alias in node.names if "._" in f".{module}{alias.name}"}
            imported |= set() if module.startswith("src.") else names
    return {name for name in found - own - PUBLIC if re.fullmatch(r"_[a-z]\w*[^_\W]", name)} | imported


def read_rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of the engine's map."""
    section = ENGINE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_each_file_of_the_engine_is_on_the_map() -> None:
    files = {path.relative_to(ROOT / "src" / "engine").as_posix() for path in (ROOT / "src" / "engine").rglob("*.py")}
    listed = set(re.findall(r"^\| \[[\w./]+\]\(([\w./]+\.py)\)", ENGINE, re.MULTILINE))
    assert listed == {name for name in files if not name.endswith("__init__.py") and not name.startswith("new/")}


def test_each_private_name_is_listed_with_a_test_that_breaks_without_it() -> None:
    found = {
        (name, path.relative_to(ROOT).as_posix())
        for folder in ("src/engine", "hydra_plugins")
        for path in (ROOT / folder).rglob("*.py")
        for name in find_private_names(path)
    }
    listed = set()
    for name, places, _, guard in read_rows("Private names"):
        for place in re.findall(r"\]\(([^)]+)\)", places):
            path = (ROOT / "src" / "engine" / place).resolve().relative_to(ROOT)
            listed.add((name.strip("`").rpartition(".")[2], path.as_posix()))
        ((test, file),) = re.findall(r"^\[(\w+)\]\(([^)]+)\)$", guard)
        assert f"def {test}(" in (ROOT / "src" / "engine" / file).read_text(), guard
    assert listed == found


def test_the_map_says_what_the_front_imports_from_the_engine() -> None:
    imported: dict[str, set[str]] = {}
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]:
        room = path.relative_to(ROOT).as_posix().removeprefix("src/")
        if room.startswith("engine/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("src.engine"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                files = [name for name in names if (ROOT / f"{name.replace('.', '/')}.py").is_file()] or [node.module]
                modules = {name.removeprefix("src.engine.") for name in files}
                imported.setdefault(room.partition("/")[0], set()).update(modules)
    listed = {room: set(re.findall(r"`([\w.]+)`", cell)) for room, cell in read_rows("Who may import what")}
    assert {room.strip("`").rstrip("/"): names for room, names in listed.items()} == imported
