"""The network guard works, in this process and in processes started from it. (192.0.2.1 is reserved for documents.)"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import pytest

OUTSIDE = ("192.0.2.1", 80)


def refused() -> pytest.RaisesExc:
    return pytest.raises(RuntimeError, match="tests may not use the network")


def test_connections_to_other_machines_are_refused():
    with socket.socket() as sock, refused():
        sock.connect(OUTSIDE)
    with socket.socket() as sock, refused():
        sock.connect_ex(OUTSIDE)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, refused():
        sock.sendto(b"x", OUTSIDE)
    with refused():
        socket.create_connection(OUTSIDE, timeout=1)


def test_look_ups_of_other_machines_are_refused():
    with refused():
        socket.getaddrinfo("example.org", 443)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_allowed(host: str):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        accepting = threading.Thread(target=lambda: server.accept()[0].close(), daemon=True)
        accepting.start()
        socket.create_connection((host, server.getsockname()[1]), timeout=10).close()
        accepting.join(10)
        assert not accepting.is_alive()


def test_started_processes_are_guarded():
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "ForbiddenNetworkError" in done.stderr


NODES = (
    "import builtins, io, sitecustomize as guard\n"
    "builtins.open = lambda *_, **__: io.StringIO('10.111.1.11 t1 # t2\\n10.222.1.1 other\\n')\n"
    "print(*(host for host in ('10.111.1.7', '10.111.2.7', '8.8.8.8', 't1', 't2', 'other') if guard._is_local(host)))\n"
)


@pytest.mark.parametrize(
    ("network", "allowed"),
    [("10.111.1.0/24", "10.111.1.7 t1"), ("0.0.0.0/0", "10.111.1.7 10.111.2.7 t1 other"), (None, "")],
)
def test_nodes_of_the_test_cluster_reach_each_other_and_nobody_else(network: str | None, allowed: str):
    """The guard is asked, not tried: this machine has neither these addresses nor these names in /etc/hosts."""
    own = {"MIRAI_TEST_NETWORK": network} if network else {}
    done = subprocess.run([sys.executable, "-c", NODES], env={**os.environ, **own}, capture_output=True, text=True)
    assert done.stdout.strip() == allowed, done.stderr
