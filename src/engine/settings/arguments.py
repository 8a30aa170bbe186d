"""What a ``_target_`` takes: its own signature is asked, for the template's classes and for yours."""

import copy
import difflib
import inspect
import logging
import pydoc
import re
import sys
import traceback
import types
import typing
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import hydra.utils
from omegaconf import DictConfig, ListConfig, OmegaConf

from src.engine.errors import ConfigError

log = logging.getLogger(__name__)

BUILT = ("data", "model", "optimizer", "scheduler", "trainer", "accelerator", "callbacks", "logger")
# By a node's key: what it is built of, where it does not say so itself.
TARGETS = {
    "accelerator": "pytorch_lightning.Trainer",
    "scheduler": "pytorch_lightning.utilities.types.LRSchedulerConfig",
}
# By a node's key: the arguments that the run adds.
ADDED = {
    "model": ("optimizer", "scheduler"),
    "optimizer": ("params",),
    "scheduler": ("optimizer",),
    "scheduler.scheduler": ("optimizer",),
}
# Their classes take an object of themselves; others may make one of a text or a list, as torch.device does.
NODES = ("torch.nn.", "torch.optim.", "torch.utils.data.", "torchmetrics.", "pytorch_lightning.", "lightning_fabric.")
# What any node may have.
KINDS = {"_target_": str, "_partial_": bool, "_recursive_": bool, "_convert_": str, "_args_": list}
HYDRAS = {
    name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=..., annotation=kind)
    for name, kind in KINDS.items()
}
UNIONS = (typing.Union, types.UnionType)
PLAIN = (str, bool, int, float, list, tuple, type, Literal, DictConfig)  # of these, none is what a group is built to
TENSOR = "torch.Tensor"
IMPORTS = ("<", pydoc.__file__)  # the files whose lines import what a _target_ names


def check_arguments(config: Mapping[str, Any]) -> None:
    """Check the arguments of all nodes that the run builds against their targets' signatures; it imports the targets.

    Args:
        config: Plain and resolved.

    Raises:
        ConfigError: At the first argument that is unknown, missing, or of a value that its annotation excludes.
    """
    for name in BUILT:
        group = config.get(name)
        if group and name in TARGETS:
            group = {"_target_": TARGETS[name], **group}
        for key, node in find_nodes(group, name):
            _check_node(key, node, locate(key, node["_target_"]))


def walk(node: Any, path: str = "", is_built: bool = False) -> Iterator[tuple[str, Any]]:
    """A tree of dicts and lists and all that is in it, each with its full key; parents first.

    Args:
        node: The tree, plain.
        path: Its own key.
        is_built: Whether to leave out what is in nodes that Hydra does not build, by their ``_recursive_: false``.
    """
    yield path, node
    children: Iterable[tuple[str, Any]] = ()
    if isinstance(node, dict) and not (is_built and node.get("_recursive_") is False):
        children = ((f"{path}.{key}".lstrip("."), child) for key, child in node.items())
    elif isinstance(node, list | tuple):  # which OmegaConf makes a list
        children = ((f"{path}[{index}]", child) for index, child in enumerate(node))
    for key, child in children:
        yield from walk(child, key, is_built)


