"""Two machines train one model: two network namespaces with addresses of their own, joined by a cable."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.engine.runs.build import load_checkpoint
from src.engine.settings.check import ROOT
from tests.engine.tiny import TINY
from tests.processes import living, wait_until

pytestmark = pytest.mark.netns

MAIN = "10.77.0.1"
ENV = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# 4 steps an epoch.
COMMON = (
    *TINY, "trainer=ddp_cpu", "trainer.num_nodes=2", "data.batch_size=60", "trainer.log_every_n_steps=2",
    "trainer.max_epochs=2", "callbacks=minimal", "+callbacks.tell._target_=tell.Tell",
)  # fmt: skip
TIMEOUT = 120  # seconds that a host may be silent, at its start too, where a test cuts it off

# A callback that tells each process's weights, as a hash, and where it is.
TELL = """
import hashlib, os
from pathlib import Path
from pytorch_lightning.callbacks import Callback

class Tell(Callback):
    def on_fit_end(self, trainer, pl_module):
        weights = b"".join(tensor.detach().numpy().tobytes() for tensor in pl_module.parameters())
        told = f"{os.environ['GLOO_SOCKET_IFNAME']} {hashlib.sha256(weights).hexdigest()}"
        (Path(__file__).parent / f"rank{trainer.global_rank}of{trainer.world_size}").write_text(told)
"""


class Hosts:
    """Two hosts, ``hosts.names``, each with an end of the cable, which has the same name as the host."""

    def __init__(self) -> None:
        self.names = [f"lenet{os.getpid()}{end}" for end in "ab"]

    def set_up(self) -> None:
        first, second = self.names
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", first, "netns", first, "type", "veth", "peer", "name", second, "netns", second)
        for number, name in enumerate(self.names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", name)
        self.plug("up")

    def plug(self, state: str) -> None:
        """Plug the cable in at the second host (``up``), or out (``down``)."""
        ip("-n", self.names[0], "link", "set", self.names[0], "up")
        ip("-n", self.names[1], "link", "set", self.names[1], state)

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    try:
        hosts.set_up()
    except (OSError, subprocess.CalledProcessError) as error:
        hosts.remove()
        pytest.skip(f"needs root and the ip command of iproute2: {error}")
    yield hosts
    hosts.remove()


@contextmanager
def started(
    hosts: Hosts, how: str, num: int, root: Path, *arguments: str, **env: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The command of each host, by torchrun or by itself, with ``num`` processes a host; none outlives the block."""
    (root / "tell.py").write_text(TELL)
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    environment |= {**ENV, "PYTHONPATH": f"{ROOT}:{root}", "PROJECT_ROOT": str(root), **env}
    commands = []
    try:
        for rank, host in enumerate(hosts.names):
            by: list[str] = []
            if how == "torchrun":
                by = ["-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={num}", f"--node-rank={rank}"]
                by += [f"--master-addr={MAIN}", "--master-port=29500"]
            else:
                environment |= {"MASTER_ADDR": MAIN, "MASTER_PORT": "29500", "NODE_RANK": str(rank), **env}
            command = ["ip", "netns", "exec", host, sys.executable, *by, "-m", "src.train", *arguments]
            with (root / f"log{rank}").open("wb") as log:
                commands.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        yield commands
    finally:
        for process in commands:  # first, so that they start nothing more; ip becomes the command that it is given
            process.kill()
            process.wait()
        for pid in living(str(root)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not living(str(root)), seconds=60)


def said(root: Path, rank: int) -> list[str]:
    """What a host has printed, without torch's remark that the network has no names and the first process's line."""
    lines = (root / f"log{rank}").read_text().splitlines()
    return [line for line in lines if "[c10d] The hostname" not in line and (rank or not line.startswith("run "))]


def wait_until_they_train(commands: list[subprocess.Popen[bytes]], root: Path) -> None:
    def train() -> bool:
        assert [command.poll() for command in commands] == [None, None], (said(root, 0), said(root, 1))
        return "epoch 2/" in (root / "log0").read_text()

    wait_until(train, seconds=240)


