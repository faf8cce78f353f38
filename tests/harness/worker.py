"""The processes behind ``tests.harness.pool``: one fork server and the ranks that it forks.

The server imports torch once and stays single-threaded, so forking it is cheap and safe; the process that runs pytest
is never forked. It is not ``multiprocessing``'s own fork server because that one imports the caller's ``__main__``
again in every child.

Nothing outlives the tests. The server ends when its control socket closes, which the kernel sees to even if pytest is
killed, and the kernel kills every rank with the server (``PR_SET_PDEATHSIG``). Linux only.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

PRELOADED_MODULES = (
    "numpy",
    "pytest",
    "torch",
    "torch._dynamo",  # fully_shard imports it.
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
)
LARGEST_WORLD = 8
MESSAGE_BYTES = 4096
PR_SET_PDEATHSIG = 1

# What a rank sends: its result or its traceback; then, when all ranks have met at a barrier, how many process groups
# it has.
RESULT, FAILURE, IDLE = "result", "failure", "idle"


def output_path(directory: Path, rank: int) -> Path:
    """File that holds the stdout and stderr of ``rank``."""
    return directory / f"rank{rank}.output"


def stacks_path(directory: Path, rank: int) -> Path:
    """File to which ``rank`` writes the stacks of its threads on ``SIGUSR1`` and on fatal signals."""
    return directory / f"rank{rank}.stacks"


def serve(control_fd: int) -> NoReturn:
    """Fork one rank for every descriptor that arrives on the socket ``control_fd``, until the socket closes.

    A request is a JSON object (``directory``, ``world_size``) with one socket per rank attached; the answer is the JSON
    list of the process ids. The first message, sent unasked, is the path of the temporary directory that the server
    owns.
    """
    for name in PRELOADED_MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # Keeps the collector of the ranks away from pages that they share.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The kernel reaps the ranks.
    control = socket.socket(fileno=control_fd)
    root = tempfile.mkdtemp(prefix="ppsf-dist-tests-")
    with suppress(BrokenPipeError, ConnectionResetError):
        control.send(root.encode())
        _answer_requests(control)
    shutil.rmtree(root, ignore_errors=True)  # A rank may still be writing there.
    os._exit(0)


def _answer_requests(control: socket.socket) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    server_pid = os.getpid()
    while True:
        message, sockets, _, _ = socket.recv_fds(control, MESSAGE_BYTES, LARGEST_WORLD)
        if not message:
            return
        request = json.loads(message)
        pids = []
        for rank, own_socket in enumerate(sockets):
            pid = os.fork()
            if pid == 0:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != server_pid:
                    os._exit(1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                control.close()
                for other in sockets:
                    if other != own_socket:
                        os.close(other)
                _work(Connection(own_socket), rank, request["world_size"], Path(request["directory"]))
            pids.append(pid)
        for own_socket in sockets:
            os.close(own_socket)
        control.send(json.dumps(pids).encode())


def _work(connection: Connection, rank: int, world_size: int, directory: Path) -> NoReturn:
    """Run the jobs that arrive on ``connection`` as ``rank``. Ends by ``os._exit``: gloo's teardown may abort."""
    try:
        _set_up(rank, world_size, directory)
        _barrier_and_report(connection)
        while True:
            try:
                message = connection.recv_bytes()
            except (EOFError, ConnectionResetError):
                os._exit(0)
            _run_job(connection, message)
    except BaseException:
        # The server's loop continues behind this frame and must never run in a rank.
        _send(connection, FAILURE, traceback.format_exc().encode())
        os._exit(1)


def _set_up(rank: int, world_size: int, directory: Path) -> None:
    import torch.distributed as dist

    output = os.open(output_path(directory, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # What a killed rank has printed must not be lost.
    stacks = os.open(stacks_path(directory, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)


def _run_job(connection: Connection, message: bytes) -> None:
    import numpy as np
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    try:
        paths, call = pickle.loads(message)
        sys.path[:] = paths
        job: tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]] = pickle.loads(call)
        fn, args, kwargs = job
        result = _dump_by_value(fn(*args, **kwargs))
    except BaseException:
        _send(connection, FAILURE, traceback.format_exc().encode())
        return
    finally:
        # A job ends as a process would, and leaves the folders that it saved to.
        if checkpoints := sys.modules.get("ppsf_dist.checkpoints"):
            checkpoints.release_checkpoint()
    _send(connection, RESULT, result)
    _barrier_and_report(connection)


def _barrier_and_report(connection: Connection) -> None:
    # A job that leaves the ranks out of step fails here, not in the job after it.
    import torch.distributed as dist

    dist.barrier()
    _send(connection, IDLE, str(dist.get_pg_count()).encode())


def _send(connection: Connection, kind: str, payload: bytes) -> None:
    try:
        connection.send_bytes(pickle.dumps((kind, payload)))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)


class _ByValuePickler(pickle.Pickler):
    """Pickles tensors as their elements, without the rest of a storage that they are a view of."""

    def reducer_override(self, obj: object) -> Any:
        import torch
        from torch.distributed.tensor import DTensor

        if isinstance(obj, DTensor):
            raise TypeError(
                "A job returned a DTensor, which has no meaning outside its process group; return obj.full_tensor(), "
                "obj.to_local() or tests.harness.layouts.gather(...) instead."
            )
        if isinstance(obj, torch.Tensor):
            return obj.detach().cpu().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def _dump_by_value(result: object) -> bytes:
    buffer = io.BytesIO()
    _ByValuePickler(buffer, pickle.HIGHEST_PROTOCOL).dump(result)
    return buffer.getvalue()
