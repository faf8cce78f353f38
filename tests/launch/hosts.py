"""Two hosts on this machine: network namespaces with a cable between them. Needs root and iproute2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.bootstrap import launchers

ROOT = launchers.ROOT
TRAIN = str(ROOT / "launch" / "train.py")
TINY = "--dim 16 --layers 2 --heads 2 --seq-len 16 --batch-size 4 --opt d0=1e-4".split()
NETWORK = "10.77.41"
STEPS = 24
POLL_SECONDS = 0.02
# Beyond the summation order of two ranks nothing differs.
SAME_LOSS = 1e-5

WHY_NOT = "needs root and the ip command of iproute2, to make network namespaces"


def possible() -> bool:
    """Whether this process can make network namespaces."""
    return os.geteuid() == 0 and shutil.which("ip") is not None


@dataclass(frozen=True)
class Host:
    """A network namespace, its end of the cable, and its place among the hosts."""

    name: str
    interface: str
    address: str
    node_rank: int

    def start(self, *options: str, **variables: str) -> subprocess.Popen[str]:
        """Starts launch/torchrun.sh with one rank here. The process is torchrun's agent; its child is the rank."""
        return launchers.start(
            ["ip", "netns", "exec", self.name, str(ROOT / "launch/torchrun.sh"), *options],
            **{
                "TRAIN_SCRIPT": TRAIN,
                "NPROC_PER_NODE": "1",
                "NNODES": "2",
                "NODE_RANK": str(self.node_rank),
                "MASTER_ADDR": f"{NETWORK}.1",
                "GLOO_SOCKET_IFNAME": self.interface,
                **variables,
            },
        )

    def processes(self) -> list[int]:
        return [int(word) for word in _ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """Ends all that runs here at once, as a power cut does."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nothing else; gone afterwards, with all that ran there."""
    hosts = tuple(Host(f"ppsf{os.getpid()}{i}", f"veth{i}", f"{NETWORK}.{i + 1}", i) for i in range(2))
    made: list[Host] = []
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            made.append(host)
        first, second = hosts
        peer = ("peer", "name", second.interface, "netns", second.name)
        _ip("link", "add", first.interface, "netns", first.name, "type", "veth", *peer)
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield first, second
    finally:
        for host in made:
            host.kill()
            _ip("netns", "del", host.name)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code of a process and all that it printed; one that hangs is ended with its test."""
    outcome = launchers.finish(process)
    return outcome.code, outcome.text


def alone(*options: str) -> None:
    """Trains in one process, without a launcher."""
    code, text = finish(launchers.start([sys.executable, TRAIN, *options]))
    assert code == 0, text


def metrics(output: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl so far, without one that is half written."""
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(output: Path, step: int, *processes: subprocess.Popen[str]) -> None:
    """Waits until a run has written the metrics of a step."""
    wait_until(lambda: bool(rows := metrics(output)) and rows[-1]["step"] >= step, *processes)


def wait_until(ready: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    """Waits for ``ready``, and no longer than all processes live."""
    while not ready():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(POLL_SECONDS)


def children(pid: int) -> list[int]:
    """The processes that a process has started and that are still there."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
