"""The store of rank 0, where the ranks meet, opened without racing for a TCP port.

Rank 0 opens the store first and tells its port afterwards, so at no moment can another process take that port. The
store listens on one address of its host: whoever reaches it there can read and change what the ranks tell each other.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch has it, its stubs do not

DEFAULT_TIMEOUT = timedelta(minutes=5)
ANY_PORT = 0
DISCARD_PORT = 9
BACKLOG = 1024

logger = logging.getLogger(__name__)


def port_is_taken(error: dist.DistNetworkError) -> bool:
    """Whether a store could not open because another process listens on its port."""
    return "EADDRINUSE" in str(error)


def own_address(address: str, other_host: str | None = None) -> str:
    """The numeric address of this host that ``address`` stands for, on which other hosts reach it.

    Args:
        address: a name or an address of this host.
        other_host: another host of the job. Many systems give a host's own name an address that no other host reaches
            (127.0.1.1); this host's address towards ``other_host`` takes its place.

    Raises:
        RuntimeError: ``address`` is not found, or is no address of this host.
    """
    try:
        found = list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(address, None)))
    except OSError as error:
        raise RuntimeError(
            f"Address {address!r} is not found ({error}): set MASTER_ADDR to an address of rank 0's host."
        ) from error
    if other_host is not None and all(_is_loopback(candidate) for candidate in found):
        try:
            found = [address_towards(other_host)]
        except RuntimeError as error:
            logger.info("%s stays %s: %s", address, found[0], error)
    ours = [candidate for candidate in found if _is_ours(candidate)]
    if not ours:
        raise RuntimeError(
            f"Address {address!r} ({', '.join(found)}) is none of {socket.gethostname()}, the host of rank 0: set "
            "MASTER_ADDR to an address of that host."
        )
    return ours[0]


def address_towards(host: str) -> str:
    """The address under which another host sees this one; a UDP connect sends no packet.

    Raises:
        RuntimeError: ``host`` is not found, or is this one.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, DISCARD_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise RuntimeError(
            f"Host {host!r} is not found ({error}): set MASTER_ADDR to an address of rank 0's host."
        ) from error
    if _is_loopback(address):
        raise RuntimeError(f"Host {host!r} resolves to this one: set MASTER_ADDR to an address of rank 0's host.")
    return address


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _is_ours(address: str) -> bool:
    """Whether this host can listen on an address. On all of its addresses at once is no answer."""
    if ipaddress.ip_address(address).is_unspecified:
        return False
    with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, ANY_PORT))
        except OSError:
            return False
    return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def open_store(address: str, port: int, world_size: int, timeout: timedelta) -> TCPStore:
    """Opens the store of rank 0 on ``port``, or on a free one if that is taken or 0; ``store.port`` tells which.

    Args:
        address: numeric address of this host. Nothing listens on its other addresses.
        port: TCP port, or 0.
        world_size: number of ranks.
        timeout: of the store's calls.

    Raises:
        RuntimeError: this host cannot listen there.
    """
    try:
        listener = _listener(address, port)
    except OSError as error:
        if port == ANY_PORT or error.errno != errno.EADDRINUSE:
            raise RuntimeError(
                f"Rank 0 cannot listen on {address}, port {port} ({error}): set MASTER_ADDR and MASTER_PORT to an "
                "address and a free port of its host."
            ) from error
        listener = _listener(address, ANY_PORT)
        logger.warning("MASTER_PORT=%d is taken on this host: using port %d instead.", port, listener.getsockname()[1])
    # multi_tenant: a later env:// in this process then shares the server instead of finding its port taken.
    return TCPStore(
        address,
        listener.getsockname()[1],
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


def _listener(address: str, port: int) -> socket.socket:
    return socket.create_server((address, port), family=_family(address), backlog=BACKLOG)


def join_store(address: str, port: int, world_size: int, timeout: timedelta) -> TCPStore:
    """Connects to the open store of rank 0."""
    return TCPStore(address, port, world_size, is_master=False, timeout=timeout, wait_for_workers=False)
