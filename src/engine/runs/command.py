"""What surrounds every command: its config is checked, its folder claimed, its errors printed in short."""

import atexit
import ctypes
import gc
import logging
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, wraps
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, Node, OmegaConf

from src.engine.errors import ConfigError
from src.engine.runs.checkpoints import check_checkpoint, choose_newest, find_best, find_checkpoint
from src.engine.runs.processes import (
    GRACE,
    SWEEP_PARENT,
    end_with_parent,
    exit_on_signals,
    get_name,
    is_child,
    is_first_of_host,
    is_requeued,
    is_started_from_outside,
)
from src.engine.runs.resume import expand, quoted
from src.engine.runs.status import REPRODUCES, describe_start, write_status
from src.engine.settings.check import CONF, ROOT, check, check_values
from src.engine.settings.explain import explain, is_refusal, nearest_key
from src.engine.settings.trust import admit, recall, remember

log = logging.getLogger(__name__)

FULL_ERROR = "HYDRA_FULL_ERROR"
SLURM_LAUNCHER = "hydra_plugins.slurm_launcher.SlurmLauncher"  # as its option in Hydra's config has it
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_asked_full_error = ""  # what the user has set it to
_check_more: Callable[[DictConfig], None] | None = None  # the command's own check
_made: list[Path] = []  # the run's folder and those around it, as far as this process has made them
_is_refused = False  # whether the run has ended before it began, by what the user can mend
# Hydra's own flags, and those of them that take the next word.
FLAGS = (
    "--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m", "--shell-completion",
    "-sc",
)  # fmt: skip
FLAGS_OF_TWO = (
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
    "--experimental-rerun", "--info", "-i",
)  # fmt: skip


class JobError(Exception):
    """A sweep's job has failed; the message says why, without the traceback, which would keep the model in memory."""


def run(
    main: Callable[[], Any], config_name: str, check: Callable[[DictConfig], None] | None = None, positional: str = ""
) -> None:
    """Run a command that ``hydra.main`` decorates; errors of composition are printed in short, with exit status 1.

    Args:
        main: The decorated function.
        config_name: Its root in ``conf/``, where misspelt keys are looked up.
        check: The command's own check of its config, made before the run's folder.
        positional: The key that words without one belong to.
    """
    global _asked_full_error, _check_more
    _check_more = check
    # Lightning 2.6 calls what torch 2.15 has deprecated; nothing that a user could mend.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    # A run that resumes in its folder.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # The table of the model then says the weights' size as of 32 bits, which they have.
    warnings.filterwarnings("ignore", message="Precision .* is not supported by the model summary")
    # A run that resumes in a new folder has its best checkpoint there.
    warnings.filterwarnings("ignore", message="The dirpath has changed")
    # A run that resumes with other callbacks: you are told already that its config differs.
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    # A run that resumes within an epoch: LastCheckpoint says it, with numbers.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    # A module may keep its net as a hyper-parameter; a checkpoint holds it once all the same.
    warnings.filterwarnings("ignore", message="Attribute '.*' is an instance of `nn.Module`")
    # At every start outside of a job, on a machine that has Slurm.
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system but is not used")
    os.environ.setdefault("PROJECT_ROOT", str(ROOT))
    read_env(Path(os.environ["PROJECT_ROOT"], ".env"))
    _asked_full_error = os.environ.get(FULL_ERROR, "")
    os.environ[FULL_ERROR] = "1"  # Hydra then raises what it would print over many lines
    exit_on_signals()
    end_with_parent()
    try:
        sys.argv[1:] = arrange(sys.argv[1:], config_name, positional)
        if not {"--help", "-h"}.isdisjoint(sys.argv):
            print(describe_command(config_name))
            return
        if config_name == "train" and not is_child():  # whose arguments are expanded
            sys.argv[1:] = expand(sys.argv[1:])
        main()
    except Exception as error:
        if _asked_full_error == "1":
            raise
        _leave(explain(error, config_name))
    finally:
        if _is_refused:
            _remove_folders()


