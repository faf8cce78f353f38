"""A pool of gloo ranks that lives as long as the test session.

``run(world_size, fn, *args)`` calls ``fn(*args)`` on every rank of a world of exactly ``world_size`` processes and
returns the results in the order of the ranks. The first call starts one fork server (see ``tests.harness.worker``);
the first call of each world size forks its ranks, which then serve all later jobs of that size.

If a job raises, hangs or dies on any rank, ``JobFailed`` carries the traceback or the stacks of each such rank.
Its world is killed, and the next job of that size gets a new one.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TypeVar

from tests.harness.patience import Patience
from tests.harness.worker import FAILURE, IDLE, LARGEST_WORLD, MESSAGE_BYTES, RESULT, output_path, stacks_path

Result = TypeVar("Result")

# Seconds in which the ranks do nothing, or of their own work (see tests.harness.patience): other programs reach none.
JOB_SECONDS = 60.0
SERVER_START_SECONDS = 180.0  # Importing torch from a cold disk takes most of a minute, without work.
WORLD_START_SECONDS = 60.0
# How long the other ranks may go on after one has failed: enough to report the same error, short when they wait for it.
GRACE_SECONDS = 1.0
BARRIER_SECONDS = 10.0
STACKS_SECONDS = 10.0
OUTPUT_TAIL = 4000  # Characters of a dead rank's output that its report repeats.
# Of the clock: nothing that was killed takes so long to go, and who takes longer is left behind.
DEATH_SECONDS = 60.0
# A job cannot be relied on to destroy the process groups that it makes, and each holds threads and sockets.
PROCESS_GROUPS_PER_WORLD = 64

_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tests.harness.worker import serve; serve(int(sys.argv[2]))"
)


class JobFailed(RuntimeError):
    """A job raised, hung or died. ``reports`` maps each rank that did to its traceback or the stacks of its threads."""

    def __init__(self, headline: str, reports: dict[int, str]) -> None:
        self.reports = reports
        sections = [f"--- rank {rank}: {text.rstrip()}" for rank, text in sorted(reports.items())]
        super().__init__("\n".join([headline, *sections]))


class _Server:
    """The fork server, seen from pytest."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), str(theirs.fileno())]
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for pytest, which then closes the pool.
            # Triton's interpreter, for those who ask for its kernels, has to be chosen before torch imports it.
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TRITON_INTERPRET": "1"},
        )
        theirs.close()
        self._directory = Path(self._receive().decode())
        self._worlds_started = 0

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, world_size: int) -> _World:
        directory = self._directory / f"world{world_size}-{self._worlds_started}"
        directory.mkdir()
        self._worlds_started += 1
        pairs = [socket.socketpair() for _ in range(world_size)]
        request = json.dumps({"directory": str(directory), "world_size": world_size}).encode()
        socket.send_fds(self._control, [request], [theirs.fileno() for _, theirs in pairs])
        pids = json.loads(self._receive())
        for _, theirs in pairs:
            theirs.close()
        return _World(directory, [Connection(ours.detach()) for ours, _ in pairs], pids)

    def _receive(self) -> bytes:
        patience = Patience(SERVER_START_SECONDS, lambda: [self._process.pid])
        message = self._control.recv(MESSAGE_BYTES) if patience.wait([self._control.fileno()]) else b""
        if not message:
            self._process.kill()
            _, errors = self._process.communicate()
            raise RuntimeError(f"The fork server of the test pool did not answer. Its stderr:\n{errors.decode()}")
        return message

    def close(self) -> None:
        self._control.close()
        try:
            self._process.wait(DEATH_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()


class _World:
    """The ranks of one world, seen from pytest."""

    def __init__(self, directory: Path, connections: list[Connection], pids: list[int]) -> None:
        self._directory = directory
        self._connections = connections
        self._pids = pids
        # Unlike a process id, a descriptor of a process never comes to mean another one.
        self._processes = [os.pidfd_open(pid) for pid in pids]
        self._outputs = []
        self.process_groups = 0
        for rank in range(len(pids)):
            path = output_path(directory, rank)
            path.touch()
            self._outputs.append(path.open(errors="replace"))
        try:
            self._meet("the start of the world", WORLD_START_SECONDS)
        except BaseException:
            self.kill()
            raise
        for output in self._outputs:
            output.read()  # What gloo says when it connects.

    def run(self, message: bytes, name: str, timeout: float) -> list[bytes]:
        """The pickled result of each rank. Raises ``JobFailed``, after which the world must be killed."""
        try:
            for rank, connection in enumerate(self._connections):
                try:
                    connection.send_bytes(message)
                except (BrokenPipeError, ConnectionResetError):
                    raise JobFailed(f"The world died before {name}.", {rank: self._death(rank)}) from None
            results = self._collect(RESULT, name, timeout)
            self._meet(f"the barrier after {name} (do all ranks issue the same collectives?)", BARRIER_SECONDS)
        finally:
            self._forward_output()
        return results

    def kill(self) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
        waiting = set(self._processes)
        deadline = time.monotonic() + DEATH_SECONDS
        while waiting and time.monotonic() < deadline:
            waiting.difference_update(wait(list(waiting), deadline - time.monotonic()))
        for process in self._processes:
            os.close(process)
        for connection in self._connections:
            connection.close()
        for output in self._outputs:
            output.close()

    def _meet(self, name: str, timeout: float) -> None:
        self.process_groups = max(int(count) for count in self._collect(IDLE, name, timeout))

    def _collect(self, kind: str, name: str, timeout: float) -> list[bytes]:
        """The message that each rank sends next, all of them of ``kind``."""
        pending = {connection: rank for rank, connection in enumerate(self._connections)}
        payloads: dict[int, bytes] = {}
        failures: dict[int, str] = {}
        patience = Patience(timeout, lambda: self._pids)
        while pending:
            ready = patience.wait(pending)
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    got, payload = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    got, payload = FAILURE, self._death(rank).encode()
                if got == FAILURE:
                    failures[rank] = payload.decode()
                    patience = Patience(min(GRACE_SECONDS, timeout), lambda: self._pids)
                else:
                    assert got == kind, f"rank {rank} sent {got} instead of {kind}"
                    payloads[rank] = payload
        if failures or pending:
            verb = "failed" if failures else f"did not return within {timeout:g} s"
            raise JobFailed(
                f"{name} {verb} in a world of {len(self._connections)}.",
                failures | self._stacks(sorted(pending.values())),
            )
        return [payloads[rank] for rank in range(len(self._connections))]

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        paths = {rank: stacks_path(self._directory, rank) for rank in ranks}
        for rank in ranks:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._processes[rank], signal.SIGUSR1)
        patience = Patience(STACKS_SECONDS, lambda: self._pids)
        while not all(_is_whole(path.read_text()) for path in paths.values()) and patience.left() > 0:
            time.sleep(0.02)
        return {rank: f"still running\n{path.read_text()}" for rank, path in paths.items()}

    def _death(self, rank: int) -> str:
        """What a rank that is gone has left behind."""
        stacks = stacks_path(self._directory, rank)
        left = stacks.read_text() if stacks.exists() else ""
        return f"died\n{left}{output_path(self._directory, rank).read_text(errors='replace')[-OUTPUT_TAIL:]}"

    def _forward_output(self) -> None:
        for rank, output in enumerate(self._outputs):
            for line in output.read().splitlines():
                sys.stdout.write(f"[rank {rank}] {line}\n")


