"""Bad overrides at random, over every key and group: one or two clear lines each, and nothing left behind."""

import random
import re
import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, ListConfig, OmegaConf

from src.engine.settings.check import CONF
from tests.compose import compose_cfg
from tests.forks import run_command

DATA = ["data=mnist5k"] if (CONF / "data" / "mnist5k.yaml").exists() else []  # which need no download
NUM = {"train": 250, "test": 50}  # overrides in all
NUM_BY_DEFAULT = {"train": 4, "test": 1}

# By the type of the value that a key has: what is wrong there whatever the key means.
NEVER_A_NUMBER = ["text", "''", "nan", "-inf", "[1,2]", "{a: 1}", "true", "-1e999", "٣²", "1,5e", "'1'"]
WRONG: dict[type, list[str]] = {
    bool: ["text", "''", "nan", "2.5", "-1", "[true]", "{a: 1}", "null", "1e999", "'true'"],
    int: [*NEVER_A_NUMBER, "null", "1.5", "-3", "1e999", "99999999999999999999.5"],
    float: [*NEVER_A_NUMBER, "null", "-0.1", "1e999"],
    str: ["''", "[]", "[a,b]", "{a: 1}", "null", "5", "1.5", "true", "nan", "1e999"],
    type(None): ["nan", "-1e999", "[]", "[a]", "{a: 1}", "''", "-7"],
    list: ["text", "5", "''", "[[1],[2]]", "[nan]", "[null]", "{a: 1}", "true", "1e999"],
}
# Names that no class, no file and no option has; beside them, keys where every text is one.
NAMES = ["auto_", "Relu", "максимум", "максимум \N{SNOWMAN}", "x" * 5000, "../../etc/passwd", "a b", "-", "%s{}", "\\"]
CHOICES = (
    "mode", "data.source", "data.augment", "model.net.activation", "model.net.pooling", "scheduler.interval",
    "accelerator.accelerator", "accelerator.devices", "accelerator.precision", "trainer.accelerator",
    "trainer.devices", "trainer.precision", "callbacks.checkpoint.mode", "ckpt_path",
)  # fmt: skip
# These may be none, or of another type, as well.
NULLABLE = {
    "data.md5", "optimizer.fused", "logger.tensorboard.version", "logger.tensorboard.name", "data.mirrors",
    "callbacks.checkpoint.filename", "callbacks.checkpoint.dirpath", "callbacks.checkpoint.monitor",
    "model.input_size", "trainer.enable_model_summary", "trainer.limit_train_batches", "trainer.gradient_clip_val",
    "callbacks.last.every_n_steps",
}  # fmt: skip
ALLOWED = (
    ("timeout", "1.5"),
    ("timeout", "99999999999999999999.5"),
    ("devices", "[1,2]"),
    ("version", "5"),
    *(("max_lr", number) for number in ("-1e999", "-inf", "-0.1", "nan")),
    ("pct_start", "nan"),
)  # torch takes them
BROKEN = ["=1", "={key}", "{key}", "{key}=[", "{key}=]", "{key}={{a: 1", "{key}='", '{key}="a', "{key}=(1", "{key}=a,b",
          "{key}=[1,", "{key}=range(", "{key}=choice(1,2)", "{key}=range(3)", "++=1", "~", "{key} 1",
          "{key}=${{", "{key}=${{}}", "{key}=${{a", "{key}..x=1", ".{key}=1", "{key}=f(1)", "{key}@:x=1"]  # fmt: skip