def read_env(path: Path) -> None:
    """Set the environment variables of a file, a ``NAME=value`` a line; those that are set already stay."""
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and name.strip().isidentifier():
            quoted = re.match(r"""\s*(["'])(.*)\1\s*(#.*)?$""", value)
            plain = re.split(r"(?:^|\s)#", value)[0].strip()
            os.environ.setdefault(name.strip(), quoted[2] if quoted else plain)


def run_function(function: Callable[[DictConfig], Any], config_name: str, **settings: Any) -> None:
    """Run a command that is a function of its config; the libraries are imported, and its errors printed in short.

    Args:
        function: The command.
        config_name: Its root in ``conf/``.
        settings: Further arguments of ``run``.
    """

    @wraps(function)  # Hydra names the command after the function's file
    def main(cfg: DictConfig) -> None:
        with short_errors(cfg):
            load_libraries()
            function(cfg)

    run(hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(main), config_name, **settings)


def arrange(arguments: Sequence[str], config_name: str, positional: str = "") -> list[str]:
    """Arguments as Hydra wants them: flags first, then overrides; ``--key=value`` is ``key=value``.

    Args:
        arguments: Those of the command line, in any order.
        config_name: The command's root in ``conf/``.
        positional: The key that words without one belong to, files that exist among them.

    Raises:
        ConfigError: If a setting is written as a flag.
    """
    flags, overrides, files = [], [], []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        is_flag = any(flag == name or (name[:2] == "--" and flag.startswith(name)) for flag in FLAGS + FLAGS_OF_TWO)
        if name.startswith("--") and equals and not is_flag:  # as agents of sweeps elsewhere write settings
            word, name = word[2:], name[2:]
        if word.startswith("-"):
            if not is_flag:
                value = next(words, "<value>")
                key = nearest_key(name.lstrip("-").replace("-", "_"), config_name) or "key"
                raise ConfigError(f"{name}: settings are written key=value, as in {key}={value}")
            flags.append(word)
            if "=" not in word and name in FLAGS_OF_TWO:
                flags.extend([next(words, "")])
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
    return "\n".join([lines[0].strip("# "), *own, "", *options, "", "--cfg job: all settings; -m: several values"])


def _remove_folders() -> None:
    """Remove the folder of a run that never began, and those that were made for it; not one with a checkpoint."""
    if _made and not list(_made[0].rglob("*.ckpt")):
        shutil.rmtree(_made[0])
        with suppress(OSError):  # another run is in there by now
            for folder in _made[1:]:
                folder.rmdir()


def _leave(message: str) -> NoReturn:
    """End with 1; the message, which is the same for all processes of a run, comes from the first one of a host."""
    if not is_first_of_host():
        time.sleep(GRACE)  # torchrun ends all with the first that goes, and the one that speaks shall get to it
    sys.exit(message if is_first_of_host() else 1)


@cache
def load_libraries() -> None:
    """Import torch and Lightning, and set up this process to compute fast; the numbers stay the same.

    For commands, once their config is known to be good. A library must not do this: the settings are the process's.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, 1_000_000)  # of a million objects most stay: looking through all is in vain
    import pytorch_lightning  # noqa: F401
    import torch

    gc.set_threshold(young, middle, old)
    if not gc.get_freeze_count():  # in a sweep once: a later job would freeze the configs of those before it for good
        gc.freeze()  # nor need later collections look through them
        atexit.register(gc.unfreeze)  # else bindings that are freed too late complain on the console
    if not torch.cuda.is_available():
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # else every optimizer step looks for the driver: 0.1 ms
    if sys.platform == "linux":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have glibc keep what a training step frees for the next one.

    It would give most of it back to the system, which has to clear each page before the next step gets it: on a CPU
    that can take a third of the step. Blocks of 32 MB and more still go back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc takes
        mallopt(M_TRIM_THRESHOLD, 256 * 2**20)


def user_environment() -> dict[str, str]:
    """The environment as the user has set it."""
    return {**os.environ, FULL_ERROR: _asked_full_error}


def in_sweep() -> bool:
    """Whether this is a job of a sweep, in the sweep's process or in one of its own."""
    return HydraConfig.get().mode == RunMode.MULTIRUN or SWEEP_PARENT in os.environ


