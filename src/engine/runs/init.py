"""``init``: weights that a run starts from, those of another run or of a library."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.engine.errors import ConfigError
from src.engine.runs.groups import matches, require_match
from src.engine.runs.report import listed, shown
from src.engine.settings.check import require

COMPILED = "_orig_mod."
WITHIN = ("state_dict", "model_state_dict", "model")  # where files have their weights, if not at the top
MAX_SHOWN = 4


def load_weights(
    module: nn.Module,
    weights: str,
    map: Mapping[str, str] | None = None,
    skip: Sequence[str] | None = None,
    strict: bool = True,
) -> list[str]:
    """Load weights into a module. Nothing in the file is ever unpickled but tensors and plain values.

    Args:
        module: Any module.
        weights: A checkpoint of any Lightning run, a state dict (.pt, .pth, .bin), or a .safetensors file.
        map: By the beginning of a name in the file, what replaces it; the longest that fits counts.
        skip: Patterns of names in the module, which keep their initial values.
        strict: Whether file and module must have the same names, but for those skipped, and for buffers that the file
            lacks, as a loss's class weights.

    Returns:
        Two lines: what was loaded; what was skipped, is missing and was not used.

    Raises:
        ConfigError: If the file cannot be read, or does not fit: it names tensors and both shapes.
    """
    said = f"init.weights={weights}"
    found = {_rename(name, map or {}): tensor for name, tensor in _read(Path(weights)).items()}
    own = _tensors(module.state_dict())
    require_match("init.skip", skip or (), {**own, **found})
    skipped = [name for name in {**own, **found} if matches(name, skip or ())]
    unused = [name for name in found if name not in own and name not in skipped]
    missing = [name for name in own if name not in found and name not in skipped]
    fitting = {name: tensor for name, tensor in found.items() if name in own and name not in skipped}
    if not fitting or (strict and (unused or _tensors(dict(module.named_parameters())).keys() & {*missing})):
        remedy = "init.map={old.: new.} renames, init.skip=[name] leaves out, init.strict=false takes what fits"
        raise ConfigError(f"{said}: it lacks {_list(missing)}, and has {_list(unused)} that the module lacks; {remedy}")
    shapes = {name: (tuple(tensor.shape), tuple(own[name].shape)) for name, tensor in fitting.items()}
    misfits = [f"{name}: {there} in the file, {here} here" for name, (there, here) in shapes.items() if there != here]
    if misfits:
        raise ConfigError(f"{said}: shapes that do not fit: {_list(misfits)}; init.skip=[name] leaves such out")
    module.load_state_dict(fitting, strict=False)
    return [
        f"init: {len(fitting)} of {len(own)} tensors from {shown(weights)}",
        f"init: skipped {_list(skipped)}; missing {_list(missing)}; not used {_list(unused)}",
    ]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            require("init.weights", "safetensors", extra="export")
            from safetensors.torch import load_file  # here: few need the package

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # of a file of any kind
        is_pickle = isinstance(error, pickle.UnpicklingError)
        reason = "it holds objects, or is no file of weights" if is_pickle else str(error).strip().split("\n")[0]
        remedy = "if you trust it, save its state_dict only, as in torch.save(model.state_dict(), file)"
        raise ConfigError(f"init.weights={path}: cannot be read ({reason}); {remedy}") from error
    nodes = [content, *(content.get(key) for key in WITHIN)] if isinstance(content, dict) else []
    return max((_tensors(node) for node in nodes if isinstance(node, dict)), key=len, default={})


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state by their names, those of a compiled net as of the plain one."""
    return {name.replace(COMPILED, ""): value for name, value in state.items() if torch.is_tensor(value)}


def _rename(name: str, prefixes: Mapping[str, str]) -> str:
    for old in sorted(prefixes, key=len, reverse=True):
        if name.startswith(old):
            return prefixes[old] + name.removeprefix(old)
    return name


def _list(names: Sequence[str]) -> str:
    return listed(names, MAX_SHOWN) or "nothing"
