"""How rank 0 tells the ranks of its job, and nobody else, where its store listens.

Both sides prove that they know the job's key before anything is said, without sending it (HMAC-SHA256 over fresh
challenges of both, the port that they talk through, and who is speaking)::

    rank 0    challenge
    asker     challenge of its own, proof
    rank 0    number, proof

A stranger gets 32 random bytes and no more, and is read no further than a proof is long, for a few seconds.
"""

from __future__ import annotations

import hmac
import logging
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

DIGEST = "sha256"
PROOF_BYTES = 32
CHALLENGE_BYTES = 32
NUMBER_BYTES = 4
# How long rank 0 listens to somebody who may be a stranger, and how long the others listen to what may be one.
LISTEN_SECONDS = 10.0
ASK_SECONDS = 2.0
PAUSE_SECONDS = 0.2
# So many may talk to rank 0 at once; more are turned away, and ask again if they belong to the job.
CONVERSATIONS = 128
SHUTDOWN_POLL_SECONDS = 0.05

logger = logging.getLogger(__name__)


class Stranger(Exception):
    """Whoever is at the other end does not know the key."""


@contextmanager
def announced(number: int, key: bytes, address: str, ports: Sequence[int]) -> Iterator[None]:
    """While open, those who know ``key`` learn ``number`` on the first free one of ``ports``.

    Args:
        number: what to tell, below 2^32.
        key: what the ranks of this job know and nobody else does.
        address: numeric address of this host. Nothing listens on others.
        ports: the ports to try, in this order.

    Raises:
        RuntimeError: none of ``ports`` is free.
    """
    with _listen(number, key, address, ports) as server:
        thread = threading.Thread(
            target=server.serve_forever, args=(SHUTDOWN_POLL_SECONDS,), name="ppsf_dist-announce", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def ask(address: str, ports: Sequence[int], key: bytes, timeout: timedelta) -> int:
    """The number that rank 0 announces to those who know ``key`` on one of ``ports``; strangers there are passed over.

    Args:
        address: host of rank 0; where its name has several addresses, each is tried.
        ports: where rank 0 may be, in the order in which it tries them.
        key: the key with which rank 0 announces.
        timeout: how long to look for it.

    Raises:
        RuntimeError: no such announcement within ``timeout``.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        reasons = []
        for port in ports:
            try:
                return _ask(address, port, key)
            except (OSError, Stranger) as error:
                reasons.append(f"port {port}: {error}")
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"Rank 0 was not found on {address}, ports {list(ports)}, within {timeout} ({'; '.join(reasons)}): see "
                "whether it started, set MASTER_ADDR to an address of its host that all hosts reach, and PPSF_SECRET, "
                "if you set it, to the same on all ranks."
            )
        time.sleep(PAUSE_SECONDS)


def _ask(address: str, port: int, key: bytes) -> int:
    failure: OSError | Stranger | None = None
    for family, kind, protocol, _, place in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM):
        try:
            with socket.socket(family, kind, protocol) as connection:
                connection.settimeout(ASK_SECONDS)
                connection.connect(place)
                return _learn(connection, key, port)
        except (OSError, Stranger) as error:
            failure = error
    assert failure is not None, "getaddrinfo returns an address or raises"
    raise failure


def _listen(number: int, key: bytes, address: str, ports: Sequence[int]) -> _Server:
    for port in ports:
        try:
            return _Server(number, key, address, port)
        except OSError as error:
            logger.info("Port %d cannot be used to announce the store: %s", port, error)
    raise RuntimeError(
        f"None of the ports {list(ports)} is free on {address}: set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
    )


class _Server(socketserver.ThreadingTCPServer):
    """One thread for each conversation, so that a silent stranger keeps nobody waiting."""

    daemon_threads = True
    request_queue_size = CONVERSATIONS

    def __init__(self, number: int, key: bytes, address: str, port: int) -> None:
        self.number, self.key = number, key
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._places = threading.Semaphore(CONVERSATIONS)
        super().__init__((address, port), _Conversation)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self._places.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.info("A conversation with %s about the store failed.", client_address, exc_info=True)


class _Conversation(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        try:
            _tell(self.request, self.server.key, self.server.server_address[1], self.server.number)
        except (OSError, Stranger) as error:
            logger.info("%s asked for the store and was told nothing: %s", self.client_address, error)


def _tell(connection: socket.socket, key: bytes, port: int, number: int) -> None:
    ours = os.urandom(CHALLENGE_BYTES)
    deadline = time.monotonic() + LISTEN_SECONDS
    connection.settimeout(LISTEN_SECONDS)
    connection.sendall(ours)
    message = _receive(connection, CHALLENGE_BYTES + PROOF_BYTES, deadline)
    theirs, proof = message[:CHALLENGE_BYTES], message[CHALLENGE_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, b"ask", port, ours, theirs)):
        raise Stranger("the key of this job is not known there")
    told = number.to_bytes(NUMBER_BYTES)
    connection.sendall(told + _proof(key, b"tell", port, ours, theirs, told))


def _learn(connection: socket.socket, key: bytes, port: int) -> int:
    deadline = time.monotonic() + ASK_SECONDS
    theirs = _receive(connection, CHALLENGE_BYTES, deadline)
    ours = os.urandom(CHALLENGE_BYTES)
    connection.sendall(ours + _proof(key, b"ask", port, theirs, ours))
    message = _receive(connection, NUMBER_BYTES + PROOF_BYTES, deadline)
    told, proof = message[:NUMBER_BYTES], message[NUMBER_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, b"tell", port, theirs, ours, told)):
        raise Stranger("another program answers there")
    return int.from_bytes(told)


def _proof(key: bytes, speaker: bytes, port: int, first: bytes, second: bytes, told: bytes = b"") -> bytes:
    """The port is part of it, so that nobody on another port can pass on a conversation as their own."""
    return hmac.digest(key, b" ".join((b"ppsf_dist", speaker, b"%d" % port)) + b"\n" + first + second + told, DIGEST)


def _receive(connection: socket.socket, count: int, deadline: float) -> bytes:
    """Exactly so many bytes, all of them before the deadline however slowly they trickle in."""
    received = b""
    while len(received) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("nothing was said in time")
        connection.settimeout(left)
        more = connection.recv(count - len(received))
        if not more:
            raise Stranger("the connection was closed: it belongs to another program, or to a job with another key")
        received += more
    return received