def _is_whole(stacks: str) -> bool:
    """Whether a rank has written all of its stacks: the main thread comes last, down to its module or cut in depth."""
    return stacks.rstrip().endswith((" in <module>", "..."))


class Pool:
    """The worlds of one process. Tests share one pool, through ``run``."""

    def __init__(self) -> None:
        self._server: _Server | None = None
        self._worlds: dict[int, _World] = {}
        self._owner = os.getpid()

    def run(
        self, world_size: int, fn: Callable[..., Result], *args: object, timeout: float = JOB_SECONDS, **kwargs: object
    ) -> list[Result]:
        """Call ``fn(*args, **kwargs)`` on every rank of a gloo world and return the results, rank 0 first.

        Each job starts with one thread, ``torch.float32`` as default dtype and the seeds of torch, ``random`` and
        numpy at 0. What the ranks print reaches the captured stdout of the test. Arguments and results are pickled by
        value; tensors come back detached, on the CPU.

        Args:
            world_size: number of ranks, 1 to 8.
            fn: function at the top level of a module that the ranks can import.
            timeout: seconds in which no rank works, or in which one does, after which the job counts as hung.

        Raises:
            JobFailed: a rank raised, hung or died, or the ranks were out of step after the job.
            ValueError: ``world_size`` is out of range or ``fn`` cannot be imported.
        """
        name = f"{fn.__module__}.{fn.__qualname__}"
        if not 1 <= world_size <= LARGEST_WORLD:
            raise ValueError(f"world_size is {world_size}; allowed are 1 to {LARGEST_WORLD}.")
        if fn.__module__ == "__main__" or "<" in fn.__qualname__:
            raise ValueError(f"fn is {name}; a rank can only import a function at the top level of a module.")
        message = pickle.dumps((sys.path, pickle.dumps((fn, args, kwargs))))
        world = self._world(world_size)
        try:
            results = world.run(message, name, timeout)
        except BaseException:
            self._kill(world_size)
            raise
        if world.process_groups > PROCESS_GROUPS_PER_WORLD:
            self._kill(world_size)
        return [pickle.loads(result) for result in results]

    def close(self) -> None:
        """End every process of the pool. The next ``run`` starts anew."""
        if os.getpid() != self._owner:
            return  # A fork of the test process inherits the exit handlers.
        for world_size in list(self._worlds):
            self._kill(world_size)
        if self._server is not None:
            self._server.close()
            self._server = None

    def _world(self, world_size: int) -> _World:
        if self._server is not None and not self._server.is_alive():
            self.close()
        if self._server is None:
            self._server = _Server()
        if world_size not in self._worlds:
            self._worlds[world_size] = self._server.fork(world_size)
        return self._worlds[world_size]

    def _kill(self, world_size: int) -> None:
        self._worlds.pop(world_size).kill()


_pool = Pool()
atexit.register(_pool.close)
run = _pool.run
close = _pool.close
