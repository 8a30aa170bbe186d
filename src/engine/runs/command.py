"""What surrounds every command: its words are arranged, its config is checked, its errors are printed in short."""

import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from src.engine.runs import processes
from src.engine.runs.checkpoints import find_checkpoint
from src.engine.runs.command_line import arrange, describe_command, read_env
from src.engine.runs.preflight import FULL_ERROR, check_job, leave, memory_of, remove_folders, require_own_process, this
from src.engine.runs.resume import expand
from src.engine.settings.check import CONF, ROOT
from src.engine.settings.explain import explain, is_refusal
from src.engine.settings.trust import remember

log = logging.getLogger(__name__)

QUIET = (
    ".*LeafSpec.* is deprecated",  # Lightning 2.6 calls what torch 2.15 has deprecated
    "Checkpoint directory .* exists and is not empty",  # a run that resumes in its folder
    "Experiment logs directory .* exists and is not empty",  # nothing is deleted: a resumed run's rows are kept
    "Precision .* is not supported by the model summary",  # it says the weights' size as of 32 bits, which they have
    "The dirpath has changed",  # a run that resumes in a new folder has its best checkpoint there
    "Be aware that when using `ckpt_path`",  # a run that resumes with other callbacks: its config differs, you are told
    "You're resuming from a checkpoint that ended before the epoch ended",  # LastCheckpoint says it, with numbers
    "Attribute '.*' is an instance of `nn.Module`",  # a hyper-parameter; a checkpoint holds the net once all the same
    "Using `DistributedSampler` with the dataloaders",  # no sample counts twice, or you are told how many
    "The `srun` command is available on your system but is not used",  # at every start outside of a job
)


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
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    os.environ.setdefault("PROJECT_ROOT", str(ROOT))
    try:
        read_env(Path(os.environ["PROJECT_ROOT"], ".env"))
        this.check, this.full_error = check, os.environ.get(FULL_ERROR, "")
        os.environ[FULL_ERROR] = "1"  # Hydra then raises what it would print over many lines
        processes.exit_on_signals()
        processes.end_with_parent()
        sys.argv[1:] = arrange(sys.argv[1:], config_name, positional)
        if not {"--help", "-h"}.isdisjoint(sys.argv):
            print(describe_command(config_name))
            return
        if config_name == "train" and not processes.is_child():  # whose arguments are expanded
            sys.argv[1:] = expand(sys.argv[1:])
        main()
    except Exception as error:
        if this.full_error == "1":
            raise
        leave(explain(error, config_name))
    finally:
        if this.is_refused:
            remove_folders()


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
            function(cfg)

    run(hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(main), config_name, **settings)


def user_environment() -> dict[str, str]:
    """The environment as the user has set it."""
    return {**os.environ, FULL_ERROR: this.full_error}


def in_sweep() -> bool:
    """Whether this is a job of a sweep, in the sweep's process or in one of its own."""
    return HydraConfig.get().mode == RunMode.MULTIRUN or processes.SWEEP_PARENT in os.environ


@contextmanager
def short_errors(cfg: DictConfig) -> Iterator[None]:
    """Within a job: log an error in short, its trace only to the log file, and end with exit status 1.

    In a sweep the error is written to ``error.txt`` too. Each job is checked here, since ``Preflight`` checks
    single runs only.
    """
    is_job = in_sweep()
    try:
        if is_job:
            if torch := sys.modules.get("torch"):
                torch._C._jit_clear_class_registry()  # else TensorBoard's graphs stay (pytorch#35600): 1 MB a job
            gc.collect()  # the previous job's data: Lightning's objects point at each other
            require_own_process(cfg)
            check_job(cfg, HydraConfig.get())
        yield
    except Exception as error:
        if this.full_error == "1" and not is_job:
            raise
        logging.raiseExceptions = False  # a log that cannot be written, on a full disk, must not hide the error
        log.log(logging.ERROR if this.full_error == "1" else logging.DEBUG, "stack trace:", exc_info=error)
        message = explain(error, cfg=cfg)
        this.is_refused = is_refusal(error, cfg) and not is_job
        if processes.is_child():  # of what has befallen its parent too, that one tells, and takes this process along
            time.sleep(processes.GRACE)
        name = processes.get_name()
        log.error(f"[{name}] {message}" if name else message)
    else:
        return
    finally:
        if not this.is_refused:
            with suppress(Exception):  # of a config that cannot be resolved, say; the error itself is told
                remember(cfg, memory_of(cfg))
    if is_job:
        with Path(cfg.output_dir, "error.txt").open("a", encoding="utf-8") as file:  # the first to tell has the cause
            file.write(f"{message}\n")
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise JobError(message)
    sys.exit(1)


def continue_if_requeued(cfg: DictConfig) -> None:
    """Where Slurm or torchrun has started this run once more, resume from the last checkpoint in its folder."""
    if not processes.is_requeued():
        return
    folder = Path(cfg.output_dir)
    for path in [folder / "error.txt", *folder.glob("events.*.hparams")]:  # a rank may have seen the others go
        path.unlink(missing_ok=True)
    if checkpoint := find_checkpoint(folder):
        cfg.ckpt_path = str(checkpoint)