@contextmanager
def short_errors(cfg: DictConfig) -> Iterator[None]:
    """Within a job: log an error in short, its trace to the log file alone, and end with exit status 1.

    In a sweep the error is written to ``error.txt`` too. Each job is checked here, since ``Preflight`` checks
    single runs only.
    """
    global _is_refused
    message = ""
    try:
        if in_sweep():
            if torch := sys.modules.get("torch"):
                torch._C._jit_clear_class_registry()  # else TensorBoard's graphs stay (pytorch#35600): 1 MB a job
            gc.collect()  # the previous job's data: Lightning's objects point at each other
            _require_own_process(cfg)
            _check(cfg, HydraConfig.get())
        yield
    except Exception as error:
        if _asked_full_error == "1" and not in_sweep():
            raise
        logging.raiseExceptions = False  # a log that cannot be written, on a full disk, must not hide the error
        log.log(logging.ERROR if _asked_full_error == "1" else logging.DEBUG, "stack trace:", exc_info=error)
        message = explain(error, cfg=cfg)
        _is_refused = is_refusal(error, cfg) and not in_sweep()
        if is_child():  # of what has befallen its parent too, that one tells, and takes this process along
            time.sleep(GRACE)
        log.error(f"[{get_name()}] {message}" if get_name() else message)
    finally:
        if not _is_refused:
            with suppress(Exception):  # of a config that cannot be resolved, say; the error itself is told
                remember(cfg, _memory(cfg))
    if message and in_sweep():
        with (Path(cfg.output_dir) / "error.txt").open(
            "a", encoding="utf-8"
        ) as file:  # the first process to tell has the cause
            file.write(f"{message}\n")
    if message and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise JobError(message)
    if message:
        sys.exit(1)


def continue_if_requeued(cfg: DictConfig) -> None:
    """Where Slurm has started this job once more, resume from the last checkpoint in its folder."""
    if not is_requeued():
        return
    folder = Path(cfg.output_dir)
    for path in [folder / "error.txt", *folder.glob("events.*.hparams")]:  # a rank may have seen the others go
        path.unlink(missing_ok=True)
    if checkpoint := find_checkpoint(folder):
        cfg.ckpt_path = str(checkpoint)


class Preflight(Callback):
    """Hydra's callback ahead of a run: rejects a bad config before its folder is made, then claims the folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Trust what the sweep's config names: its winner is tested."""
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        _admit(OmegaConf.to_container(own), config.hydra)
        recall(_memory(config))

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the config and claim ``hydra.run.dir``; ends the command where that fails."""
        os.environ[FULL_ERROR] = _asked_full_error  # composed: what the run starts must see what the user has set
        try:
            job = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            job.output_dir = config.hydra.run.dir
            if SWEEP_PARENT not in os.environ:
                _refuse_sweep(config)
                _refuse_output_dir(config)
                _check(job, config.hydra)
                config.merge_with(OmegaConf.masked_copy(job, [key for key in ("ckpt_path",) if key in job]))
            folder = Path(config.hydra.run.dir)
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            if any(override.startswith("hydra.run.dir=") for override in config.hydra.overrides.hydra):
                folder.mkdir(parents=True, exist_ok=True)  # named by the user, it may be there: another rank's, say
            elif is_started_from_outside():
                raise ConfigError(
                    "hydra.run.dir: several processes were started for this run, which cannot agree on a folder; name "
                    "one that all of them see, as in hydra.run.dir=logs/train/<name>"
                )
            else:
                config.hydra.run.dir = str(claim(folder))
                missing = [Path(config.hydra.run.dir), *(path for path in missing if path != folder)]
                if "resume" in config:  # no run of the other commands is resumed
                    write_status(Path(config.hydra.run.dir), "queued", describe_start(config.hydra))
            if missing[:1] == [Path(config.hydra.run.dir)]:
                _made[:] = missing
        except Exception as error:  # Hydra turns an Exception in a callback into a warning
            if os.environ.get(FULL_ERROR) == "1":
                traceback.print_exc()
            _leave(explain(error))


def _check(cfg: DictConfig, hydra: Any) -> None:
    """Check a command's config and the checkpoint that it names; that of a run's or sweep's folder is looked up."""
    overrides: Any = OmegaConf.to_container(hydra.overrides.task)  # they may have interpolations
    added = [override.lstrip("+").partition("=")[0].partition(".")[0] for override in overrides]
    check(cfg, declared=[*hydra.runtime.choices, *added])
    if _check_more:
        _check_more(cfg)
    if cfg.get("ckpt_path"):
        if Path(cfg.ckpt_path).is_dir():
            cfg.ckpt_path = str(find_best(Path(cfg.ckpt_path)))
        check_checkpoint(cfg.ckpt_path)
    elif "ckpt_path" in cfg and "seed" not in cfg:  # all commands but training need one
        choose_newest(Path(cfg.root_dir) / "logs")
    if "trainer" in cfg and hydra.mode == RunMode.RUN and SWEEP_PARENT not in os.environ and not get_name():
        print(describe_place(cfg), flush=True)  # the next seconds bring nothing to see
    load_libraries()
    check_values(cfg)
    recall(_memory(cfg))
    _admit(cfg, hydra)


