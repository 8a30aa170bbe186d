"""The processes of a run or a sweep: which of them this is, and that none outlives the one that has started it."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

SWEEP_PARENT = "SWEEP_PARENT"  # in the environment of a sweep's job: the process that has started it


def get_rank() -> int:
    """This process's number among those that train one model, by Lightning, torchrun or srun; 0 if it is alone."""
    if is_shared_step():
        return int(os.environ["SLURM_PROCID"])
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def is_shared_step() -> bool:
    """Whether srun has started several processes of this run."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def is_started_from_outside() -> bool:
    """Whether torchrun, srun or a person has started several processes of this run, on several machines perhaps.

    They cannot agree on a folder by themselves, unlike those that Lightning starts, which are told.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ or "NODE_RANK" in os.environ or is_shared_step()


def exit_on_signals() -> None:
    """End with 128 + signal on SIGINT and SIGTERM, where Lightning would end with 1 and with 0."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))


def end_with_parent() -> None:
    """Where another process of ours has started this one, see to it that it ends with that, killed though it be."""
    if "LOCAL_RANK" in os.environ and not is_started_from_outside():  # Lightning's child
        _watch(os.getppid(), os.kill, os.getpid())
    elif SWEEP_PARENT in os.environ:  # the head of a group of its own, which goes with it
        _watch(int(os.environ[SWEEP_PARENT]), os.killpg, 0)


def _watch(parent: int, kill: Callable[[int, int], None], target: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        kill(target, signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
