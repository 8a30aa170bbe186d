"""What each value of a config must be: the table that ``src.engine.settings.check.check`` goes by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value must be, in words and as a test; and whether it must be there at all."""

    expected: str
    holds: Callable[[Any], bool]
    needed: bool = False


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _int(minimum: int) -> Rule:
    return Rule(f"a whole number of {minimum} or more", lambda v: _is_int(v) and v >= minimum)


def _between(low: float, high: float) -> Rule:
    return Rule(f"a number from {low} to {high}", lambda v: _is_number(v) and low <= v <= high)


def _one_of(*options: Any) -> Rule:
    return Rule(f"one of {', '.join(str(option) for option in options)}", lambda v: v in options)


def _or_null(rule: Rule) -> Rule:
    return Rule(f"{rule.expected}, or null", lambda v: v is None or rule.holds(v))


def _needed(rule: Rule) -> Rule:
    return rule._replace(needed=True)


FLAG = Rule("true or false", lambda v: isinstance(v, bool))
TEXT = Rule("text", lambda v: isinstance(v, str) and v != "")
NAME = Rule("text, which may be empty, or null", lambda v: v is None or isinstance(v, str))
NODE = Rule("a node with a _target_, the class to build", lambda v: isinstance(v, dict) and "_target_" in v)
POSITIVE = Rule("a number above 0", lambda v: _is_number(v) and 0 < v < float("inf"))
NOT_NEGATIVE = Rule("a number of 0 or more", lambda v: _is_number(v) and 0 <= v < float("inf"))
SHARE = Rule(
    "a whole number of 0 or more, or a share from 0.0 to 1.0",
    lambda v: v >= 0 if _is_int(v) else _is_number(v) and 0 <= v <= 1,
)
BETAS = Rule(
    "two numbers from 0 up to, not including, 1",
    lambda v: isinstance(v, list) and len(v) == 2 and all(_is_number(b) and 0 <= b < 1 for b in v),
)
DEVICES = Rule(
    "a whole number of 1 or more, a list of devices' indices, or auto for all",
    lambda v: v in (-1, "auto") or (len(v) > 0 and all(map(_is_int, v)) if isinstance(v, list) else _int(1).holds(v)),
)
SEED = Rule("a whole number from 0 to 4294967295", lambda v: _is_int(v) and 0 <= v < 2**32)

TEST = Rule("true, false, or all", lambda v: isinstance(v, bool) or v == "all")

DEVICE = {
    "accelerator": _one_of("auto", "cpu", "gpu", "mps", "cuda", "tpu"),
    "devices": DEVICES,
    "precision": _one_of("32-true", "16-mixed", "bf16-mixed"),
}

# What a `monitor` may name: the metrics that a task, or a callback of src, logs ahead of a validation's end. Of a task
# that is not here, anything.
METRICS = {
    "src.classifier.ImageClassifier": ("train/acc", "train/loss", "val/acc", "val/loss"),
    "src.callbacks.speed.Speed": ("train/images_per_second", "train/samples_per_second"),
}

