"""A real Slurm cluster of one node for a test: on loopback, with a key, in a folder of its own."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from getpass import getuser
from pathlib import Path

from tests.conftest import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")

# More CPUs than there are, for jobs that wait; a requeued job comes back as soon as its credentials have expired; the
# first job's number, since Lightning makes a port of it.
CONFIG = """
ClusterName=test
FirstJobId={controller_port}
MaxArraySize=3
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
KillWait=30
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=8
PartitionName=test Nodes=ALL Default=YES MaxTime=60 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=2
"""


def find_program(name: str) -> str | None:
    """The path of one of Slurm's programs, the daemons' too."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


@contextmanager
def serve_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start munged, slurmctld and slurmd.

    Args:
        folder: An empty folder for their files.

    Yields:
        What the environment of Slurm's commands needs.
    """
    for name in ("state", "spool"):
        (folder / name).mkdir()
    config = CONFIG.format(
        host=socket.gethostname(), user=getuser(), folder=folder, controller_port=free_port(), node_port=free_port()
    )
    (folder / "slurm.conf").write_text(config)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    env = {"SLURM_CONF": str(folder / "slurm.conf")}
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    commands = {
        "munged": ["--foreground", "--force", f"--socket={folder}/munge.socket", *files],
        "slurmctld": ["-D"],
        "slurmd": ["-D"],
    }
    daemons = []
    try:
        for name, arguments in commands.items():
            with (folder / f"{name}.out").open("wb") as out:
                command = [str(find_program(name)), *arguments]
                daemons.append(subprocess.Popen(command, env={**os.environ, **env}, stdout=out, stderr=out))
            wait_until((folder / "munge.socket").exists)
        wait_until(lambda: ask(env, "sinfo", "--noheader", "--format=%T") == "idle")
        yield env
    finally:
        try:
            if len(daemons) == len(commands):
                ask(env, "scancel", "--me")
                wait_until(lambda: ask(env, "squeue", "--noheader") == "")
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                try:
                    daemon.wait(60)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


def ask(env: dict[str, str], *command: str) -> str:
    """What one of Slurm's commands prints; empty as long as it fails."""
    answer = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False)
    return answer.stdout.strip()


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