UNRESOLVED = [
    "${nope}",
    "${nope:1}",
    "${oc.env:NO_SUCH_VARIABLE}",
    "${.nope}",
    "${data.nope}",
    "a${nope}",
    "${${nope}}",
]
NEEDED = [
    "seed", "monitor", "mode", "test", "ckpt_path", "root_dir", "output_dir", "data", "data._target_", "data.root",
    "model", "model._target_", "model.net", "model.net._target_", "optimizer", "optimizer._target_",
    "optimizer._partial_", "optimizer.lr", "scheduler.scheduler", "scheduler.scheduler._target_",
    "scheduler.scheduler._partial_", "accelerator", "accelerator.accelerator", "accelerator.devices",
    "accelerator.precision", "trainer", "trainer._target_", "trainer.max_epochs",
    "callbacks.checkpoint._target_", "callbacks.progress._target_", "logger.tensorboard._target_",
]  # fmt: skip
TARGETS = [
    "os.system", "os.execv", "subprocess.run", "subprocess.Popen", "builtins.eval", "eval", "shutil.rmtree", "nt.x",
    "pathlib.Path", "torch.os.system", "src.engine.runs.report.subprocess.run", "src.engine.runs.command.os.kill",
    "torch.hub.load",
    "torch.load", "hydra.utils.get_method", "hydra.utils.instantiate", "hydra._internal.utils._locate",
    "torch.utils.collect_env.run", "torch.ops.load_library", "torchvision.os.remove", "pytorch_lightning.os.execv",
    "torch.nn.functional.torch.hub.load", "torch.optim.Adamm", "torch.nn.Linearr", "src.models.lenet5.LeNet6",
    "src.models.lenet.LeNet5", "nosuchpackage.Thing", "Adam", "torch", "torch.optim", "torch.optim.", ".Adam",
    "''", "null", "5", "true", "[torch.optim.Adam]", "{a: 1}", "torch..optim", "torch.optim.Adam()", "Ärger.Netz",
    "torch.optim.Adam.__init__.__globals__", "__main__.os", "src", "x" * 3000,
]  # fmt: skip

