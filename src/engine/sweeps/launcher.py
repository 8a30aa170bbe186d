"""What this project's launchers share: a job's config and folder, and what is made of its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from src.engine.errors import ConfigError
from src.engine.runs.status import read_status


def require_count(key: str, value: Any) -> None:
    """Reject what is not a whole number of 1 or more.

    Raises:
        ConfigError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}={value}: expected a whole number of 1 or more")


def job_folder(job: DictConfig) -> Path:
    """The folder of a sweep's job, by its config."""
    return Path(job.hydra.sweep.dir, job.hydra.sweep.subdir)


class JobLauncher(Launcher):
    """A launcher that starts each job elsewhere, and hears of its end from outside."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Keep what ``launch`` needs. Settings are checked here: Hydra would wrap what ``__init__`` raises."""
        self.hydra_context = hydra_context
        self.config = config

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """A job's config."""
        job: DictConfig = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        return job

    def end(self, job: DictConfig, overrides: Sequence[str], reason: str = "") -> JobReturn:
        """Tell Hydra's callbacks of a job's end, and note a failure that the job could not note itself.

        A job that was stopped and could save has not failed: the same command resumes it.

        Args:
            job: Its config.
            overrides: How it was started.
            reason: Why it failed, as far as can be told from outside; empty where it did not.
        """
        folder = job_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        returned = JobReturn(overrides=overrides, status=JobStatus.FAILED if reason else JobStatus.COMPLETED)
        if reason:
            error = folder / "error.txt"
            if not error.exists() and read_status(folder).get("state") != "interrupted":
                error.write_text(f"error: {reason}\n", encoding="utf-8")
            returned.return_value = RuntimeError(reason)
        self.hydra_context.callbacks.on_job_end(config=job, job_return=returned)
        return returned
