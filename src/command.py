"""What surrounds every command: its config is checked, its folder claimed, its errors said in short."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from src.config import ROOT, check
from src.errors import explain

log = logging.getLogger(__name__)

FULL_ERROR = "HYDRA_FULL_ERROR"
_asked_full_error = ""  # what the user has set it to


def run(main: Callable[[], Any], config_name: str) -> None:
    """Run a command that ``hydra.main`` decorates; errors of composition are said in short, with exit status 1.

    Args:
        main: The decorated function.
        config_name: Its root in ``conf/``, where misspelt keys are looked up.
    """
    global _asked_full_error
    # Lightning 2.6 calls what torch 2.15 has deprecated; nothing that a user could mend.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    os.environ.setdefault("PROJECT_ROOT", str(ROOT))
    _asked_full_error = os.environ.get(FULL_ERROR, "")
    os.environ[FULL_ERROR] = "1"  # Hydra then raises what it would print over many lines
    try:
        main()
    except Exception as error:
        if _asked_full_error == "1":
            raise
        sys.exit(explain(error, config_name))


@contextmanager
def short_errors(cfg: DictConfig) -> Iterator[None]:
    """Within a job: log an error in short, its trace to the log file alone, and end with exit status 1.

    In a sweep the error goes on to the launcher, so that the other jobs run; and each job is checked here, since
    ``Preflight`` sees a single run's config only.
    """
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        if in_sweep:
            check(cfg)
        yield
    except Exception as error:
        if _asked_full_error == "1":
            raise
        logging.raiseExceptions = False  # a log that cannot be written, on a full disk, shall not hide the error
        log.debug("stack trace of the error that follows", exc_info=error)
        log.error(explain(error))
        if in_sweep:
            raise
        sys.exit(1)


class Preflight(Callback):
    """Hydra's callback ahead of a run: rejects a bad config before its folder is made, then claims the folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the config and claim ``hydra.run.dir``; ends the command where that fails."""
        os.environ[FULL_ERROR] = _asked_full_error  # composed: what the run starts shall see what the user has set
        try:
            job = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            job.output_dir = config.hydra.run.dir
            check(job)
            folder = Path(config.hydra.run.dir)
            if any(override.startswith("hydra.run.dir=") for override in config.hydra.overrides.hydra):
                folder.mkdir(parents=True, exist_ok=True)  # named by the user, it may be there: another rank's, say
            else:
                config.hydra.run.dir = str(_claim(folder))
        except Exception as error:  # Hydra turns an Exception in a callback into a warning
            if os.environ.get(FULL_ERROR) == "1":
                traceback.print_exc()
            sys.exit(explain(error))


def _claim(folder: Path) -> Path:
    """Make a folder that no other run has, even one started in the same second: name, name_2, name_3..."""
    for number in range(1, 1000):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise FileExistsError(f"{folder} and 999 more are taken")
