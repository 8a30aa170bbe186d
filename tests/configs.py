"""Configs as Hydra composes them, in a tenth of its time."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import cache
from io import StringIO
from typing import IO, Any
from unittest.mock import patch

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from src.engine.settings.check import CONF


def compose_fast(config_name: str, *overrides: str) -> DictConfig:
    """Compose files once for each choice of them, then set the values, as Hydra does."""
    choices = tuple(override for override in overrides if _is_choice(override.lstrip("+~").partition("=")[0]))
    cfg = deepcopy(_compose_files(config_name, choices))
    values = OverridesParser.create().parse_overrides([value for value in overrides if value not in choices])
    ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
    return cfg


def compose_slowly(config_name: str, overrides: Iterable[str]) -> DictConfig:
    """Compose as a command does: 0.2 s."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config_name, list(overrides))


@cache
def _compose_files(config_name: str, choices: tuple[str, ...]) -> DictConfig:
    """As ``compose_slowly``, with each file's text parsed once: a third of the time is YAML's."""
    with patch.object(OmegaConf, "load", lambda file: deepcopy(_parse(file.read()))):
        return compose_slowly(config_name, choices)


_load: Callable[[IO[Any]], Any] = OmegaConf.load


@cache
def _parse(text: str) -> Any:
    return _load(StringIO(text))


def _is_choice(key: str) -> bool:
    return key.startswith("hydra") or "/" in key or "@" in key or (CONF / key).is_dir()
