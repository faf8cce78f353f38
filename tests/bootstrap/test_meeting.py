"""Where rank 0 listens, whom it answers, and what a stranger learns."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from ppsf_dist.bootstrap import announcement, meeting
from ppsf_dist.bootstrap.announcement import announced, ask
from tests.bootstrap.launchers import listener

LOOPBACK = "127.0.0.1"
OURS, OTHER = b"this job", b"another job"
STORE_PORT = 31234
# Nothing here waits so long: each call ends by an event.
LONG = timedelta(minutes=2)
NOT_AT_ALL = timedelta(0)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine an honest answer may be late; who listens in vain is told so by the other side here."""
    monkeypatch.setattr(announcement, "ASK_SECONDS", LONG.total_seconds())
    monkeypatch.setattr(announcement, "LISTEN_SECONDS", LONG.total_seconds())


def free_ports(count: int) -> list[int]:
    sockets = [listener() for _ in range(count)]
    ports = [int(held.getsockname()[1]) for held in sockets]
    for held in sockets:
        held.close()
    return ports


def listening(port: int) -> set[str]:
    """The addresses on which this process listens on a port, IPv6 as the kernel prints it."""
    own = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            own.add(os.readlink(descriptor))
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines() + Path("/proc/net/tcp6").read_text().splitlines():
        fields = line.split()
        address, _, number = fields[1].partition(":")
        if fields[3] == "0A" and int(number, 16) == port and f"socket:[{fields[9]}]" in own:
            found.add(socket.inet_ntoa(bytes.fromhex(address)[::-1]) if len(address) == 8 else address)
    return found


