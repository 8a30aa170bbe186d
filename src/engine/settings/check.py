"""Whether a config makes sense: checked in milliseconds, since the classes that take it need seconds to import."""

import importlib.util
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.engine.errors import ConfigError
from src.engine.settings.rules import METRICS, NODE, RULES
from src.engine.settings.trust import check_targets

ROOT = Path(__file__).resolve().parents[3]
CONF = ROOT / "conf"


# Each builds one object, where a command trains; those that are _partial_ get the rest of their arguments then.
REQUIRED_NODES = {"data": False, "model": False, "optimizer": True, "trainer": True}
NODES_BY_NAME = ("callbacks", "logger")  # each holds named nodes
MARKS = {"inputs": "predict", "format": "export", "port": "demo"}  # a key that only this command has
# By a format, or a logger's class: what it needs, and the extra of pyproject.toml that has it.
PACKAGES = {
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "export"),
    "safetensors": (("safetensors",), "export"),
    "parquet": (("pyarrow",), "export"),
    "WandbLogger": (("wandb",), "trackers"),
    "MLFlowLogger": (("mlflow",), "trackers"),
}


def check(cfg: DictConfig) -> None:
    """Check a command's config, resolved and whole.

    Raises:
        ConfigError: At the first value that cannot be.
    """
    try:
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, dict)
    for key in map(str, config):
        if "/" in key:
            raise ConfigError(f"{key}: no such group in conf/; keys are written with points")
    is_training = not config.keys().isdisjoint(("seed", "model", "trainer"))
    if is_training:
        for name, is_partial in REQUIRED_NODES.items():
            _require_target(name, config.get(name), is_partial)
        if scheduler := config.get("scheduler"):
            _require_target("scheduler.scheduler", scheduler.get("scheduler"), is_partial=True)
    for name in NODES_BY_NAME:
        nodes = config.get(name) or {}
        if not isinstance(nodes, dict):
            raise ConfigError(f"{name}={nodes}: expected named nodes, each with a _target_")
        for key, node in nodes.items():
            if node is not None:
                _require_target(f"{name}.{key}", node)
    check_targets(config)
    for key, node in (config.get("logger") or {}).items():
        _require_packages("logger", key, str((node or {}).get("_target_")).rpartition(".")[2])
    command = "train" if is_training else next((name for key, name in MARKS.items() if key in config), "test")
    _check_node("", config, command)
    if is_training:
        _check_resume(config)
        _check_clipping(config["trainer"], config["optimizer"])
        _check_monitors(config)
    if command == "predict":
        _require_packages("output", config["output"], Path(config["output"] or "").suffix[1:])
    if command == "export":
        _require_packages("format", config["format"], config["format"])
    device = config.get("trainer") or config.get("accelerator") or {}  # a test has no trainer of its own
    _check_accelerator(device.get("accelerator"))


def _require_packages(key: str, value: str | None, what: str) -> None:
    packages, extra = PACKAGES.get(what, ((), ""))
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{key}={value}: needs {' and '.join(missing)}: pip install -e '.[{extra}]'")


def _require_target(key: str, node: Any, is_partial: bool = False) -> None:
    if not NODE.holds(node):
        found = ", ".join(map(str, node)) if isinstance(node, dict) else node
        raise ConfigError(f"{key}: expected a node with a _target_, the class to build; found {found}")
    if node.get("_partial_", False) is not is_partial:
        raise ConfigError(f"{key}._partial_={node.get('_partial_')}: expected {'true' if is_partial else 'false'}")


def _check_node(path: str, node: Any, prefix: str | None = None) -> None:
    """Apply the rules that have this prefix, else those of the node's target or key, then go down into it."""
    if isinstance(node, list):
        for index, child in enumerate(node):
            _check_node(f"{path}[{index}]", child)
    if not isinstance(node, dict):
        return
    if prefix is None:
        target = node.get("_target_", "")
        prefix = next((name for name in RULES if "." in name and target.startswith(name)), "" if target else path)
    rules = RULES.get(prefix, {})
    for key, rule in rules.items():
        full_key = f"{path}.{key}".lstrip(".")
        if key in node and not rule.holds(node[key]):
            raise ConfigError(f"{full_key}={node[key]}: expected {rule.expected}")
        if rule.needed and key not in node:
            raise ConfigError(f"{full_key}: is missing; expected {rule.expected}")
    for key, value in node.items():
        _check_node(f"{path}.{key}".lstrip("."), value)


def _check_resume(config: dict[Any, Any]) -> None:
    """From a file, ``resume`` would come too late to be replaced by how its run was started."""
    resume, folder = config["resume"], config["output_dir"]
    if resume is not None and Path(resume).resolve() != Path(folder).resolve():
        raise ConfigError(f"resume={resume}: goes on with a run from the command line alone, not from a file")


def _check_clipping(trainer: dict[str, Any], optimizer: dict[str, Any]) -> None:
    precision, clip = str(trainer.get("precision")), trainer.get("gradient_clip_val")
    if clip and precision.endswith("-mixed") and optimizer.get("fused"):
        raise ConfigError(
            f"trainer.gradient_clip_val={clip}: a fused optimizer unscales {precision} gradients by itself, behind the "
            "clipping; set optimizer.fused=false"
        )


def _check_monitors(config: dict[Any, Any]) -> None:
    """Where it is known what is logged: a metric that never comes would else be missed behind the first epoch."""
    callbacks = {name: node for name, node in (config.get("callbacks") or {}).items() if node}
    targets = [config["model"]["_target_"], *(node["_target_"] for node in callbacks.values())]
    if targets[0] not in METRICS or not all(target.startswith(("src.", "pytorch_lightning.")) for target in targets):
        return
    known = sorted({metric for target in targets for metric in METRICS.get(target, ())})
    nodes = {"": config, "scheduler.": config.get("scheduler") or {}}
    for path, node in (nodes | {f"callbacks.{name}.": node for name, node in callbacks.items()}).items():
        if node.get("monitor") not in (None, *known):
            raise ConfigError(
                f"{path}monitor={node['monitor']}: no metric of that name; expected one of {', '.join(known)} "
                "(those of your own belong into METRICS in src/engine/settings/rules.py)"
            )


def _check_accelerator(accelerator: str | None) -> None:
    """Look for the device; torch is imported only when one is asked for, as the run will need it anyway."""
    if accelerator in ("gpu", "cuda", "mps"):
        import torch

        has_mps = torch.backends.mps.is_available()
        if accelerator == "mps" and not has_mps:
            raise ConfigError("accelerator=mps: needs a Mac with Apple silicon; use trainer=cpu or trainer=gpu")
        if not (torch.cuda.is_available() or (has_mps and accelerator != "cuda")):
            raise ConfigError(f"accelerator={accelerator}: torch finds no GPU; use trainer=cpu or mend the driver")