# By the beginning of a node's `_target_`, or the key of one that has none; the commands' names are the tops of
# their configs. Keys that are not there are not checked, but for those that are needed.
RULES: dict[str, dict[str, Rule]] = {
    "train": {
        "seed": _needed(SEED),
        "monitor": _needed(TEXT),
        "mode": _needed(_one_of("min", "max")),
        "test": _needed(TEST),
        "resume": _needed(_or_null(TEXT)),
        "ckpt_path": _needed(_or_null(TEXT)),
        "root_dir": _needed(TEXT),
        "output_dir": _needed(TEXT),
    },
    "test": {
        "ckpt_path": _needed(_or_null(TEXT)),
        "data": _needed(Rule("root and batch_size", lambda v: isinstance(v, dict))),
        "accelerator": _needed(Rule("accelerator, devices and precision", lambda v: isinstance(v, dict))),
        "root_dir": _needed(TEXT),
        "output_dir": _needed(TEXT),
    },
    "predict": {
        "ckpt_path": _needed(_or_null(TEXT)),
        "inputs": Rule("files, folders, patterns, or null", lambda v: v is None or isinstance(v, str | list)),
        "output": _needed(
            _or_null(
                Rule(
                    "a file that ends in .csv, .json or .parquet",
                    lambda v: TEXT.holds(v) and Path(v).suffix in (".csv", ".json", ".parquet"),
                )
            )
        ),
        "batch_size": _needed(_int(1)),
        "accelerator": _needed(Rule("accelerator, devices and precision", lambda v: isinstance(v, dict))),
        "root_dir": _needed(TEXT),
        "output_dir": _needed(TEXT),
    },
    "export": {
        "ckpt_path": _needed(_or_null(TEXT)),
        "format": _needed(_one_of("onnx", "pt2", "safetensors")),
        "output": _needed(_or_null(TEXT)),
        "data": _needed(Rule("root and batch_size", lambda v: isinstance(v, dict))),
        "root_dir": _needed(TEXT),
        "output_dir": _needed(TEXT),
    },
    "demo": {
        "ckpt_path": _needed(_or_null(TEXT)),
        "port": _needed(Rule("a whole number from 0 to 65535", lambda v: _is_int(v) and 0 <= v <= 65535)),
        "root_dir": _needed(TEXT),
        "output_dir": _needed(TEXT),
    },
    "data": {"root": _needed(_or_null(TEXT)), "batch_size": _needed(_or_null(_int(1)))},
    "accelerator": DEVICE,
    "src.data.mnist.": {
        "root": _needed(TEXT),
        "name": TEXT,
        "source": _one_of("auto", "files", "download", "package"),
        "mirrors": Rule("a list of URLs", lambda v: isinstance(v, list) and all(map(TEXT.holds, v))),
        "md5": _or_null(
            Rule(
                "checksums by file name, each text or null",
                lambda v: isinstance(v, dict) and all(map(_or_null(TEXT).holds, v.values())),
            )
        ),
        "timeout": POSITIVE,
        "batch_size": _int(1),
        "eval_batch_size": _int(1),
        "train_size": _or_null(_int(1)),
        "val_size": Rule("a whole number from 1 to 59999", lambda v: _is_int(v) and 1 <= v <= 59999),
        "split_seed": SEED,
        "seed": SEED,
        "augment": _one_of("none", "affine", "elastic"),
    },
    "src.models.lenet5.": {
        "num_classes": _int(1),
        "in_channels": _int(1),
        "activation": _one_of("tanh", "relu"),
        "pooling": _one_of("avg", "max"),
    },
    "src.callbacks.compile.": {
        "mode": _one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    },
    "src.models.lenet5_1998.": {"j": POSITIVE},
    "src.classifier.": {
        "net": _needed(NODE),
        "loss": NODE,
        "num_classes": _int(1),
        "input_size": _or_null(
            Rule(
                "three whole numbers of 1 or more",
                lambda v: isinstance(v, list) and len(v) == 3 and all(map(_int(1).holds, v)),
            )
        ),
    },
    "scheduler": {
        "interval": _one_of("step", "epoch"),
        "monitor": TEXT,
        "frequency": _int(1),
    },
    "torch.optim.lr_scheduler.": {
        "max_lr": POSITIVE,
        "total_steps": _or_null(_int(1)),
        "pct_start": _between(0, 1),
        "T_max": _int(1),
        "eta_min": NOT_NEGATIVE,
        "step_size": _int(1),
        "gamma": POSITIVE,
        "factor": _between(0, 1),
        "patience": _int(0),
    },
    "torch.optim.": {
        "lr": POSITIVE,
        "betas": BETAS,
        "eps": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
        "momentum": NOT_NEGATIVE,
        "nesterov": FLAG,
        "fused": _or_null(FLAG),
    },
    "pytorch_lightning.Trainer": {
        **DEVICE,
        "num_nodes": _int(1),
        "strategy": Rule("text or a node with a _target_", lambda v: TEXT.holds(v) or NODE.holds(v)),
        "max_epochs": _needed(_int(1)),
        "check_val_every_n_epoch": _int(1),
        "log_every_n_steps": _int(1),
        "accumulate_grad_batches": _int(1),
        "gradient_clip_val": _or_null(POSITIVE),
        "deterministic": FLAG,
        "enable_model_summary": FLAG,
        "num_sanity_val_steps": _int(-1),
        "limit_train_batches": _or_null(SHARE),
        "limit_val_batches": _or_null(SHARE),
        "limit_test_batches": _or_null(SHARE),
        "overfit_batches": _or_null(SHARE),
        "plugins": Rule("a list of nodes with a _target_", lambda v: isinstance(v, list) and all(map(NODE.holds, v))),
        "profiler": _or_null(Rule("text or a node with a _target_", lambda v: TEXT.holds(v) or NODE.holds(v))),
    },
    "pytorch_lightning.callbacks.": {
        "dirpath": _or_null(TEXT),
        "filename": _or_null(TEXT),
        "monitor": _or_null(TEXT),
        "mode": _one_of("min", "max"),
        "patience": _int(0),
        "min_delta": NOT_NEGATIVE,
        "save_top_k": _int(-1),
        "enable_version_counter": FLAG,
        "max_depth": _int(-1),
    },
    "src.callbacks.lr_finder.": {"min_lr": POSITIVE, "max_lr": POSITIVE, "num_training_steps": _int(13)},
    "src.callbacks.weight_averaging.": {"decay": _between(0, 1), "update_every_n_steps": _int(1)},
    "src.callbacks.": {
        "dirpath": TEXT,
        "every_n_steps": _or_null(_int(1)),
        "refresh_rate": _int(0),
        "num_images": _int(1),
        "ci": NAME,
    },
    "src.engine.runs.loggers.": {
        "save_dir": TEXT,
        "project": TEXT,
        "offline": FLAG,
        "has_test": TEST,
        "tracking_uri": TEXT,
        "artifact_location": _or_null(TEXT),
        "experiment_name": TEXT,
    },
    "pytorch_lightning.loggers.": {
        "save_dir": TEXT,
        "name": NAME,
        "version": Rule("text, a whole number, or null", lambda v: NAME.holds(v) or _int(0).holds(v)),
        "default_hp_metric": FLAG,
    },
}
