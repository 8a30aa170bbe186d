"""The READMEs lead where they say, and the engine's map lists what the code does."""

import re
from collections.abc import Iterator
from inspect import signature
from typing import Any

import pytest
import pytorch_lightning as pl
from omegaconf import OmegaConf

from src.engine.settings.check import CONF, ROOT
from tests.compose import compose_cfg
from tests.readme.table import READMES

ELSEWHERE = {"key", "weights_only", "install", "model.loss"}  # no settings of a command, or none that a file has


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
