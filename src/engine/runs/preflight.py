"""What happens ahead of a command's work: its config is checked, the libraries are loaded, its folder is claimed."""

import atexit
import ctypes
import gc
import os
import shutil
import sys
import time
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from src.engine.errors import ConfigError
from src.engine.runs.checkpoints import check_checkpoint, choose_newest, find_best
from src.engine.runs.processes import GRACE, SWEEP_PARENT, get_name, is_first_of_host, is_started_from_outside
from src.engine.runs.report import shown
from src.engine.runs.status import CLOCK, REPRODUCES, describe_start, write_status
from src.engine.settings.check import check, check_values
from src.engine.settings.explain import explain
from src.engine.settings.trust import admit, recall

FULL_ERROR = "HYDRA_FULL_ERROR"
SLURM_LAUNCHER = "hydra_plugins.slurm_launcher.SlurmLauncher"  # as its option in Hydra's config has it
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


# What this process knows of its command: Hydra calls its parts one by one, and hands nothing from one to the next.
# full_error: what the user has set HYDRA_FULL_ERROR to. check: the command's own check of its config. made: the run's
# folder and those around it, as far as they were not there. is_refused: whether the user can mend what ended the run.
this = SimpleNamespace(full_error="", check=None, made=[], is_refused=False)


class Preflight(Callback):
    """Hydra's callback ahead of a run: rejects a bad config before its folder is made, then claims the folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Trust what the sweep's config names: its winner is tested."""
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        _trust(OmegaConf.to_container(own), config, config.hydra)  # some interpolations are for a job to resolve

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the config and claim ``hydra.run.dir``; ends the command where that fails."""
        os.environ[FULL_ERROR] = this.full_error  # composed: what the run starts must see what the user has set
        try:
            if SWEEP_PARENT not in os.environ:
                _check_run(config)
            _claim_folder(config)
        except Exception as error:  # Hydra turns an Exception in a callback into a warning
            if this.full_error == "1":
                traceback.print_exc()
            leave(explain(error))


def _check_run(config: DictConfig) -> None:
    """Check the config of a single run, with Hydra's node."""
    option = config.hydra.runtime.choices.get("sweep")
    if option and REPRODUCES not in os.environ:
        raise ConfigError(f"sweep={option}: a sweep needs -m: python -m src.train -m sweep={option}")
    written: Any = OmegaConf.to_container(config)
    if written.get("output_dir") != "${hydra:runtime.output_dir}":  # the log would lie in another folder than the rest
        raise ConfigError("output_dir: follows hydra.run.dir; set hydra.run.dir=<folder> instead")
    job = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    job.output_dir = config.hydra.run.dir
    check_job(job, config.hydra)
    if "ckpt_path" in job:
        config.ckpt_path = job.ckpt_path


def check_job(cfg: DictConfig, hydra: Any) -> None:
    """Check a command's config and the checkpoint that it names; that of a run's or sweep's folder is looked up."""
    overrides: Any = OmegaConf.to_container(hydra.overrides.task)  # they may have interpolations
    added = [override.lstrip("+").partition("=")[0].partition(".")[0] for override in overrides]
    check(cfg, declared=[*hydra.runtime.choices, *added])
    if this.check:
        this.check(cfg)
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
    _trust(cfg, cfg, hydra)


def describe_place(cfg: DictConfig) -> str:
    """Where a training writes and what it computes on, as far as that is known without torch."""
    device = str(cfg.trainer.get("accelerator", "auto"))
    if device == "auto" and sys.platform == "linux" and not Path("/dev/nvidiactl").exists():
        device = "cpu"
    if device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = os.environ.get("OMP_NUM_THREADS") or str(cores)
        device += f", {threads} thread{'' if threads == '1' else 's'}"
    return f"run {shown(cfg.output_dir)} · {device} · loading torch"


def _trust(named: Any, cfg: DictConfig, hydra: Any) -> None:
    """Let checkpoints build what the user's own config names, in the folders of now and before."""
    recall(memory_of(cfg))
    admit(named)
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            admit(Path(source.path))


def memory_of(cfg: DictConfig) -> Path:
    """The file that keeps which folders the user's runs have named."""
    return Path(cfg.root_dir) / "logs" / ".places"


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
    # Have glibc keep what a training step frees for the next one. It would give most of it back to the system, which
    # has to clear each page before the next step gets it: on a CPU, up to a third of the step. Larger blocks go back.
    # Other C libraries than glibc have no mallopt.
    if mallopt := sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc takes
        mallopt(M_TRIM_THRESHOLD, 256 * 2**20)


def _claim_folder(config: DictConfig) -> None:
    """Make ``hydra.run.dir``, and note which folders were not there before."""
    folder = Path(config.hydra.run.dir)
    around = [path for path in folder.parents if not path.exists()]
    if any(override.startswith("hydra.run.dir=") for override in config.hydra.overrides.hydra):
        is_made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)  # named by the user, it may be there: another rank's, say
    elif is_started_from_outside():
        raise ConfigError("hydra.run.dir: several processes cannot agree on a folder; name one that all of them see")
    else:
        is_made, folder = True, claim(folder)
        config.hydra.run.dir = str(folder)
        if "resume" in config:  # no run of the other commands is resumed
            write_status(folder, "queued", describe_start(config.hydra))
    this.made = [folder, *around] if is_made else []


def claim(folder: Path) -> Path:
    """Make a folder that no other run has, even one started in the same second: name, name_2, name_3..."""
    for number in range(1, 1000):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        with suppress(FileExistsError):
            candidate.mkdir(parents=True)
            return candidate
    raise FileExistsError(f"{folder} and 999 more are taken")


def remove_folders() -> None:
    """Remove the folder of a run that never began, and those that were made for it; not one that has results."""
    if this.made and not any(
        path.suffix == ".ckpt" or path.name == "predictions.csv" for path in this.made[0].rglob("*")
    ):
        shutil.rmtree(this.made[0])
        with suppress(OSError):  # another run is in there by now
            for folder in this.made[1:]:
                if [path.name for path in folder.iterdir()] == [CLOCK]:
                    (folder / CLOCK).unlink()
                folder.rmdir()


def require_own_process(cfg: DictConfig) -> None:
    """A job that starts processes has them repeat the command of its own, which must be that of a run.

    Within the sweep's process it would be the whole sweep's; with Ray and the like, their worker's. On Slurm it is srun
    that starts the processes.

    Raises:
        ConfigError: If it starts some within the sweep's process.
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


def leave(message: str) -> NoReturn:
    """End with 1; the message, which is the same for all processes of a run, comes from the first one of a host."""
    if not is_first_of_host():
        time.sleep(GRACE)  # torchrun ends all with the first that goes, and the one that speaks must get to it
    sys.exit(message if is_first_of_host() else 1)