def describe_place(cfg: DictConfig) -> str:
    """Where a training writes and what it computes on, as far as that is known without torch."""
    from src.engine.runs.report import shown  # here: most configs that are rejected need no tables

    device = str(cfg.trainer.get("accelerator", "auto"))
    if device == "auto" and sys.platform == "linux" and not Path("/dev/nvidiactl").exists():
        device = "cpu"
    if device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        device += f", {os.environ.get('OMP_NUM_THREADS') or cores} threads"
    return f"run {shown(cfg.output_dir)} · {device} · loading torch"


def _admit(cfg: Any, hydra: Any) -> None:
    """Let checkpoints build what the user's own config names, in folders of theirs too."""
    admit(cfg)
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            admit(Path(source.path))


def _memory(cfg: DictConfig) -> Path:
    return Path(cfg.root_dir) / "logs" / ".places"


def _require_own_process(cfg: DictConfig) -> None:
    """A job that starts processes has them repeat the command of its own, which must be that of a run.

    Within the sweep's process it would be the whole sweep's; with Ray and the like, their worker's. On Slurm it is srun
    that starts the processes.
    """
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.RUN or hydra.launcher._target_ == SLURM_LAUNCHER:
        return
    num_nodes = OmegaConf.select(cfg, "trainer.num_nodes", default=1)
    if num_nodes != 1:
        raise ConfigError(f"trainer.num_nodes={num_nodes}: in a sweep this needs hydra/launcher=submitit_slurm")
    key = "trainer.devices" if "trainer" in cfg else "accelerator.devices"
    devices = OmegaConf.select(cfg, key, default=1)
    if devices != 1 and not (isinstance(devices, ListConfig) and len(devices) == 1):
        raise ConfigError(f"{key}={devices}: in a sweep this needs hydra/launcher=one_process")


def _refuse_sweep(config: DictConfig) -> None:
    option = config.hydra.runtime.choices.get("sweep")
    if option and REPRODUCES not in os.environ:
        raise ConfigError(f"sweep={option}: a sweep needs -m: python -m src.train -m sweep={option}")


def _refuse_output_dir(config: DictConfig) -> None:
    """The log would lie in another folder than the rest."""
    written = config._get_node("output_dir")
    if not isinstance(written, Node) or written._value() != "${hydra:runtime.output_dir}":
        raise ConfigError("output_dir: follows hydra.run.dir; set hydra.run.dir=<folder> instead")


def claim(folder: Path) -> Path:
    """Make a folder that no other run has, even one started in the same second: name, name_2, name_3..."""
    for number in range(1, 1000):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise FileExistsError(f"{folder} and 999 more are taken")
