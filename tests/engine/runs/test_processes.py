"""src/processes.py: which process this is, and when it ends, with processes that need no torch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from src.engine.runs.processes import RUN_PARENT, SWEEP_PARENT, choose_interface, get_name, is_child, is_first_of_host
from src.engine.settings.check import ROOT
from tests.marks import by_default
from tests.processes import living, wait_until

VARIABLES = (
    "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "RANK", "LOCAL_RANK", "NODE_RANK", RUN_PARENT,
    SWEEP_PARENT, "GLOO_SOCKET_IFNAME", "TORCHELASTIC_RUN_ID",
)  # fmt: skip
BY_BOTH = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "TORCHELASTIC_RUN_ID": "none"}

# A process that starts another one like itself, with a variable in its environment.
FAMILY = """
import os, subprocess, sys, time
from src.engine.runs.processes import end_with_parent
end_with_parent()
if sys.argv[2] == "parent":
    subprocess.Popen([sys.executable, "-c", sys.argv[3], sys.argv[1], "child"],
                     env={**os.environ, sys.argv[4]: sys.argv[5].replace("PID", str(os.getpid()))},
                     start_new_session=sys.argv[4] == "SWEEP_PARENT")
time.sleep(600)
"""
# One that waits in Python, or in C, as for another process's gradients, where no handler is called; or it works.
WAITING = """
import atexit, ctypes, signal, sys, time
from src.engine.runs import processes
processes.GRACE = 0.5
processes.exit_on_signals()
processes.insist_on_signals()
atexit.register(print, "left by itself")
mutex = ctypes.create_string_buffer(64)
told = []
if sys.argv[1] == "work":
    signal.signal(signal.SIGTERM, lambda *_: told.append(time.monotonic()))
print("ready", flush=True)
while sys.argv[1] == "Python":
    time.sleep(600)
while sys.argv[1] == "work":
    time.sleep(0.1)
    if told and time.monotonic() > told[0] + 2:  # four times the grace
        sys.exit(3)
for _ in range(2):
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""

# One that a script has started in the background, as far as SIGINT says, with a loader's worker.
IN_BACKGROUND = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from src.engine.runs import processes
processes.exit_on_signals()
os.kill(os.getpid(), signal.SIGINT)
worker = os.fork()
if not worker:
    for signum in (signal.SIGHUP, signal.SIGQUIT):
        os.kill(os.getpid(), signum)
    print("the worker works", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), flush=True)
os.kill(os.getpid(), signal.SIGHUP)
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to look for processes")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the environment says that this process is one of several."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is as before when the test has ended
        monkeypatch.delenv(name)


