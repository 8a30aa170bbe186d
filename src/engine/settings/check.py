"""Whether a config makes sense, as far as it can be told without the classes: their imports take seconds."""

import difflib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.engine.errors import ConfigError
from src.engine.settings.arguments import check_arguments, describe, find_nodes, takes

ROOT = Path(__file__).resolve().parents[3]
CONF = ROOT / "conf"

POSITIVE = Annotated[int, range(1, sys.maxsize)]
# The template's own keys: those that no class takes.
OWN: dict[str, Any] = {
    "seed": Annotated[int, range(2**32)] | None,
    "monitor": str | None,
    "mode": Literal["min", "max"],
    "train": bool,
    "test": bool | Literal["all"],
    "resume": str | None,
    "ckpt_path": str | None,
    "task_name": str | None,
    "tags": list[str] | str | None,
    "data.root": str | None,
    "data.batch_size": POSITIVE | None,
    "inputs": str | list[str] | None,
    "batch_size": POSITIVE,
    "output": str | None,
    "format": Literal["onnx", "pt2", "safetensors"],
    "port": Annotated[int, range(2**16)],
    "root_dir": str,
    "output_dir": str,
}
DECLARED = ("extras",)  # what other templates have
MARKS = {"inputs": "predict", "format": "export", "port": "demo"}  # a key that only this command has
NEEDED = ("model", "trainer")  # to train
NAMED = ("callbacks", "logger")  # each holds named nodes
# By a format, or a logger's class: what it needs, and the extra of pyproject.toml that has it.
PACKAGES = {
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "export"),
    "safetensors": (("safetensors",), "export"),
    "parquet": (("pyarrow",), "export"),
    "WandbLogger": (("wandb",), "trackers"),
    "MLFlowLogger": (("mlflow",), "trackers"),
}


def check(cfg: DictConfig, declared: Iterable[str] = ()) -> None:
    """Check a command's config without importing what it names: keys, own values, nodes and modules.

    Args:
        cfg: The config, whole.
        declared: Keys at the top that are known beside those of the command's file in ``conf/``.

    Raises:
        ConfigError: At the first that cannot be.
    """
    config = _resolve(cfg)
    command = _command(config)
    _check_keys(config, command, declared)
    for key, annotation in OWN.items():
        group, _, name = key.rpartition(".")
        node = config.get(group) if group else config
        if isinstance(node, dict) and "_target_" not in node and name in node and not takes(annotation, node[name]):
            raise ConfigError(f"{key}={node[name]}: expected {describe(annotation)}")
    if command == "train":
        _check_training(config)
    for name in NAMED:
        nodes = config.get(name) or {}
        if not isinstance(nodes, dict):
            raise ConfigError(f"{name}={nodes}: expected named nodes, each with a _target_")
        for key, node in nodes.items():
            if node is not None:
                _require_target(f"{name}.{key}", node)
    for key, node in find_nodes(config):
        _find_module(key, node["_target_"])
    for key, node in (config.get("logger") or {}).items():
        _require_packages("logger", key, str((node or {}).get("_target_")).rpartition(".")[2])
    if command == "predict":
        _check_inputs(config)
    if command == "export":
        _require_packages("format", config["format"], config["format"])


def check_values(cfg: DictConfig) -> None:
    """Check what only the classes know that a config names: their arguments. It imports them.

    Raises:
        ConfigError: At the first that cannot be.
    """
    config = _resolve(OmegaConf.merge(cfg, {"seed": 0}) if "seed" in cfg and cfg.seed is None else cfg)  # to be drawn
    check_arguments(config)
    device = config.get("trainer") or config.get("accelerator") or {}  # a test has no trainer of its own
    _check_accelerator(device.get("accelerator"))


def _resolve(cfg: Any) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    return {str(key): value for key, value in config.items()}  # type: ignore[union-attr]


def _command(config: Mapping[str, Any]) -> str:
    if not config.keys().isdisjoint(("seed", "model", "trainer")):
        return "train"
    return next((name for key, name in MARKS.items() if key in config), "test")


def _check_keys(config: Mapping[str, Any], command: str, declared: Iterable[str]) -> None:
    """A key in a file that nobody reads is as wrong as one on the command line."""
    root: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{command}.yaml"))
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    own = {key: node for key, node in root.items() if key not in ("defaults", "hydra")}
    needed = {*own, *(name for name in ("accelerator",) if any(name in entry for entry in root["defaults"]))}
    for path, node, known in [
        ("", config, {*own, *groups, *DECLARED, *declared}),
        *((f"{key}.", config[key], set(child)) for key, child in own.items()
          if isinstance(child, dict) and isinstance(config.get(key), dict)),
    ]:  # fmt: skip
        for key in node:
            if "/" in str(key):
                raise ConfigError(f"{key}: no such group in conf/; keys are written with points")
            if key not in known:
                close = nearest(str(key), sorted(known))
                raise ConfigError(f"{path}{key}: no such key; {close} (a key of your own: conf/{command}.yaml, extras)")
    for key in needed:
        if key not in config:
            raise ConfigError(f"{key}: is missing" + (f"; expected {describe(OWN[key])}" if key in OWN else ""))


