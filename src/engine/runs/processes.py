"""The processes of a run or a sweep: which of them this is, when they end, and how they find each other."""

import atexit
import ctypes
import logging
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

SWEEP_PARENT = "SWEEP_PARENT"  # in the environment of a sweep's job: the process that has started it
RUN_PARENT = "RUN_PARENT"  # in that of what a run starts: the process of the run
# Windows has the first two only. A terminal that is closed sends SIGHUP, Ctrl-\\ SIGQUIT.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGQUIT")
STOP_SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
SIGNALS = (*STOP_SIGNALS, *(getattr(signal, name) for name in ("SIGUSR2",) if hasattr(signal, name)))  # submitit's, too
SIOCGIFADDR = 0x8915  # Linux's question for an interface's address
GRACE = 10.0  # seconds from a signal to the end of a process that waits for another one
ELSEWHERE = "192.0.2.1"  # an address that no machine has: the way there is the way to the other machines


def get_name() -> str:
    """This process's name among those that train one model, by Lightning, torchrun or srun; empty for the first."""
    if is_shared_step():
        rank = os.environ["SLURM_PROCID"]
    elif os.environ.get("NODE_RANK", "0") != "0":
        return f"node {os.environ['NODE_RANK']}, process {os.environ.get('LOCAL_RANK', 0)}"
    else:
        rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return "" if rank == "0" else f"rank {rank}"


def is_first_of_host() -> bool:
    """Whether this is the first of a run's processes on this machine."""
    return os.environ.get("SLURM_LOCALID" if is_shared_step() else "LOCAL_RANK", "0") == "0"


def is_shared_step() -> bool:
    """Whether srun has started several processes of this run, and not several torchruns, which name theirs anew."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "TORCHELASTIC_RUN_ID" not in os.environ


def is_requeued() -> bool:
    """Whether Slurm has started this job once more, or torchrun its processes."""
    return any(os.environ.get(f"{name}_RESTART_COUNT", "0") != "0" for name in ("SLURM", "TORCHELASTIC"))


def is_started_from_outside() -> bool:
    """Whether torchrun, srun or a person has started several processes of this run, on several machines perhaps.

    They cannot agree on a folder by themselves, unlike those that Lightning starts, which are told.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ or "NODE_RANK" in os.environ or is_shared_step()


def is_child() -> bool:
    """Whether Lightning has started this process beside the run's first one on this machine."""
    return RUN_PARENT in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def exit_on_signals(signals: Iterable[int] = STOP_SIGNALS) -> None:
    """End with 128 + signal on those that stop a run; on SIGINT and SIGTERM, Lightning would end with 1 and with 0.

    Lightning's child leaves it to its parent, which would not get to its own exit status if a child went before. On
    Slurm, SIGUSR1 says that the time is nearly up (``sbatch --signal=USR1@60``): the job is queued again, and so is one
    that is preempted. What nohup, or a script that runs this in the background, has had ignored stays so.
    """
    main = os.getpid()

    def leave(signum: int, frame: FrameType | None) -> None:
        # A terminal signals a loader's workers, too: they end with the main process, which still needs them.
        if is_child() or (os.getpid() != main and signum != signal.SIGTERM):
            return
        _requeue(signum)
        sys.exit(128 + signum)

    for signum in signals:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, leave)


@cache  # once, though a second signal comes
def _requeue(signum: int) -> None:
    """Have Slurm queue this process's job again after SIGUSR1 or a preemption; the first process does it for all.

    A preempted job gets SIGTERM and a time of grace. Slurm takes a job that ends within that time for a failed one.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or get_name():
        return
    with suppress(OSError):  # Slurm's programs may not be at hand
        is_due = signum == getattr(signal, "SIGUSR1", None)
        if signum == signal.SIGTERM:
            show = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False)
            is_due = bool(re.search(r"\bPreemptTime=\d", show.stdout))
        if is_due:
            subprocess.run(["scontrol", "requeue", job], check=False)


def insist_on_signals() -> None:
    """See to it that a signal ends even a process that waits for another one: it gets to no handler.

    A process that is at work gets as long as it needs to save: through a validation, say. It waits where its main
    thread stays within one call of C for the time of grace. The first process is to see that; the others are patient,
    since it may be the first one's save that they wait for.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    last_seen = 0.0  # when the main thread got to a handler

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def note(_: int | None) -> int:
        nonlocal last_seen
        last_seen = time.monotonic()
        return 0

    def insist() -> None:
        while (signum := os.read(told, 1)[0]) not in STOP_SIGNALS:
            pass
        patience = 6 * GRACE if get_name() else GRACE
        asked = -1.0
        while not select.select([told], [], [], 0.1)[0]:  # a second signal ends it at once
            if last_seen >= asked:
                asked = time.monotonic()
                ctypes.pythonapi.Py_AddPendingCall(note, None)  # by the main thread, as it calls handlers
            elif time.monotonic() > asked + patience:
                break
        _requeue(signum)
        os._exit(128 + signum)

    threading.Thread(target=insist, name="insist-on-signals", daemon=True).start()