@contextmanager
def impostor(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A program on a port that talks to one who connects."""
    with listener() as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                talk(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def test_announcement_is_found_among_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcement, "ASK_SECONDS", 0.2)
    with listener() as silent:
        # After it: a port that was given back may be the next one given away.
        other, ours = free_ports(2)
        ports = [silent.getsockname()[1], other, ours]
        with announced(1, OTHER, LOOPBACK, [other]), announced(2, OURS, LOOPBACK, ports):
            assert ask(LOOPBACK, ports, OURS, LONG) == 2
            assert ask("localhost", ports, OURS, LONG) == 2
            assert ask(LOOPBACK, ports, OTHER, LONG) == 1


def test_announcement_that_never_comes() -> None:
    ports = free_ports(1)
    with pytest.raises(RuntimeError, match=rf"Rank 0 was not found on 127.0.0.1, ports \[{ports[0]}\].*refused"):
        ask(LOOPBACK, ports, OURS, NOT_AT_ALL)
    with pytest.raises(RuntimeError, match="Rank 0 was not found on no-such-host.invalid"):
        ask("no-such-host.invalid", ports, OURS, NOT_AT_ALL)


def test_no_port_left_to_announce_on() -> None:
    with listener() as taken, pytest.raises(RuntimeError, match="None of the ports .* is free on 127.0.0.1"):
        with announced(1, OURS, LOOPBACK, [taken.getsockname()[1]]):
            raise AssertionError("the port was taken")


def test_nothing_listens_but_where_rank_0_was_told_to() -> None:
    (port,) = free_ports(1)
    with announced(STORE_PORT, OURS, "127.0.0.3", [port]):
        assert listening(port) == {"127.0.0.3"}
    store = meeting.open_store("127.0.0.3", 0, 2, LONG)
    assert listening(store.port) == {"127.0.0.3"}
    store.set("name", "value")
    assert meeting.join_store("127.0.0.3", store.port, 2, LONG).get("name") == b"value"


@pytest.mark.parametrize("key", [OTHER, b""])
def test_who_does_not_know_the_key_learns_nothing(key: bytes) -> None:
    ports = free_ports(1)
    with announced(STORE_PORT, OURS, LOOPBACK, ports):
        with pytest.raises(RuntimeError, match="belongs to another program, or to a job with another key"):
            ask(LOOPBACK, ports, key, NOT_AT_ALL)
        assert ask(LOOPBACK, ports, OURS, LONG) == STORE_PORT


def everything(connection: socket.socket) -> bytes:
    """What the other side says until it closes the connection."""
    return b"".join(iter(lambda: connection.recv(4096), b""))


def test_a_stranger_hears_32_random_bytes_and_no_more() -> None:
    ports = free_ports(1)
    heard = []
    with announced(STORE_PORT, OURS, LOOPBACK, ports):
        for said in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\0" * 64, b"x" * 100_000):
            with socket.create_connection((LOOPBACK, ports[0])) as connection:
                heard.append(connection.recv(announcement.CHALLENGE_BYTES, socket.MSG_WAITALL))
                with suppress(OSError):  # It may have hung up in the middle of what is said.
                    connection.sendall(said)
                    connection.shutdown(socket.SHUT_WR)
                    assert everything(connection) == b""
        assert len(set(heard)) == 4 and {len(challenge) for challenge in heard} == {32}


def test_a_proof_holds_for_one_conversation_only() -> None:
    """Who has listened to a rank says the same again."""
    ports = free_ports(1)
    recorded = []

    def listen_in(client: socket.socket) -> None:
        with socket.create_connection((LOOPBACK, ports[0])) as rank_0:
            client.sendall(rank_0.recv(32, socket.MSG_WAITALL))
            recorded.append(client.recv(64, socket.MSG_WAITALL))
            rank_0.sendall(recorded[0])
            # Passed on from another port: rank 0 itself does not take it for its own conversation.
            assert everything(rank_0) == b""

    with announced(STORE_PORT, OURS, LOOPBACK, ports), impostor(listen_in) as port:
        with pytest.raises(RuntimeError, match="belongs to another program"):
            ask(LOOPBACK, [port], OURS, NOT_AT_ALL)
        with socket.create_connection((LOOPBACK, ports[0])) as connection:
            connection.recv(32, socket.MSG_WAITALL)
            connection.sendall(recorded[0])
            assert everything(connection) == b""


def test_who_pretends_to_be_rank_0_is_not_believed() -> None:
    def pretend(client: socket.socket) -> None:
        client.sendall(b"c" * 32)
        message = client.recv(64, socket.MSG_WAITALL)
        # The only proof that it has seen is the one that it was given.
        client.sendall(STORE_PORT.to_bytes(4) + message[32:])

    with impostor(pretend) as port, pytest.raises(RuntimeError, match="another program answers there"):
        ask(LOOPBACK, [port], OURS, NOT_AT_ALL)


def take_a_place(port: int) -> socket.socket:
    """A connection to which rank 0 listens. A place that was just left may take a moment to be free."""
    while True:
        connection = socket.create_connection((LOOPBACK, port))
        if connection.recv(32, socket.MSG_WAITALL):
            return connection
        connection.close()


def test_strangers_who_say_nothing_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcement, "CONVERSATIONS", 4)
    ports = free_ports(1)
    with announced(STORE_PORT, OURS, LOOPBACK, ports):
        strangers = [take_a_place(ports[0]) for _ in range(3)]
        assert ask(LOOPBACK, ports, OURS, LONG) == STORE_PORT
        strangers.append(take_a_place(ports[0]))
        # All places are taken: more are turned away, and come in as soon as one is free.
        with socket.create_connection((LOOPBACK, ports[0])) as late:
            assert everything(late) == b""
        for stranger in strangers:
            stranger.close()
        assert ask(LOOPBACK, ports, OURS, LONG) == STORE_PORT


class Trickle(socket.socket):
    """Says something, and never enough."""

    def recv(self, *_: int) -> bytes:
        return b"x"


def test_who_says_too_little_too_slowly_is_cut_off() -> None:
    with Trickle() as slow, pytest.raises(TimeoutError, match="nothing was said in time"):
        announcement._receive(slow, 10**9, time.monotonic() + 0.01)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutError):
        announcement._receive(ours, 64, time.monotonic() + 0.01)


def test_a_name_that_only_this_host_reaches_gives_way_to_the_address_towards_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(meeting, "address_towards", {"node1": "127.0.0.9"}.__getitem__)
    assert meeting.own_address("localhost") == LOOPBACK
    assert meeting.own_address("127.0.1.1", "node1") == "127.0.0.9"
    monkeypatch.undo()
    assert meeting.own_address("127.0.1.1", "no-such-host.invalid") == "127.0.1.1"
    assert "127.0.1.1 stays 127.0.1.1: Host 'no-such-host.invalid' is not found" in caplog.text


@pytest.mark.parametrize("address", ["192.0.2.1", "0.0.0.0", "no-such-host.invalid"])
def test_an_address_that_is_not_of_this_host(address: str) -> None:
    with pytest.raises(RuntimeError, match=f"Address '{address}' .*: set MASTER_ADDR to an address of"):
        meeting.own_address(address)


def test_a_port_that_is_not_for_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(meeting, "_listener", refuse)
    with pytest.raises(RuntimeError, match="Rank 0 cannot listen on 127.0.0.1, port 80 .* set MASTER_ADDR and"):
        meeting.open_store(LOOPBACK, 80, 2, LONG)