def state(pid: int) -> str:
    """What Linux calls a process's state, as in S for one that sleeps."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def started(code: str, *arguments: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("environment", "name", "is_first"),
    [
        ({}, "", True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, "", True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, "rank 1", False),
        ({"NODE_RANK": "1"}, "node 1, process 0", True),
        ({"LOCAL_RANK": "2", "NODE_RANK": "1"}, "node 1, process 2", False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "", True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, "rank 2", True),
        ({"RANK": "3", "LOCAL_RANK": "1"}, "rank 3", False),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "", True),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, "rank 3", False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "", True),
        # Two torchruns by srun, one a machine.
        ({**BY_BOTH, "SLURM_PROCID": "0", "RANK": "1", "LOCAL_RANK": "1"}, "rank 1", False),
        ({**BY_BOTH, "SLURM_PROCID": "1", "RANK": "2", "LOCAL_RANK": "0"}, "rank 2", True),
        ({**BY_BOTH, "SLURM_PROCID": "0", "RANK": "0", "LOCAL_RANK": "0"}, "", True),
    ],
)
def test_a_process_is_named_by_what_has_started_it(
    environment: dict[str, str], name: str, is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert (get_name(), is_first_of_host()) == (name, is_first)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"LOCAL_RANK": "1"}, False),  # torchrun's, or a person's
        ({RUN_PARENT: "1"}, False),  # a sweep's job
        ({RUN_PARENT: "1", "LOCAL_RANK": "0"}, False),  # what Lightning makes of the first process itself
        ({RUN_PARENT: "1", "LOCAL_RANK": "1"}, True),
    ],
)
def test_a_child_is_what_lightning_has_started(
    environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert is_child() == expected


@needs_proc
@pytest.mark.parametrize(
    ("name", "value", "ends"),
    [("LOCAL_RANK", "1", True), (SWEEP_PARENT, "PID", True), ("LOCAL_RANK", "0", False)],
    ids=["child", "sweep's job", "none of ours"],
)
def test_what_a_killed_process_has_started_ends_with_it(name: str, value: str, ends: bool, tmp_path: Path) -> None:
    with started(FAMILY, str(tmp_path), "parent", FAMILY, name, value) as parent:
        wait_until(lambda: len(living(str(tmp_path))) == 2, seconds=60)
        (child,) = living(str(tmp_path)) - {parent.pid}
    if ends:
        wait_until(lambda: not living(str(tmp_path)), seconds=60)
    else:
        time.sleep(1.5)
        assert living(str(tmp_path)) == {child}
        os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="waits in Linux's C library")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("where", "as_child", "last_words"),
    by_default([("C", False, ""), ("Python", False, "left by itself\n"), ("Python", True, "")]),
)
def test_a_signal_ends_a_process_wherever_it_waits(
    where: str, as_child: bool, last_words: str, signum: signal.Signals
) -> None:
    env = {"LOCAL_RANK": "1", RUN_PARENT: str(os.getpid())} if as_child else {}
    with started(WAITING, where, **env) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        wait_until(lambda: state(process.pid) == "S", seconds=60)  # it was about to wait
        process.send_signal(signum)
        assert process.wait(60) == 128 + signum
        assert process.stdout.read() == last_words


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the state in /proc")
def test_a_process_that_is_at_work_gets_the_time_to_save() -> None:
    with started(WAITING, "work") as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        wait_until(lambda: state(process.pid) == "S", seconds=60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 3
        assert process.stdout.read() == "left by itself\n"


@pytest.mark.skipif(sys.platform != "linux", reason="waits in Linux's C library")
@pytest.mark.parametrize(
    ("where", "as_rank", "signum", "preempted", "requeued"),
    by_default([
        ("C", "0", signal.SIGUSR1, "None", True),
        ("Python", "0", signal.SIGUSR1, "None", True),
        ("C", "1", signal.SIGUSR1, "None", False),
        ("Python", "0", signal.SIGTERM, "2026-11-27T04:43:19", True),
        ("C", "0", signal.SIGTERM, "2026-11-27T04:43:19", True),
        ("Python", "0", signal.SIGTERM, "None", False),  # by scancel
    ]),
)  # fmt: skip
def test_a_process_out_of_time_or_preempted_is_queued_again_once_wherever_it_waits(
    where: str, as_rank: str, signum: signal.Signals, preempted: str, requeued: bool, tmp_path: Path
) -> None:
    said = f"PreemptEligibleTime=2026-11-27T04:43:16 PreemptTime={preempted}"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n[ $1 = show ] && echo {said} || echo $* >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "RANK": as_rank}
    with started(WAITING, where, **env) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        wait_until(lambda: state(process.pid) == "S", seconds=60)
        process.send_signal(signum)
        assert process.wait(60) == 128 + signum
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if requeued else "")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_the_interface_is_the_one_that_leads_to_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for loopback in ("127.0.0.1", "localhost"):
        choose_interface(loopback)
        assert os.environ.pop("GLOO_SOCKET_IFNAME") == "lo"

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_name_that_its_own_machine_takes_for_loopback_does_not_choose_loopback() -> None:
    choose_interface("127.1")  # to the resolver a name like any other, which leads to 127.0.0.1
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    defaults = [interface for interface, destination, *_ in routes if int(destination, 16) == 0]
    assert os.environ.get("GLOO_SOCKET_IFNAME") == (defaults[0] if defaults else None)


def test_no_interface_is_chosen_for_an_address_that_nothing_leads_to() -> None:
    choose_interface("nowhere.invalid")
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs the signals of a terminal")
def test_signals_that_are_ignored_stay_so_and_workers_leave_a_terminals_to_the_main_process() -> None:
    with started(IN_BACKGROUND) as process:
        said, _ = process.communicate(timeout=30)
    assert said.split("\n") == ["the worker works", str(128 + signal.SIGTERM), ""]
    assert process.returncode == 128 + signal.SIGHUP
