"""Refuses every connection that leaves this machine, in any Python process that has this folder on its PYTHONPATH.

tests/plugin_no_network.py puts it there for the whole test session, so that the training processes the tests start
are guarded as the tests themselves are.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any

# The private network of the SLURM cluster that tests/slurm starts on this machine; only its nodes have the variable.
_NODES = os.environ.get("MIRAI_TEST_NETWORK")
_LOCAL_NAMES = {"localhost", "", socket.gethostname()}
_socket = socket.socket
_getaddrinfo = socket.getaddrinfo


class ForbiddenNetworkError(RuntimeError):
    """Not an OSError: code that shrugs off an unreachable network must fail here too."""


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host is None or host in _LOCAL_NAMES:
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        if _NODES and any(_is_node(each) for each in _addresses_in_hosts_file(str(host))):
            return True
        return host == socket.getfqdn()  # may ask a name server about this host, so only before a refusal
    return address.is_loopback or address.is_unspecified or _is_node(address) or str(address) in _own_addresses()


def _is_node(address: Any) -> bool:
    address = getattr(address, "ipv4_mapped", None) or address
    return bool(_NODES) and address.is_private and address in ipaddress.ip_network(str(_NODES))


def _addresses_in_hosts_file(name: str) -> list[Any]:
    """Addresses of a name in /etc/hosts: no name server is asked."""
    with open("/etc/hosts", encoding="utf-8") as file:
        lines = [line.partition("#")[0].split() for line in file]
    return [ipaddress.ip_address(words[0]) for words in lines if name in words[1:]]


def _own_addresses() -> set[str]:
    """Addresses of this host's own name: gloo ranks on one machine find each other through it."""
    try:
        return {str(info[4][0]) for info in _getaddrinfo(socket.gethostname(), None)}
    except OSError:
        return set()


def _check(family: int, address: Any) -> None:
    if family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
        raise ForbiddenNetworkError(f"tests may not use the network: connection to {address[0]}:{address[1]}")


class GuardedSocket(_socket):
    """A socket that connects and sends to this machine only."""

    def connect(self, address: Any, /) -> None:
        _check(self.family, address)
        super().connect(address)

    def connect_ex(self, address: Any, /) -> int:
        _check(self.family, address)
        return super().connect_ex(address)

    def sendto(self, data: Any, *rest: Any) -> int:
        _check(self.family, rest[-1])
        return super().sendto(data, *rest)


def _guarded_getaddrinfo(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
    if not _is_local(host):
        raise ForbiddenNetworkError(f"tests may not use the network: look-up of {host!r}")
    return _getaddrinfo(host, port, *rest, **named)


def install() -> None:
    """Guard this process; a second call changes nothing."""
    socket.socket = GuardedSocket
    socket.getaddrinfo = _guarded_getaddrinfo


install()