# Nodes whose classes take no arguments but those they name; others hand on what they are given, or ignore it.
TAKE_NO_OTHERS = ["optimizer", "scheduler.scheduler", "data", "model", "model.net", "trainer", "callbacks.checkpoint",
                  "callbacks.last", "callbacks.progress", "callbacks.speed", "callbacks.confusion"]  # fmt: skip


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its resolved value, a list or an empty node counting as one."""
    for key in node:
        full_key = f"{path}.{key}".lstrip(".")
        value = node[key]
        if isinstance(value, DictConfig):
            yield from _leaves(value, full_key)
        else:
            yield full_key, OmegaConf.to_container(value) if isinstance(value, ListConfig) else value


def _misspelt(name: str, rng: random.Random) -> str:
    """Another name: with a letter more, less, doubled, changed, or two exchanged."""
    place = rng.randrange(len(name))
    letter = rng.choice(string.ascii_lowercase)
    return rng.choice(
        [
            name[:place] + letter + name[place:],
            name[:place] + name[place + 1 :] + "_",
            name[: place + 1] + name[place:],
            name[:place] + letter + name[place + 1 :],
            name[:place] + name[place:][:2][::-1] + name[place + 2 :],
        ]
    )


def _groups() -> dict[str, set[str]]:
    folders = [path for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "local")]
    return {folder.name: {path.stem for path in folder.glob("*.yaml")} for folder in folders}


def bad_overrides(verb: str, num: int, folder: Path) -> list[str]:
    """Bad overrides of a command, as many of each kind, the same ones each time."""
    rng = random.Random(0)
    cfg = compose_cfg(folder, config_name=verb)
    values = dict(_leaves(cfg))
    keys = sorted(values)
    plain = [key for key in keys if "_target_" not in key]
    typed = [
        f"{key}={wrong}"
        for key in plain
        if "md5." not in key
        for wrong in WRONG[type(values[key])]
        if not (key in NULLABLE and wrong in ("null", "[]", "''")) and (key.split(".")[-1], wrong) not in ALLOWED
    ]
    (folder / "empty.ckpt").touch()
    (folder / "text.ckpt").write_text("no checkpoint")
    groups = _groups() if verb == "train" else {"accelerator": _groups()["accelerator"]}
    existing = {*keys, *groups}
    misspelt = []
    for key in keys:
        before, _, last = key.rpartition(".")
        misspelt += (
            [f"{_misspelt(before, rng)}.{last}", f"{before}.{_misspelt(last, rng)}"]
            if before
            else [_misspelt(key, rng)]
        )
    options = [(group, _misspelt(option, rng)) for group in groups for option in sorted(groups[group])]
    nested = [key for key in keys if key.endswith("_target_")] or ["+data._target_"]
    kinds = [
        [f"{key}=1" for key in misspelt if key not in existing],
        [f"{group}={option}" for group, option in options if option not in groups[group]],
        typed,
        [f"{key}={name}" for key in CHOICES if key in values for name in map(_quoted, NAMES)],
        [pattern.format(key=key) for pattern in BROKEN for key in plain],
        [f"{key}='{text}'" for key in plain for text in UNRESOLVED],
        [f"{group}={option}" for name in groups for option in groups[name]
         for group in [_misspelt(name, rng)] if group not in existing],
        [f"+{group}/{_misspelt('sub', rng)}={option}" for group in groups for option in groups[group]],
        [f"~{key}" for key in (NEEDED if verb == "train" else ["data", "data.root", "data.batch_size", *cfg])],
        [f"{key}={_quoted(target) if target[0] not in '[{' else target}" for key in nested for target in TARGETS],
        [f"ckpt_path={path}" for path in
         (folder, folder / "empty.ckpt", folder / "text.ckpt", "/dev/null", "a/b.ckpt", _quoted("sp ace é.ckpt"))],
        ["hydra.run.dir=[]", "hydra.run.dir=null", "hydra.foo=1", "hydra/launcher=nope", "hydra.mode=x",
         "hydra.job.num=text", "hydra.verbose={a: 1}", "hydra.callbacks.preflight._target_=os.system"],
    ]  # fmt: skip
    for kind in kinds:
        rng.shuffle(kind)
    in_turns = [kind[i] for i in range(max(map(len, kinds))) for kind in kinds if i < len(kind)]
    return list(dict.fromkeys(in_turns))[:num]


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w./-]+", text, re.ASCII) else f"'{text}'".replace("\\'", "\\\\'")


def _run(verb: str, override: str, root: Path) -> None:
    """A bad override ends in a line or two, and leaves nothing; one that the libraries take trains for a second."""
    short = [*DATA, "debug=fast", "trainer=cpu", "logger=[]"] if verb == "train" else ["accelerator=cpu"]
    result = run_command(verb, *short, override, PROJECT_ROOT=str(root))
    assert "Traceback" not in result.stderr, override
    if result.returncode == 0 and verb == "train":
        shutil.rmtree(root / "logs")
        return
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    told = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert result.returncode == 1, (override, lines)
    assert told, (override, lines)
    assert len(lines) - told[0] <= 2, (override, lines)
    assert len(lines[told[0]]) < 1000
    if "HYDRA_FULL_ERROR" in lines[-1]:  # a fault within a step, whose trace is in the run's log
        shutil.rmtree(root / "logs", ignore_errors=True)
    assert not (root / "logs").exists(), (override, lines)


@pytest.mark.parametrize("verb", NUM)
def test_bad_overrides_are_said(verb: str, tmp_path: Path) -> None:
    for override in bad_overrides(verb, NUM_BY_DEFAULT[verb], tmp_path):
        _run(verb, override, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("verb", NUM)
def test_three_hundred_bad_overrides_are_said(verb: str, tmp_path: Path) -> None:
    overrides = bad_overrides(verb, NUM[verb], tmp_path)
    assert len(set(overrides)) == NUM[verb]
    for override in overrides:
        _run(verb, override, tmp_path)


def _assert_unknown_arguments_are_said(num: int, folder: Path) -> None:
    """Whether a class takes what ``+key=`` adds is known once it is imported."""
    rng = random.Random(1)
    for node in rng.sample(TAKE_NO_OTHERS, min(num, len(TAKE_NO_OTHERS))):
        name = _misspelt("argument", rng)
        result = run_command("train", *DATA, "trainer=cpu", f"+{node}.{name}=1", PROJECT_ROOT=str(folder))
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {node}.{name}: "), line
        assert "takes no such argument" in line


def test_arguments_that_no_class_takes_are_said(tmp_path: Path) -> None:
    _assert_unknown_arguments_are_said(1, tmp_path)


@pytest.mark.slow
def test_arguments_that_no_class_takes_are_said_of_all_nodes(tmp_path: Path) -> None:
    _assert_unknown_arguments_are_said(100, tmp_path)
