"""``hydra/launcher=submitit_slurm``: each job of a sweep a job of Slurm, all of them one array."""

import logging
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.search_path_plugin import SearchPathPlugin

from src.engine.errors import ConfigError
from src.engine.sweeps.launcher import JobLauncher

INTERVAL = 5.0  # seconds between two questions to Slurm's controller
PATIENCE = 15.0  # seconds that a shared file system may take to show what a job has written

log = logging.getLogger(__name__)


class SlurmOption(SearchPathPlugin):
    """Makes our launcher the package's option, where that is installed.

    Hydra asks search path plugins once it has imported all the others. A file in ``conf/`` cannot do it: Hydra warns of
    one that is called as a plugin's option.
    """

    def manipulate_search_path(self, search_path: Any) -> None:
        """Register ``hydra/launcher=submitit_slurm`` with the package's settings."""
        with suppress(ImportError):
            from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

            node = SlurmQueueConf(_target_=f"{__name__}.{SlurmLauncher.__name__}")
            ConfigStore.instance().store(group="hydra/launcher", name="submitit_slurm", node=node)


class SlurmLauncher(JobLauncher):
    """Submits the jobs of hydra-submitit-launcher, and sees to their ends better than that package does.

    There, a job that Slurm kills (out of time or memory, a dead node, ``scancel``) ends the sweep or, on a cluster
    without accounting, is waited for until the end of time; and a sweep that is stopped leaves its jobs running.
    Here such a job is a failed one while the others go on, and a sweep that is stopped cancels its jobs.

    Args:
        params: The package's settings: ``timeout_min``, ``partition`` and so on.
    """

    def __init__(self, **params: Any) -> None:
        self.params = params

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Make the package's launcher: it is what runs in the jobs.

        Raises:
            ConfigError: If there is no Slurm; here, since Hydra would wrap what ``__init__`` raises.
        """
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as Submitit

        if not shutil.which("sbatch"):
            raise ConfigError(
                "hydra/launcher=submitit_slurm: no sbatch on the PATH; start the sweep on a machine of the cluster"
            )
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.submitit = Submitit(**self.params)
        self.submitit.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Submit jobs, and wait for all of them.

        Args:
            job_overrides: The overrides of each job.
            initial_job_idx: The first one's number.

        Returns:
            Completed or failed, in the order of the jobs.
        """
        jobs = self._submit(job_overrides, initial_job_idx)
        names = [job.job_id for job in jobs]
        log.info(f"Slurm jobs: {', '.join(names)}")
        ended: dict[str, JobReturn] = {}
        left: dict[str, float] = {}  # when jobs were found to have left the queue
        try:
            while len(ended) < len(jobs):
                time.sleep(INTERVAL)
                queued, now = _queued(names), time.monotonic()
                for job, overrides in zip(jobs, job_overrides, strict=True):
                    if job.job_id not in queued and job.job_id not in ended:
                        is_silent = not job.task(0).paths.result_pickle.exists()
                        if not is_silent or now > left.setdefault(job.job_id, now) + PATIENCE:
                            ended[job.job_id] = self._end(job, overrides)
        except BaseException:
            log.info("cancelling the Slurm jobs, and waiting for their ends; Ctrl-C leaves at once")
            subprocess.run(["scancel", *names], start_new_session=True, check=False)  # Ctrl-C does not reach it
            while _queued(names):
                time.sleep(1)
            raise
        return [ended[name] for name in names]

    def _submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        settings = dict(self.submitit.params)
        folder, num_timeouts = settings.pop("submitit_folder"), settings.pop("max_num_timeout")
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=num_timeouts)
        general = BaseQueueConf.__dataclass_fields__  # not of Slurm alone: submitit wants them without the prefix
        executor.update_parameters(**{key if key in general else f"slurm_{key}": settings[key] for key in settings})
        arguments = [
            (list(overrides), "hydra.sweep.dir", number, str(number), Singleton.get_state())
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        jobs: list[Any] = executor.map_array(self.submitit, *zip(*arguments, strict=True))
        return jobs

    def _end(self, job: Any, overrides: Sequence[str]) -> JobReturn:
        """What a job's first process has returned; where it could not, a failure."""
        paths = job.task(0).paths
        reason = ""
        if not paths.result_pickle.exists() or job.task(0).exception():
            reason = f"Slurm job {job.job_id} ended without a result ({_state(job.job_id)}); see {paths.stderr}"
        elif job.task(0).result().status == JobStatus.FAILED:
            reason = "failed"  # as it has noted itself
        return self.end(self.compose(overrides), overrides, reason)


def _queued(names: Sequence[str]) -> set[str]:
    """Those of some jobs that wait, run or are to be requeued; all of them as long as Slurm does not answer."""
    squeue = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    answer = subprocess.run(squeue, stdout=subprocess.PIPE, text=True, check=False)
    return set(names) if answer.returncode else set(names) & set(answer.stdout.split())


def _state(name: str) -> str:
    """What Slurm calls a job's end, as in TIMEOUT, OUT_OF_MEMORY, CANCELLED."""
    answer = subprocess.run(["scontrol", "show", "job", name], capture_output=True, text=True, check=False)
    return "".join(re.findall(r"JobState=(\S+)", answer.stdout)) or "it has forgotten why"
