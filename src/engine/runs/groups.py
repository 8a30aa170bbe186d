"""``optimizer_groups``: learning rates, weight decay and so on by the names of parameters, for any module."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
from torch import nn
from torch.optim import Optimizer

from src.engine.errors import ConfigError
from src.engine.runs.processes import get_name
from src.engine.settings.check import nearest

log = logging.getLogger(__name__)

OWN = ("match", "name", "no_decay")  # keys of an entry that the optimizer does not get


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether one of some shell patterns fits a parameter's name, or that of a module which it is in.

    >>> matches("net.fc.weight", "net.fc"), matches("net.fc.bias", ["a", "*.bias"]), matches("net.fc2.bias", "net.fc")
    (True, True, False)
    """
    each = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in each)


def require_match(key: str, patterns: str | Sequence[str], names: Iterable[str]) -> None:
    """Refuse a pattern that fits nothing: it is misspelt.

    Raises:
        ConfigError: It names the key and a similar name.
    """
    names = list(names)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not any(matches(name, pattern) for name in names):
            known = {part for name in names for part in (name, name.rpartition(".")[0], name.split(".")[0])}
            raise ConfigError(f"{key}={pattern}: fits no name in the module; {nearest(pattern, sorted(known - {''}))}")


class InGroups:
    """In the place of a module's ``configure_optimizers``: each optimizer that it makes has groups by name, however.

    A schedule that is made of the optimizer then finds the groups. The first time, they are logged with their sizes.

    Args:
        module: The module.
        entries: Of ``optimizer_groups``.
    """

    def __init__(self, module: pl.LightningModule, entries: Sequence[Mapping[str, Any]]) -> None:
        self.module, self.entries = module, entries
        self.is_shown = bool(get_name())  # by the first process
        self.__wrapped__ = type(module).configure_optimizers  # which Lightning looks for; pickled by its name

    def __call__(self) -> Any:
        """What the module returns."""
        make, kind, rates = Optimizer.__init__, type(self.module).__name__, dict[Optimizer, list[float]]()

        def make_in_groups(optimizer: Optimizer, params: Any, defaults: dict[str, Any]) -> None:
            _check_options(self.entries, type(optimizer), defaults)
            make(optimizer, divide(list(params), self.entries, self.module), defaults)
            rates[optimizer] = [group.get("lr", 0.0) for group in optimizer.param_groups]
            for group in [] if self.is_shown else optimizer.param_groups:
                size = sum(parameter.numel() for parameter in group["params"])
                options = [f"{name}={group[name]:g}" for name in ("lr", "weight_decay") if name in group]
                log.info(", ".join([f"group {group['name']}: {size:,} parameters", *options]))

        with patch.object(Optimizer, "__init__", make_in_groups):
            configured = self.__wrapped__(self.module)
        self.is_shown = True
        if not rates:
            raise ConfigError(f"optimizer_groups: {kind}.configure_optimizers makes no optimizer of torch")
        for optimizer, own in rates.items():
            peaks = [group.get("max_lr", group.get("initial_lr", group.get("lr"))) for group in optimizer.param_groups]
            if len({*peaks}) < len({*own}):
                each = "[group['lr'] for group in optimizer.param_groups]"
                raise ConfigError(f"optimizer_groups: {kind}'s schedule gives all groups one rate; give it {each}")
        return configured


def _check_options(entries: Sequence[Mapping[str, Any]], kind: type[Optimizer], defaults: Mapping[str, Any]) -> None:
    known = [*OWN, *defaults]
    for number, entry in enumerate(entries):
        for option in entry.keys() - {*known}:
            key = f"optimizer_groups[{number}].{option}"
            raise ConfigError(f"{key}: {kind.__name__} has no such option; {nearest(option, known)}")


def divide(given: list[Any], entries: Sequence[Mapping[str, Any]], module: nn.Module) -> list[dict[str, Any]]:
    """Divide what an optimizer is given into groups, by the first entry that fits each parameter's name.

    Args:
        given: Parameters, pairs of name and parameter, or groups of them as torch takes them; their options stay.
        entries: Of ``optimizer_groups``: ``match``, patterns of names (without it, all), options of the optimizer,
            ``no_decay`` (biases and norms, that is parameters of one dimension, have no weight decay), ``name``.
        module: Names the parameters.

    Returns:
        Groups as torch takes them, each with a ``name`` of its own; what no entry fits is in a last one.

    Raises:
        ConfigError: If an entry fits no parameter of the module.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for number, entry in enumerate(entries):
        require_match(f"optimizer_groups[{number}].match", entry.get("match", "*"), names.values())
    groups: dict[tuple[int, int, bool], dict[str, Any]] = {}
    whole = given if given and isinstance(given[0], dict) else [{"params": given}]
    for place, group in enumerate(whole):
        for item in group["params"]:
            parameter = item[1] if isinstance(item, tuple) else item
            name = names.get(id(parameter), "")
            fitting = (pair for pair in enumerate([*entries, {}]) if matches(name, pair[1].get("match", "*")))
            number, entry = next(fitting)
            is_spared = bool(entry.get("no_decay")) and parameter.dim() < 2
            new = {**group, **{key: value for key, value in entry.items() if key not in OWN}, "params": []}
            new |= {"name": f"{_name(entry)}/no_decay", "weight_decay": 0.0} if is_spared else {"name": _name(entry)}
            groups.setdefault((place, number, is_spared), new)["params"].append(parameter)
    ordered = [groups[key] for key in sorted(groups)]
    count: Counter[str] = Counter()
    for group in ordered:  # each has a curve of its own
        count[name := group["name"]] += 1
        group["name"] = f"{name}_{count[name]}" if count[name] > 1 else name
    return ordered


def _name(entry: Mapping[str, Any]) -> str:
    """An entry's name in the curves, which take no stars and brackets."""
    match = entry.get("match", "rest")
    plain = re.sub(r"[^\w.-]+", "", match if isinstance(match, str) else match[0]).strip(".")
    return str(entry.get("name", plain or "rest"))
