"""How ranks find the store of rank 0 without racing for a TCP port.

Rank 0 opens the store first and tells its port afterwards, so at no moment can another process take that port.
"""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch has it, its stubs do not

DEFAULT_TIMEOUT = timedelta(minutes=5)
ANY_PORT = 0
ASK_SECONDS = 2.0
PAUSE_SECONDS = 0.2
LONGEST_ANSWER = 256

logger = logging.getLogger(__name__)


def port_is_taken(error: dist.DistNetworkError) -> bool:
    """Whether a store could not open because another process listens on its port."""
    return "EADDRINUSE" in str(error)


def open_store(address: str, port: int, world_size: int, timeout: timedelta) -> TCPStore:
    """Opens the store of rank 0 on ``port``, or on a free one if that is taken or 0; ``store.port`` tells which."""

    def listen(on: int) -> TCPStore:
        # multi_tenant: a later env:// in this process then shares the server instead of finding its port taken.
        return TCPStore(
            address, on, world_size, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )

    try:
        return listen(port)
    except dist.DistNetworkError as error:
        if port == ANY_PORT or not port_is_taken(error):
            raise
    store = listen(ANY_PORT)
    logger.warning("MASTER_PORT=%d is taken on this host: using port %d instead.", port, store.port)
    return store


def join_store(address: str, port: int, world_size: int, timeout: timedelta) -> TCPStore:
    """Connects to the open store of rank 0."""
    return TCPStore(address, port, world_size, is_master=False, timeout=timeout, wait_for_workers=False)


@contextmanager
def announced(answer: int, token: str, ports: Sequence[int]) -> Iterator[None]:
    """While open, whoever connects to the first free one of ``ports`` is told ``token`` and the number ``answer``.

    Raises:
        RuntimeError: all ``ports`` are taken.
    """
    line = f"{token} {answer}\n".encode()

    class Teller(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(line)

    def bind() -> socketserver.TCPServer:
        for port in ports:
            try:
                return socketserver.TCPServer(("", port), Teller)
            except OSError as error:
                logger.info("Port %d cannot be used to announce the store: %s", port, error)
        raise RuntimeError(
            f"None of the ports {list(ports)} is free on this host: set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
        )

    with bind() as server:
        thread = threading.Thread(target=server.serve_forever, name="ppsf_dist-announce", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def ask(address: str, ports: Sequence[int], token: str, timeout: timedelta) -> int:
    """The number that rank 0 announces under ``token`` on one of ``ports``; strangers on these ports are passed over.

    Raises:
        RuntimeError: no such announcement within ``timeout``.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        for port in ports:
            try:
                with socket.create_connection((address, port), timeout=ASK_SECONDS) as connection:
                    words = connection.makefile("rb").readline(LONGEST_ANSWER).split()
            except OSError as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if len(words) == 2 and words[0] == token.encode():
                return int(words[1])
            reason = f"port {port} belongs to another program"
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"Rank 0 was not found on {address}, ports {list(ports)}, within {timeout} ({reason}): see whether it "
                f"started, and set MASTER_ADDR to an address of its host that all hosts reach."
            )
        time.sleep(PAUSE_SECONDS)