def end_with_parent() -> None:
    """Where another process of ours has started this one, see to it that it ends with that, killed though it be."""
    if is_child():
        _watch(int(os.environ[RUN_PARENT]), os.kill, os.getpid())
    elif SWEEP_PARENT in os.environ:  # the head of a group of its own, which goes with it
        _watch(int(os.environ[SWEEP_PARENT]), os.killpg, 0)
    if "LOCAL_RANK" not in os.environ:
        os.environ[RUN_PARENT] = str(os.getpid())


def choose_interface(address: str) -> None:
    """Have gloo use the interface that leads to an address; by itself it takes that of the host's name, loopback often.

    On Linux with IPv4, unless the user has set ``GLOO_SOCKET_IFNAME``. The address may be a name, which the machine
    that has it takes for loopback: Debian does.
    """
    if sys.platform != "linux" or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    import fcntl

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        resolved = socket.gethostbyname(address)
        is_name = address not in (resolved, "localhost")
        probe.connect((ELSEWHERE if is_name and resolved.startswith("127.") else address, 1))  # sends nothing
        mine = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                if fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == mine:
                    os.environ["GLOO_SOCKET_IFNAME"] = name


def prepare_trainer(trainer: Any) -> None:
    """Make a Trainer ready to be stopped by signals, and to work with several processes."""
    connector = trainer._signal_connector
    register = connector.register_signal_handlers

    def register_signal_handlers() -> None:
        # Ours, or submitit's, stay. Lightning's own end with 0; on Slurm they save in the midst of a step; with several
        # processes they broadcast, which hangs where one waits for gradients.
        handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
        register()
        for signum, handler in handlers.items():
            if handler is not None:  # one that is not Python's cannot be set by Python
                signal.signal(signum, handler)

    if threading.current_thread() is threading.main_thread():
        connector.register_signal_handlers = register_signal_handlers
    if trainer.world_size > 1:
        if trainer.num_nodes > 1:
            choose_interface(trainer.strategy.cluster_environment.main_address)
        insist_on_signals()
        atexit.register(_leave_group)
        process, reduce = trainer.strategy.process_dataloader, trainer.strategy.reduce
        trainer.strategy.process_dataloader = lambda loader: _count_once(trainer, process(loader))
        # Lightning takes the mean of the processes' numbers of samples, cut to an integer, for that of a metric.
        trainer.strategy.reduce = lambda value, *args, **kwargs: reduce(_as_float(value, **kwargs), *args, **kwargs)


def _count_once(trainer: Any, loader: Any) -> Any:
    """Have validation and test see each sample once: torch's sampler repeats some so that all processes have as many.

    Where a process would then have a batch less than others, which some modules wait for in each, it warns instead.
    """
    from torch.utils.data import BatchSampler, DistributedSampler

    sampler = getattr(loader, "sampler", None)
    if trainer.training or not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return loader
    num_samples = len(sampler.dataset)  # type: ignore[arg-type]
    if repeated := sampler.total_size - num_samples:
        num_batches = len(loader)
        sampler.num_samples -= 1  # the smallest share
        if type(loader.batch_sampler) is BatchSampler and len(loader) == num_batches:
            sampler.total_size = num_samples
            sampler.num_samples = len(range(sampler.rank, num_samples, sampler.num_replicas))
            return loader
        sampler.num_samples += 1
        if trainer.is_global_zero:
            log.warning(
                f"{'test' if trainer.testing else 'validation'}: {repeated} of {num_samples:,} samples count twice, so "
                f"that {trainer.world_size} processes have as many batches; choose another batch size, or one device"
            )
    return loader


def _as_float(value: Any, reduce_op: Any = "mean", **_: Any) -> Any:
    is_count = reduce_op == "mean" and hasattr(value, "is_floating_point") and not value.is_floating_point()
    return value.float() if is_count else value


def _leave_group() -> None:
    """End gloo's threads, which Lightning leaves running: the interpreter's end aborts over them now and then."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _watch(parent: int, kill: Callable[[int, int], None], target: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        kill(target, signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
