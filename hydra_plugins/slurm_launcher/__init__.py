"""``hydra/launcher=submitit_slurm``: each job of a sweep a job of Slurm, together in arrays."""

import logging
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import make_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.search_path_plugin import SearchPathPlugin

from src.engine.errors import ConfigError
from src.engine.runs.processes import exit_on_signals
from src.engine.sweeps.folder import SweepFolder
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
        """Register ``hydra/launcher=submitit_slurm`` with the package's settings and ours."""
        with suppress(ImportError):
            from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

            ours = [("name", str, ""), ("wait", bool, True)]
            node = make_dataclass("SlurmConf", ours, bases=(SlurmQueueConf,))
            target = f"{__name__}.{SlurmLauncher.__name__}"
            ConfigStore.instance().store(group="hydra/launcher", name="submitit_slurm", node=node(_target_=target))


class SlurmLauncher(JobLauncher):
    """Submits the jobs of hydra-submitit-launcher, and sees to their ends better than that package does.

    There, a job that Slurm kills (out of time or memory, a dead node, ``scancel``) ends the sweep or, on a cluster
    without accounting, is waited for until the end of time; and a sweep that is stopped leaves its jobs running.
    Here such a job is a failed one while the others run on, and a sweep that is stopped cancels its jobs. Their numbers
    are in ``sweep.json``: where the command was killed, the same command waits for the jobs that it finds there.

    Args:
        wait: Whether to wait for the jobs' ends; otherwise those are collected that have ended.
        name: The jobs' name in Slurm; empty: that of the sweep's folder.
        params: The package's settings: ``timeout_min``, ``partition`` and so on.
    """

    def __init__(self, wait: bool, name: str, **params: Any) -> None:
        self.wait = wait
        self.name = name
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
        self.n_jobs = config.hydra.sweeper.get("n_jobs", 1)
        self.submitit = Submitit(**self.params)
        self.submitit.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Iterable[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Submit the jobs that Slurm does not have yet, and wait for all of them.

        Args:
            job_overrides: The overrides of each job. Those of a list are submitted at once; of an iterator, a search's,
                ``n_jobs`` are, and the next one whenever one has ended.
            initial_job_idx: The first one's number.

        Returns:
            Completed or failed, in the order of their ends.
        """
        import submitit

        executor = self._make_executor()
        folder = SweepFolder(self.config.hydra.sweep.dir)
        tasks = range(self.params["nodes"] * self.params["tasks_per_node"])
        waiting = enumerate(job_overrides, initial_job_idx)
        room = len(job_overrides) if isinstance(job_overrides, Sized) else self.n_jobs
        by_name: dict[str, tuple[Sequence[str], int]] = {}
        ids: dict[str, str] = {}
        jobs: dict[str, Any] = {}  # that have not ended
        returns: list[JobReturn] = []
        first_seen: dict[str, float] = {}  # when jobs were found to have left the queue
        try:
            while True:
                if new := {_name(job): (job, number) for number, job in islice(waiting, room - len(jobs))}:
                    by_name |= new
                    self._submit(executor, folder, new, ids)
                    jobs |= {name: submitit.SlurmJob(executor.folder, ids[name], tasks).task(0) for name in new}
                if not jobs:
                    return returns
                queued, now = _queued(ids.values()), time.monotonic()
                for name in [name for name in jobs if ids[name] not in queued]:
                    is_silent = not jobs[name].paths.result_pickle.exists()
                    if not is_silent or now > first_seen.setdefault(name, now) + PATIENCE:
                        returns.append(self._end(jobs.pop(name), by_name[name][0]))
                        folder.note_submitted({name: None})
                if not self.wait and all(ids[name] in queued for name in jobs):
                    return returns
                if jobs:
                    time.sleep(INTERVAL)
        except BaseException:
            if ids:
                log.info("cancelling the Slurm jobs, and waiting for their ends; Ctrl-C leaves at once")
                subprocess.run(["scancel", *ids.values()], start_new_session=True, check=False)  # no Ctrl-C reaches it
            while _queued(ids.values()):
                time.sleep(1)
            folder.note_submitted(dict.fromkeys(ids))
            raise

    def _submit(
        self, executor: Any, folder: SweepFolder, jobs: Mapping[str, tuple[Sequence[str], int]], ids: dict[str, str]
    ) -> None:
        """Submit those of some jobs that Slurm does not have yet, as arrays, and add the numbers of all to ``ids``."""
        ids |= {name: job_id for name, job_id in folder.submitted.items() if name in jobs}
        missing, size = [name for name in jobs if name not in ids], _max_array_size()
        num_arrays = -(-len(missing) // size) or 1  # each has its share
        executor.update_parameters(slurm_array_parallelism=max(1, self.params["array_parallelism"] // num_arrays))
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            arguments = [
                (list(job), "hydra.sweep.dir", number, str(number), Singleton.get_state())
                for job, number in map(jobs.__getitem__, part)
            ]
            submitted = executor.map_array(_Job(self.submitit), *zip(*arguments, strict=True))
            ids |= (new := {name: job.job_id for name, job in zip(part, submitted, strict=True)})
            folder.note_submitted(new)
        arrays = dict.fromkeys(ids[name].partition("_")[0] for name in jobs)
        log.info(f"{len(jobs)} jobs in Slurm: {', '.join(arrays)}")

    def _make_executor(self) -> Any:
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        settings = {**self.submitit.params, "name": self.name or Path(self.config.hydra.sweep.dir).name}
        folder, num_timeouts = settings.pop("submitit_folder"), settings.pop("max_num_timeout")
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=num_timeouts)
        general = BaseQueueConf.__dataclass_fields__  # not of Slurm alone: submitit wants them without the prefix
        executor.update_parameters(**{key if key in general else f"slurm_{key}": settings[key] for key in settings})
        return executor

    def _end(self, job: Any, overrides: Sequence[str]) -> JobReturn:
        """What a job's first process has returned; where it could not, a failure."""
        reason = ""
        if not job.paths.result_pickle.exists() or job.exception():
            reason = f"Slurm job {job.job_id} ended without a result ({_state(job.job_id)}); see {job.paths.stderr}"
        elif job.result().status == JobStatus.FAILED:
            reason = "failed"  # as it has noted itself
        return self.end(self.compose(overrides), overrides, reason)


class _Job:
    """What runs in a job: the package's launcher, but a signal of scancel saves and ends, which submitit ignores."""

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher

    def __call__(self, *arguments: Any) -> JobReturn:
        exit_on_signals((signal.SIGTERM,))  # the others are submitit's
        returned: JobReturn = self.launcher(*arguments)
        return returned

    def checkpoint(self, *arguments: Any) -> Any:
        """What submitit queues again when the time is up: the same, which finds its last checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *arguments)


def _name(overrides: Sequence[str]) -> str:
    """The name that a sweep has given to a job's folder; another sweeper's jobs go by their overrides."""
    given = [override for override in overrides if override.startswith("hydra.sweep.subdir=")]
    return str(OverridesParser.create().parse_override(given[-1]).value()) if given else " ".join(overrides)


def _queued(ids: Collection[str]) -> set[str]:
    """Those of some jobs that wait, run or are to be requeued; all of them as long as Slurm does not answer."""
    squeue = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    answer = subprocess.run(squeue, stdout=subprocess.PIPE, text=True, check=False)
    return set(ids) if answer.returncode else set(ids) & set(answer.stdout.split())


def _max_array_size() -> int:
    """The most jobs that this cluster takes as one array."""
    answer = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False)
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer.stdout, re.MULTILINE)
    return max(1, int(found[1])) if found else 1


def _state(job_id: str) -> str:
    """What Slurm calls a job's end, as in TIMEOUT, OUT_OF_MEMORY, CANCELLED."""
    answer = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True, check=False)
    return "".join(re.findall(r"JobState=(\S+)", answer.stdout)) or "it has forgotten why"