def find_nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each mapping that is built of a ``_target_``, at any depth, with its full key."""
    return ((key, child) for key, child in walk(node, path, True) if isinstance(child, dict) and "_target_" in child)


def locate(key: str, target: str) -> Any:
    """Import what a ``_target_`` names.

    Raises:
        ConfigError: If there is no such thing.
    """
    cause: Any = None
    try:
        found = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        found, cause = None, error.value
    if callable(found):
        return found
    if found is not None:
        said = f"a {type(found).__name__}; expected a class or function"
    elif getattr(cause, "name", None) in ("lightning", "lightning.pytorch"):
        said = (
            "it imports the package lightning, which is not installed; import from pytorch_lightning, which is "
            "the same code (conf/README.md, Coming from lightning-hydra-template)"
        )
    elif cause:
        frames = traceback.extract_tb(cause.__traceback__)
        places = [f" ({each.filename}, line {each.lineno})" for each in frames if not each.filename.startswith(IMPORTS)]
        said = f"its import fails: {type(cause).__name__}: {cause}{''.join(places[-1:])}"
    else:
        place, _, name = target.rpartition(".")
        said = f"{place} has no {name}{_mean(name, dir(sys.modules.get(place)))}"
    raise ConfigError(f"{key}._target_={target}: {said}") from cause


def _mean(name: str, options: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, options, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _check_node(key: str, node: Mapping[str, Any], target: Any) -> None:
    parameters, name = parameters_of(target), node["_target_"]
    named = {p.name: p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_others = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    named |= HYDRAS
    for argument, value in node.items():
        if argument in named:
            annotation, default = named[argument].annotation, named[argument].default
            if not takes(annotation, value) and not (value is None and default is None):
                hint = "; None is written null" if value == "None" else ""
                raise ConfigError(f"{key}.{argument}={value}: expected {describe(annotation)}{hint}")
        elif not takes_others and value is not None:
            hint = _mean(str(argument), named, f"{key}.") or "; null leaves it out"
            raise ConfigError(f"{key}.{argument}: {name} takes no such argument{hint}")
    is_partial = node.get("_partial_", False)
    if "_args_" in node or (is_partial and key not in ADDED):
        return
    for argument, parameter in named.items():
        if parameter.default is not parameter.empty or argument in node:
            continue
        if argument not in ADDED.get(key, ()):
            raise ConfigError(f"{key}.{argument}: is missing; {name} needs it ({describe(parameter.annotation)})")
        if key != "model" and not is_partial:
            raise ConfigError(f"{key}.{argument}: is added by the run, for which {key}._partial_=true is needed")


@cache
def parameters_of(target: Any) -> Mapping[str, inspect.Parameter]:
    """Those of a class or function; annotations are text where they name what only type checkers import."""
    for is_evaluated in (True, False):
        try:
            parameters = inspect.signature(target, eval_str=is_evaluated).parameters
            # Lightning's load_from_checkpoint shows what it is bound to.
            return {name: each for name, each in parameters.items() if name != "cls" or isinstance(target, type)}
        except Exception:  # whatever an annotation raises
            continue
    return inspect.signature(lambda **_: None).parameters  # written in C: it checks itself


def takes(annotation: Any, value: Any) -> bool:
    """Whether a plain value may be of a type. In doubt it may: the constructor has the last word.

    >>> takes(int | None, 3), takes(int | None, 1e3), takes(int | None, 0.5), takes(float, "1e-3")
    (True, True, False, False)
    >>> takes(tuple[float, float], [0.9, 1]), takes(tuple[float, float], [0.9])
    (True, False)
    """
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin in UNIONS:  # Python's None is YAML's null
        return any(takes(each, value) for each in arguments) and not (value == "None" and type(None) in arguments)
    if origin is Annotated:
        return takes(arguments[0], value) and value in arguments[1]
    if origin is Literal:
        return value in arguments
    if isinstance(value, dict) and "_target_" in value:
        return True
    if origin in (None, type(None)):
        return value is None
    if origin is bool:
        return value in (0, 1)
    if origin in (int, float):  # 1e3 is a whole number
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (origin is float or value == value // 1)
    if origin is str or origin is Callable:
        return origin is str and isinstance(value, str)
    if not isinstance(origin, type) or origin in (object, inspect.Parameter.empty):
        return True
    if describe(origin) == TENSOR:
        return isinstance(value, list)
    if issubclass(origin, Mapping):
        return isinstance(value, dict) and all(takes(arguments[1], each) for each in value.values() if arguments)
    if issubclass(origin, Iterable) and origin.__module__ in ("builtins", "collections.abc"):
        if origin is tuple and arguments and ... not in arguments:
            return isinstance(value, list) and len(value) == len(arguments) and all(map(takes, arguments, value))
        return isinstance(value, list) and all(takes(arguments[0], each) for each in value if arguments)
    return not any(f"{each.__module__}.".startswith(NODES) for each in origin.__mro__)


def takes_group(parameter: inspect.Parameter, group: Mapping[str, Any]) -> bool:
    """Whether a module's argument takes what a group is built to, by its annotation or else its default.

    That is a function to call, or a dict with one; a module that expects a name, a class or settings has its own.
    """
    kinds = {typing.get_origin(option) or option for option in _options(_kind(parameter))} - {type(None)}
    return not kinds or not kinds <= {*PLAIN, *((dict, Mapping) if "_target_" in group else ())}


def _kind(parameter: inspect.Parameter) -> Any:
    """Its annotation, or else what its default is."""
    is_told = parameter.annotation is not parameter.empty or parameter.default is parameter.empty
    return parameter.annotation if is_told else type(parameter.default)


def _options(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) in UNIONS else (annotation,)


def describe(annotation: Any) -> str:
    """A type as it is written in Python.

    >>> describe(int | Literal["auto", "all"] | None)
    "Union[int, Literal['auto', 'all'], None]"
    """
    is_unknown = annotation is inspect.Parameter.empty
    text = "anything" if is_unknown else inspect.formatannotation(annotation)
    return re.sub(r"typing\.|collections\.abc\.", "", text).replace("NoneType", "None")


def build(config: Any, **kwargs: Any) -> Any:
    """Hydra's ``instantiate``; what an annotation takes in another form is given in that one.

    Lists and dicts are plain ones, unless the node's ``_convert_`` says otherwise, or an annotation DictConfig. A list
    of numbers becomes a tensor of floats where the annotation says Tensor, 1e3 a whole number where it says int, a list
    a tuple, a text a Path, and a dict a Namespace or a dataclass where it says so; so does a default. A null for an
    argument that the target does not take is left out: in a file, that is how one of the file before is taken back.

    Args:
        config: A node of the user's own config; None is None.
        kwargs: Arguments that override the config's.
    """
    if config is None:
        return None
    config = copy.deepcopy(config) if OmegaConf.is_config(config) else OmegaConf.create(config)
    OmegaConf.set_struct(config, False)
    OmegaConf.resolve(config)
    for key, node in find_nodes(OmegaConf.to_container(config)):
        parameters = parameters_of(locate(key, node["_target_"]))
        takes_others = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
        if any(kind in (DictConfig, ListConfig) for each in parameters.values() for kind in _options(each.annotation)):
            OmegaConf.update(config, f"{key}._convert_".lstrip("."), node.get("_convert_", "none"))
        for name, value in node.items():
            takes_objects = name in parameters and node.get("_recursive_", True)
            if takes_objects and (fitted := _fit(_kind(parameters[name]), value)) is not value:
                OmegaConf.update(config, f"{key}.{name}".lstrip("."), fitted, merge=False)
            elif value is None and not (name in parameters or takes_others or name.startswith("_")):
                (OmegaConf.select(config, key) if key else config).pop(name)
                if hint := _mean(name, parameters, f"{key}.".lstrip(".")):
                    log.warning(f"{name}=null: {node['_target_']} takes no such argument, so it is left out{hint}")
    return hydra.utils.instantiate(config, **{**kwargs, "_convert_": config.get("_convert_", "object")})


def _fit(annotation: Any, value: Any) -> Any:
    options = _options(annotation)
    if isinstance(value, float) and value.is_integer() and int in options and float not in options:
        return int(value)
    if isinstance(value, list) and [describe(option) for option in options if takes(option, value)] == [TENSOR]:
        return {"_target_": TENSOR, "_args_": [value]}
    kinds = [typing.get_origin(option) or option for option in options]
    for given, kind in ((list, tuple), (str, Path)):
        if isinstance(value, given) and kind in kinds and given not in kinds:
            return {"_target_": f"{kind.__module__}.{kind.__qualname__}", "_args_": [value]}
    for option in options if isinstance(value, dict) and "_target_" not in value else ():
        if isinstance(option, type) and (option is Namespace or is_dataclass(option)):
            own = parameters_of(option)
            parts = {name: _fit(_kind(own[name]), part) if name in own else part for name, part in value.items()}
            return {"_target_": f"{option.__module__}.{option.__qualname__}", **parts}
    return value
