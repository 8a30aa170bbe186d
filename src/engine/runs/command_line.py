"""The words of a command: arranged as Hydra wants them, described by ``--help``, and those of ``.env``."""

import os
import re
from collections.abc import Sequence
from itertools import dropwhile, takewhile
from pathlib import Path

from src.engine.errors import ConfigError
from src.engine.runs.resume import quoted
from src.engine.settings.check import CONF
from src.engine.settings.explain import nearest_key

# Hydra's own flags, and those of them that take the next word.
FLAGS = (
    "--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m", "--shell-completion",
    "-sc",
)  # fmt: skip
CONFIGS = ("job", "hydra", "all")
INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
FLAGS_OF_TWO: dict[str, tuple[str, ...]] = {  # and which words that may be
    "--cfg": CONFIGS, "-c": CONFIGS, "--info": INFOS, "-i": INFOS,
    **dict.fromkeys(("--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"), ()),
    "--experimental-rerun": (),
}  # fmt: skip


def arrange(arguments: Sequence[str], config_name: str, positional: str = "") -> list[str]:
    """Arguments as Hydra wants them: flags first, then overrides; ``--key=value`` is ``key=value``.

    Args:
        arguments: Those of the command line, in any order.
        config_name: The command's root in ``conf/``.
        positional: The key that words without one belong to, files that exist among them.

    Raises:
        ConfigError: If a setting is written as a flag, or a flag's word is none of its.
    """
    flags, overrides, files = [], [], []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        is_flag = any(flag == name or (name[:2] == "--" and flag.startswith(name)) for flag in (*FLAGS, *FLAGS_OF_TWO))
        if name.startswith("--") and equals and not is_flag:  # as agents of sweeps elsewhere write settings
            word, name = word[2:], name[2:]
        if is_flag:
            flags.append(word)
            if name in FLAGS_OF_TWO and not equals:
                flags.append(value := next(words, ""))
            if (choices := FLAGS_OF_TWO.get(name)) and value not in choices:
                raise ConfigError(f"{name} {value}: expected one of {', '.join(choices)}")
        elif word.startswith("-"):
            key = nearest_key(name.lstrip("-").replace("-", "_"), config_name) or "key"
            raise ConfigError(f"{name}: settings are written key=value, as in {key}={next(words, '<value>')}")
        elif positional and (Path(word).exists() or not ("=" in word or word.startswith("~"))):
            files.append(word)
        elif re.search(r"[^\w./~+-]", value, re.ASCII) and os.path.exists(value):  # noqa: PTH110
            overrides.append(f"{name}={quoted(value)}")  # a path is taken as it is
        elif (CONF / name).is_dir() and value == "null":  # a group that is off
            overrides.append(f"{name}=[]")
        elif (CONF / name).is_dir() and value.isdecimal():
            options = sorted(path.stem for path in (CONF / name).glob("*.yaml"))
            raise ConfigError(f"{word}: no such file in conf/{name}/; there are: {', '.join(options)}")
        else:
            overrides.append(word)
    return [*flags, *overrides, *([f"{positional}=[{','.join(map(quoted, files))}]"] if files else [])]


def describe_command(config_name: str) -> str:
    """What ``--help`` prints: the keys of the command's file in ``conf/`` with their comments, and its groups."""
    lines = (CONF / f"{config_name}.yaml").read_text().splitlines()
    entries = [line.strip(" -").split(":")[0] for line in lines if line.startswith("  - ")]
    groups = [group for group in entries if (CONF / group).is_dir() and group != "hydra"]
    options = [f"{group}={', '.join(sorted(path.stem for path in (CONF / group).glob('*.yaml')))}" for group in groups]
    keys = dropwhile(lambda line: line != "", lines)
    own = [line for line in takewhile(lambda line: line != "hydra:", keys) if not line.startswith(("root_", "output_"))]
    options += [""] if options else []
    return "\n".join([lines[0].strip("# "), *own, "", *options, "--cfg job: all settings; -m: several values"])


def read_env(path: Path) -> None:
    """Set the environment variables of a file, a ``NAME=value`` a line; those that are set already stay."""
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and name.strip().isidentifier():
            within = re.match(r"""\s*(["'])(.*)\1\s*(#.*)?$""", value)
            os.environ.setdefault(name.strip(), within[2] if within else re.split(r"(?:^|\s)#", value)[0].strip())
