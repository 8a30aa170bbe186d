"""``hydra/launcher=process hydra.launcher.n_jobs=4``: each job of a sweep a process of its own, several at a time."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence, Sized
from contextlib import suppress
from typing import Any

from hydra.core.utils import JobReturn
from omegaconf import DictConfig, ListConfig, OmegaConf

from src.engine.runs.command import user_environment
from src.engine.runs.processes import SWEEP_PARENT
from src.engine.runs.resume import quoted
from src.engine.sweeps.launcher import JobLauncher, job_folder, require_count

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
# What a job's process does not get of the sweep's overrides of Hydra.
SWEEPS = ("hydra.mode", "hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper")


class ProcessLauncher(JobLauncher):
    """Runs each job as a fresh ``python -m src.train`` in one of several slots.

    A job is alone in its process: what it breaks ends with it. A slot has its share of the CPU cores and of the GPUs;
    where there are more slots than GPUs, several use the same one. What a job prints goes to ``console.log`` in its
    folder.

    Args:
        n_jobs: Number of slots.
    """

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keep what ``launch`` needs.

        Raises:
            ConfigError: If there cannot be so many slots.
        """
        require_count("hydra.launcher.n_jobs", self.n_jobs)
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Iterable[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run jobs; the next one is taken from ``job_overrides`` when a slot is free.

        Args:
            job_overrides: The overrides of each job.
            initial_job_idx: The first one's number.

        Returns:
            Completed or failed, in the order of their ends.
        """
        num_slots = min(self.n_jobs, len(job_overrides)) if isinstance(job_overrides, Sized) else self.n_jobs
        self.num_slots = num_slots
        free = [_environment(slot, num_slots, gpus) for gpus in [_visible_gpus()] for slot in range(num_slots)]
        waiting = enumerate(job_overrides, initial_job_idx)
        running: list[_Process] = []
        returns: list[JobReturn] = []
        try:
            while True:
                while free and (job := next(waiting, None)):
                    running.append(self._start(*job, env=free.pop(0)))
                if not running:
                    return returns
                time.sleep(0.05)
                for process in [process for process in running if process.has_ended()]:
                    running.remove(process)
                    free.append(process.env)
                    returns.append(self.end(process.job, process.command, process.reason()))
        finally:
            _stop(running)

    def _start(self, number: int, overrides: Sequence[str], env: dict[str, str]) -> "_Process":
        job = self.compose(overrides)
        command = [
            *_command(), "--config-name", job.hydra.job.config_name,
            *[f"--config-dir={s.path}" for s in job.hydra.runtime.config_sources if s.provider == "command-line"],
            *job.hydra.overrides.task,
            *[override for override in job.hydra.overrides.hydra if not override.startswith(SWEEPS)],
            "hydra.mode=RUN", f"hydra.run.dir={quoted(job_folder(job))}", f"hydra.job.num={number}",
        ]  # fmt: skip
        return _Process(command, job, env, _threads(job, self.num_slots))


class _Process:
    """A job's process, the head of a group and session of its own: signals to the sweep's terminal do not reach it."""

    def __init__(self, command: list[str], job: DictConfig, env: dict[str, str], threads: dict[str, str]) -> None:
        self.command = command
        self.job = job
        self.env = env
        self._console = job_folder(job) / "console.log"
        self._console.parent.mkdir(parents=True, exist_ok=True)
        with self._console.open("ab") as console:
            self._popen = subprocess.Popen(
                command, env={**threads, **env}, stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                start_new_session=True,
            )  # fmt: skip

    def has_ended(self) -> bool:
        """Whether the process has ended; what it has started and left is then killed."""
        if self._popen.poll() is None:
            return False
        self.signal(signal.SIGKILL)
        return True

    def signal(self, signum: int) -> None:
        """Send a signal to the process and all that it has started."""
        with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group that has ended
            os.killpg(self._popen.pid, signum)

    def reason(self) -> str:
        """Why it failed, as far as can be told from outside; empty where it did not."""
        status = self._popen.returncode
        if not status:
            return ""
        if status < 0:
            return f"killed by {signal.Signals(-status).name}" + (
                "; out of memory?" if -status == signal.SIGKILL else ""
            )
        lines = self._console.read_text(errors="replace").strip().splitlines() or ["no output"]
        return f"exit status {status}: {lines[-1].removeprefix('error: ')}"


def _stop(processes: Sequence[_Process]) -> None:
    """End processes with all that they have started: SIGTERM, and SIGKILL after a while or at a second Ctrl-C."""
    try:
        for process in processes:
            process.signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and not all(process.has_ended() for process in processes):
            time.sleep(0.05)
    finally:
        for process in processes:
            process.signal(signal.SIGKILL)


def _command() -> list[str]:
    """How this process was started: ``python -m src.train``, say."""
    spec = sys.modules["__main__"].__spec__
    return [sys.executable, *(["-m", spec.name] if spec else [sys.argv[0]])]


def _environment(slot: int, num_slots: int, gpus: Sequence[str]) -> dict[str, str]:
    """A slot's environment: the user's, and its GPUs."""
    env = {**user_environment(), SWEEP_PARENT: str(os.getpid())}
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot::num_slots] or [gpus[slot % len(gpus)]])
    return env


def _threads(job: Any, num_slots: int) -> dict[str, str]:
    """The threads of each of a job's processes; one slot has all cores, which Lightning divides by itself."""
    if num_slots == 1:
        return {}
    devices = OmegaConf.select(job, "trainer.devices", default=1)
    num_processes = len(devices) if isinstance(devices, ListConfig) else devices if isinstance(devices, int) else 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(max(1, cores // (num_slots * max(1, num_processes))))
    )


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        visible = "" if answer.returncode else ",".join(answer.stdout.split())  # it says on stdout why it has failed
    return [gpu.strip() for gpu in (visible or "").split(",") if gpu.strip()]
