"""What a ``_target_`` takes: its own signature is asked, for the template's classes and for yours."""

import copy
import difflib
import inspect
import os
import pydoc
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal

import hydra.utils
from omegaconf import OmegaConf

from src.engine.errors import ConfigError

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
BUILT = ("data", "model", "optimizer", "scheduler", "trainer", "callbacks", "logger")  # the groups that the run builds
OBJECTS: tuple[Any, ...] = (Callable, type)
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
NODES = ("torch.nn.", "torch.optim.", "torch.utils.data.", "torchmetrics.", "pytorch_lightning.", "lightning_fabric.")


def check_arguments(config: Mapping[str, Any]) -> None:
    """Check the arguments of all nodes of a config against the signatures of their targets, which are imported.

    Args:
        config: Plain and resolved.

    Raises:
        ConfigError: At the first argument that is unknown, missing, or of a value that its annotation excludes.
    """
    for key, node in find_nodes(config):
        _check_node(key, node, locate(key, node["_target_"]), is_built=key.partition(".")[0] in BUILT)
    for key, target in TARGETS.items():
        group = config.get(key) or {}
        if group and "_target_" not in group and (key != "scheduler" or "scheduler" in group):
            _check_node(key, group, locate(key, target), is_built=False)


def find_nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each mapping that has a ``_target_``, at any depth, with its full key; not what a node keeps unbuilt."""
    if isinstance(node, dict) and "_target_" in node:
        yield path, node
    if isinstance(node, dict) and node.get("_recursive_", True):
        for key, child in node.items():
            yield from find_nodes(child, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from find_nodes(child, f"{path}[{index}]")


@cache
def locate(key: str, target: str) -> Any:
    """Import what a ``_target_`` names.

    Raises:
        ConfigError: If there is no such thing.
    """
    try:
        found = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        if getattr(error.value, "name", None) in ("lightning", "lightning.pytorch"):
            raise ConfigError(
                f"{key}._target_={target}: it imports the package lightning, which is not installed; import from "
                "pytorch_lightning, which is the same code (conf/README.md, Coming from lightning-hydra-template)"
            ) from error
        raise ConfigError(f"{key}._target_={target}: its import fails: {error.value!r}") from error
    if callable(found):
        return found
    if found is not None:
        raise ConfigError(f"{key}._target_={target}: a {type(found).__name__}; expected a class or function")
    place, _, name = target.rpartition(".")
    while place and (module := pydoc.locate(place)) is None:
        place, _, name = place.rpartition(".")
    names = [*vars(module), *getattr(module, "__all__", ())] if place else ()
    close = difflib.get_close_matches(name, names, n=1)
    said = f"{place or 'Python'} has no {name}" + (f"; did you mean {close[0]}?" if close else "")
    raise ConfigError(f"{key}._target_={target}: {said}")


def _check_node(key: str, node: Mapping[str, Any], target: Any, is_built: bool) -> None:
    parameters = parameters_of(target)
    if parameters is None:  # written in C: it checks itself
        return
    name = f"{target.__module__}.{target.__qualname__}"
    given = {argument: value for argument, value in node.items() if not str(argument).startswith("_")}
    kinds = {parameter.kind for parameter in parameters.values()}
    named = {p.name: p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for argument, value in given.items():
        if argument in named:
            annotation = named[argument].annotation
            if not takes(annotation, value) and not (value is None and named[argument].default is None):
                raise ConfigError(f"{key}.{argument}={value}: expected {describe(annotation)}")
        elif inspect.Parameter.VAR_KEYWORD not in kinds:
            close = difflib.get_close_matches(argument, named, n=1)
            raise ConfigError(f"{key}.{argument}: {name} takes no such argument" + _did_you_mean(key, close))
    is_partial = node.get("_partial_", False)
    if not is_built or "_args_" in node or (is_partial and key not in ADDED):
        return
    known = {*given, *(ADDED.get(key, ()) if is_partial or key == "model" else ())}
    for argument, parameter in named.items():
        if parameter.default is parameter.empty and argument not in known:
            if argument in ADDED.get(key, ()):
                raise ConfigError(f"{key}: {name} gets its {argument} from the run; add _partial_: true")
            raise ConfigError(f"{key}.{argument}: is missing; {name} needs {describe(parameter.annotation)}")


def _did_you_mean(key: str, close: list[str]) -> str:
    return f"; did you mean {key}.{close[0]}?" if close else ""


@cache
def parameters_of(target: Any) -> dict[str, inspect.Parameter] | None:
    """Those of a class or function, annotations that are text evaluated; None if Python cannot tell."""
    try:
        parameters = dict(inspect.signature(target).parameters)
    except (ValueError, TypeError):
        return None
    scope = getattr(find_function(target), "__globals__", {})
    for name, parameter in parameters.items():
        if isinstance(parameter.annotation, str):
            try:
                parameters[name] = parameter.replace(annotation=eval(parameter.annotation, scope))
            except Exception:  # of a name that only type checkers import
                parameters[name] = parameter.replace(annotation=Any)
    return parameters


def find_function(target: Any) -> Any:
    """The function that runs when a class or function is called, without its decorators."""
    return inspect.unwrap(target.__init__ if isinstance(target, type) else target)  # type: ignore[misc]


def takes(annotation: Any, value: Any) -> bool:
    """Whether a plain value may be of a type. In doubt it may: the constructor has the last word.

    >>> takes(int | None, 3), takes(int | None, 1e3), takes(int | None, 0.5), takes(float, "1e-3")
    (True, True, False, False)
    >>> takes(tuple[float, float], [0.9, 1]), takes(tuple[float, float], [0.9])
    (True, False)
    """
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if (isinstance(value, dict) and "_target_" in value) or origin in (Any, object, inspect.Parameter.empty):
        return True
    if origin is Annotated:
        return takes(arguments[0], value) and (value is None or value in arguments[1])
    if origin in (typing.Union, types.UnionType):
        return any(takes(argument, value) for argument in arguments)
    if origin is Literal:  # True equals 1
        return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in arguments)
    if origin in (None, type(None)):
        return value is None
    if origin is bool:
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
    if origin is int:
        return _is_number(value) and (isinstance(value, int) or value.is_integer())
    if origin is float:
        return _is_number(value)
    if origin is str:
        return isinstance(value, str)
    if not isinstance(origin, type):
        return True
    if issubclass(origin, Mapping):
        return isinstance(value, dict) and all(takes(arguments[1], each) for each in value.values() if arguments)
    if issubclass(origin, tuple) and arguments and ... not in arguments:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(takes, arguments, value))
    if issubclass(origin, Iterable) and origin.__module__ in ("builtins", "collections.abc") and origin is not bytes:
        return isinstance(value, list) and all(takes(arguments[0], each) for each in value if arguments)
    if origin is _tensor():
        return _is_number(value) or isinstance(value, list)
    if issubclass(origin, os.PathLike):
        return isinstance(value, str)
    try:
        return isinstance(value, origin) or not _is_opaque(origin)
    except TypeError:  # a protocol
        return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_opaque(annotation: type) -> bool:
    """Whether only an object will do: one of Python's own, or of a library's class, or of one derived from it."""
    bases = [f"{base.__module__}.{base.__qualname__}" for base in annotation.__mro__]
    is_pythons = annotation.__module__.partition(".")[0] in sys.stdlib_module_names
    return not issubclass(annotation, Enum) and (is_pythons or any(base.startswith(NODES) for base in bases))


def _tensor() -> Any:
    """torch.Tensor, once torch is imported: an annotation of it means that it is."""
    return getattr(sys.modules.get("torch"), "Tensor", None)


def describe(annotation: Any) -> str:
    """A type in words.

    >>> describe(int | Literal["auto", "all"] | None)
    'a whole number, auto, all or null'
    """
    words = list(dict.fromkeys(_words(annotation)))
    return ", ".join(words[:-1]) + f" or {words[-1]}" if len(words) > 1 else words[0]


def _words(annotation: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is Annotated:
        low, high = arguments[1].start, arguments[1].stop - 1
        yield f"{describe(arguments[0])} {f'of {low} or more' if high >= sys.maxsize - 1 else f'from {low} to {high}'}"
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _words(argument)
    elif origin is Literal:
        yield from map(str, arguments)
    elif origin in WORDS:
        yield WORDS[origin]
    elif origin is inspect.Parameter.empty:
        yield "it"
    elif origin is None:
        yield "null"
    elif origin is _tensor():
        yield "a list of numbers"
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        yield "a mapping"
    elif isinstance(origin, type) and origin.__module__ in ("builtins", "collections.abc") and origin not in OBJECTS:
        inner = " of " + " and ".join(map(describe, arguments)) if arguments and ... not in arguments else ""
        yield f"a list{inner}"
    else:
        yield f"a node with a _target_ ({getattr(origin, '__name__', 'an object')})"


def build(config: Any, **kwargs: Any) -> Any:
    """Hydra's ``instantiate``; what an annotation takes in another form is given in that one.

    Lists and dicts are plain ones, unless the node's ``_convert_`` says otherwise. A list of numbers becomes a tensor
    of floats where the annotation says Tensor, and 1e3 a whole number where it says int.

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
        for name, parameter in (parameters_of(locate(key, node["_target_"])) or {}).items():
            if name in node and (fitted := _fit(parameter.annotation, node[name])) is not node[name]:
                OmegaConf.update(config, f"{key}.{name}".lstrip("."), fitted, merge=False)
    kwargs["_convert_"] = config.get("_convert_", "object") if OmegaConf.is_dict(config) else "object"
    return hydra.utils.instantiate(config, **kwargs)


def _fit(annotation: Any, value: Any) -> Any:
    is_float = isinstance(value, float) and value.is_integer()
    if is_float and takes(annotation, value) and not takes(annotation, 0.5):
        return int(value)
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if is_union else (annotation,)
    takers = [option for option in options if takes(option, value)]
    if takers == [_tensor()] and not isinstance(value, dict):
        return {"_target_": "torch.tensor", "data": _floats(value)}
    return value


def _floats(value: Any) -> Any:
    return [_floats(each) for each in value] if isinstance(value, list) else float(value)