def statuses(commands: list[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    return [command.wait(deadline - time.monotonic()) for command in commands]


# Two processes a host without torchrun: where a host is cut off, below.
@pytest.mark.parametrize(("how", "num"), [("torchrun", 2), ("environment", 1)])
def test_two_hosts_train_one_model(how: str, num: int, hosts: Hosts, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(hosts, how, num, tmp_path, *COMMON, f"trainer.devices={num}", f"hydra.run.dir={folder}") as commands:
        assert statuses(commands, 300) == [0, 0], (said(tmp_path, 0), said(tmp_path, 1))
        wait_until(lambda: not living(str(tmp_path)), seconds=60)

    told = [(tmp_path / f"rank{rank}of{2 * num}").read_text().split() for rank in range(2 * num)]
    assert [interface for interface, _ in told] == [hosts.names[0]] * num + [hosts.names[1]] * num
    assert len({weights for _, weights in told}) == 1
    lines = [line for line in said(tmp_path, 0) if line.startswith("epoch")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    # When all is done, one torchrun may find that the other has left already, which it tells at length and forgives.
    assert list(takewhile(lambda line: how != "torchrun" or "TCPStore" not in line, said(tmp_path, 1))) == []
    names = {path.name for path in folder.glob("[!e]*")} - {"hparams.yaml", ".lock", "changes.patch"}
    assert names == {"config.yaml", "metrics.json", "status.json", "train.log", "checkpoints"}
    events = EventAccumulator(str(folder))
    events.Reload()
    for tag in ("train/loss", "val/loss", "val/acc"):
        assert [event.step for event in events.Scalars(tag)] == [3, 7]


def test_the_main_hosts_name_may_lead_to_loopback_there(hosts: Hosts, tmp_path: Path) -> None:
    main = "main.lenet.invalid"
    ip("-n", hosts.names[0], "route", "add", "default", "dev", hosts.names[0])
    arguments = (f"hydra.run.dir={tmp_path}/run", "trainer.strategy.timeout.seconds=120")
    with ExitStack() as stack:
        for host, address in zip(hosts.names, ("127.0.1.1", MAIN), strict=True):  # as Debian has it
            folder = Path("/etc/netns", host)  # what ip puts in the place of the host's own files
            folder.mkdir(parents=True)
            stack.callback(shutil.rmtree, folder)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {main}\n")
        arrived = started(hosts, "environment", 1, tmp_path, *COMMON, "trainer.devices=1", *arguments, MASTER_ADDR=main)
        commands = stack.enter_context(arrived)
        assert statuses(commands, 300) == [0, 0], (said(tmp_path, 0), said(tmp_path, 1))
    told = [(tmp_path / f"rank{rank}of2").read_text().split()[0] for rank in range(2)]
    assert told == hosts.names


@pytest.mark.parametrize("how", ["torchrun", "environment"])
def test_hosts_that_cannot_agree_on_a_folder_say_so_once(how: str, hosts: Hosts, tmp_path: Path) -> None:
    with started(hosts, how, 2, tmp_path, *COMMON) as commands:
        assert statuses(commands, 180) == [1, 1]
    for rank in range(2):
        lines = said(tmp_path, rank)
        assert len([line for line in lines if line.startswith("error: hydra.run.dir: several processes")]) == 1
        assert how == "torchrun" or len(lines) == 1  # torchrun has a lot to say itself
    assert not (tmp_path / "logs").exists()


def test_without_the_right_interface_the_failure_names_the_setting(hosts: Hosts, tmp_path: Path) -> None:
    arguments = (f"hydra.run.dir={tmp_path}/run", f"trainer.strategy.timeout.seconds={TIMEOUT}")
    with started(
        hosts, "environment", 1, tmp_path, *COMMON, "trainer.devices=1", *arguments, GLOO_SOCKET_IFNAME="lo"
    ) as commands:
        wait_until(lambda: any(command.poll() for command in commands), seconds=2 * TIMEOUT + 120)
        rank = 0 if commands[0].poll() else 1
    assert "GLOO_SOCKET_IFNAME" in said(tmp_path, rank)[-1]


def test_a_host_that_is_cut_off_ends_the_run_which_can_be_continued(hosts: Hosts, tmp_path: Path) -> None:
    long = ("trainer.max_epochs=100000", f"trainer.strategy.timeout.seconds={TIMEOUT}", "logger=[]")
    with started(hosts, "environment", 2, tmp_path, *COMMON, f"hydra.run.dir={tmp_path}/run", *long) as commands:
        wait_until_they_train(commands, tmp_path)
        hosts.plug("down")
        assert statuses(commands, 2 * TIMEOUT + 60) == [1, 1], (said(tmp_path, 0), said(tmp_path, 1))
        wait_until(lambda: not living(str(tmp_path)), seconds=60)
    hosts.plug("up")
    errors = [[line for line in said(tmp_path, rank) if not line.startswith("epoch")] for rank in range(2)]
    pattern = r"another process .* does not answer: (Timed out|Connection closed by peer)"
    reasons = [re.findall(pattern, "\n".join(lines)) for lines in errors]
    assert [len(lines) for lines in errors] == [len(found) for found in reasons] == [1, 1], errors
    assert ["Timed out"] in reasons  # at least one does; it closes what the other may be waiting at

    assert all("resume=<the run's folder>" in lines[0] for lines in errors)
    epochs = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] // 4  # steps an epoch
    again = (f"resume={tmp_path}/run", f"trainer.max_epochs={epochs + 2}")
    with started(hosts, "environment", 2, tmp_path, *again) as commands:
        assert statuses(commands, 300) == [0, 0], (said(tmp_path, 0), said(tmp_path, 1))
    assert sum("last.ckpt, step" in line for line in said(tmp_path, 0)) == 1
    assert "num_nodes: the run had" not in "\n".join(said(tmp_path, 0) + said(tmp_path, 1))
    lines = [line for line in said(tmp_path, 0) if line.startswith("epoch")]
    assert [line.split()[1] for line in lines] == [f"{epoch}/{epochs + 2}" for epoch in (epochs + 1, epochs + 2)]
    assert len({(tmp_path / f"rank{rank}of4").read_text().split()[1] for rank in range(4)}) == 1


@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGTERM, [143, 143]), (signal.SIGKILL, [1, -9])])
def test_a_host_that_is_stopped_ends_the_other(
    signum: signal.Signals, expected: list[int], hosts: Hosts, tmp_path: Path
) -> None:
    arguments = (f"hydra.run.dir={tmp_path}/run", "trainer.max_epochs=100000", "logger=[]")
    with started(hosts, "environment", 1, tmp_path, *COMMON, "trainer.devices=1", *arguments) as commands:
        wait_until_they_train(commands, tmp_path)
        commands[1].send_signal(signum)
        assert statuses(commands, 120) == expected
    errors = [line for line in said(tmp_path, 0) if not line.startswith("epoch")]
    if signum == signal.SIGKILL:
        assert len(errors) == 1
        assert "another process of this run has ended" in errors[0]
    else:
        assert errors == []