def nearest(name: str, options: Iterable[str], limit: int = 20) -> str:
    """Which of some names is meant: one by its last part, or a similar one; else all of them, if there are few."""
    options = list(options)
    close = [option for option in options if option.rpartition(".")[2] == name]
    close = close or difflib.get_close_matches(name, options, n=1, cutoff=0.7)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if len(options) > limit:
        return "--cfg job shows what there is, --cfg hydra Hydra's own keys"
    return f"there are: {', '.join(options) or 'none'}"


def _check_training(config: Mapping[str, Any]) -> None:
    for name in NEEDED:
        _require_target(name, config.get(name))
    for name in ("data", "optimizer"):
        if config.get(name) is not None:
            _require_target(name, config[name])
    if not config["trainer"].get("_partial_"):
        raise ConfigError(f"trainer._partial_={config['trainer'].get('_partial_')}: expected true")
    scheduler = config.get("scheduler")
    if isinstance(scheduler, dict) and scheduler and "_target_" not in scheduler:
        _require_target("scheduler.scheduler", scheduler.get("scheduler"))
    resume, folder = config["resume"], config["output_dir"]
    if resume is not None and Path(resume).resolve() != Path(folder).resolve():
        # From a file, it would come too late to be replaced by how its run was started.
        raise ConfigError(f"resume={resume}: resumes a run from the command line only, not from a file")
    precision, clip = str(config["trainer"].get("precision")), config["trainer"].get("gradient_clip_val")
    if clip and precision.endswith("-mixed") and (config.get("optimizer") or {}).get("fused"):
        raise ConfigError(
            f"trainer.gradient_clip_val={clip}: a fused optimizer unscales {precision} gradients itself, after the "
            "clipping; set optimizer.fused=false"
        )


def _check_inputs(config: Mapping[str, Any]) -> None:
    suffix = Path(config["output"] or "_.csv").suffix
    if suffix not in (".csv", ".json", ".parquet"):
        raise ConfigError(f"output={config['output']}: expected a file that ends in .csv, .json or .parquet")
    _require_packages("output", config["output"], suffix[1:])


def _require_packages(key: str, value: str | None, what: str) -> None:
    packages, extra = PACKAGES.get(what, ((), ""))
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{key}={value}: needs {' and '.join(missing)}: pip install -e '.[{extra}]'")


def _require_target(key: str, node: Any) -> None:
    if not (isinstance(node, dict) and "_target_" in node):
        found = ", ".join(map(str, node)) if isinstance(node, dict) else node
        raise ConfigError(f"{key}: expected a node with a _target_, the class to build; found {found}")


def _find_module(key: str, target: Any) -> None:
    """Look for a target's module among the files: importing torch takes seconds."""
    said = f"{key}._target_={target}"
    if not isinstance(target, str) or not all(name.isidentifier() for name in target.split(".")) or "." not in target:
        raise ConfigError(f"{said}: expected the dotted name of a class, as in torch.optim.Adam")
    package, *names = target.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ConfigError(f"{said}: no package {package} is installed")
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    while places and len(names) > 1:
        files = [file for folder in places for file in folder.iterdir()]
        found = [file for file in files if file.name.split(".")[0] == names[0]]
        initial = [folder / "__init__.py" for folder in places if (folder / "__init__.py").is_file()]
        if not found and not any(names[0] in path.read_text("utf-8", "replace") for path in initial):
            known = sorted({file.stem for file in files if file.name[0] not in "_."})
            raise ConfigError(f"{said}: {package} has no {names[0]}; {nearest(names[0], known)}")
        package, places = f"{package}.{names.pop(0)}", [file for file in found if file.is_dir()]


def _check_accelerator(accelerator: Any) -> None:
    if accelerator in ("gpu", "cuda", "mps"):
        import torch  # here: most of this file is to answer before it is imported

        has_mps = torch.backends.mps.is_available()
        if accelerator == "mps" and not has_mps:
            raise ConfigError("accelerator=mps: needs a Mac with Apple silicon; use trainer=cpu or trainer=gpu")
        if not (torch.cuda.is_available() or (has_mps and accelerator != "cuda")):
            raise ConfigError(f"accelerator={accelerator}: torch finds no GPU; use trainer=cpu or mend the driver")
