"""What the ranks really talk over, from NCCL's own log; what cannot be known is said to be unknown.

NCCL tells it only with NCCL_DEBUG=INFO (NCCL_DEBUG_SUBSYS with INIT, NET and, for NVLink, GRAPH) and to a file that
NCCL_DEBUG_FILE names. `mirai train --expect-transport` sets those of them that the site has left unset.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_ACROSS = re.compile(r"\[(?:send|receive)\] via NET/([^/\s]+(?: [^/\s]+)*)/")
_INSIDE = re.compile(r"Channel \d+(?:/\d+)? : \d+\[\w+\] -> \d+\[\w+\] via (P2P|SHM)\b")
_PROVIDER = re.compile(r"NET/OFI Selected provider is (\w+)", re.IGNORECASE)
_GRAPH = re.compile(r"Pattern \d+,.* type (\w+)/\w+")


@dataclass(frozen=True)
class Seen:
    """Transports of one rank: to other hosts, and inside its own. `unknown`: why nothing can be said."""

    across: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    unknown: str = ""


def seen(backend: str, env: Mapping[str, str] = os.environ) -> Seen:
    """What this rank has talked over until now. backend: of the default process group."""
    if backend != "nccl":
        return Seen((backend,), (backend,))
    if env.get("NCCL_DEBUG", "").upper() not in ("INFO", "TRACE"):
        return Seen(unknown=f"NCCL_DEBUG is {env.get('NCCL_DEBUG') or 'not set'}: NCCL tells it only with INFO")
    if not env.get("NCCL_DEBUG_FILE"):
        return Seen(unknown="NCCL_DEBUG_FILE is not set: NCCL tells it where we cannot read it")
    file = log_file(env["NCCL_DEBUG_FILE"])
    if not file.exists():
        return Seen(unknown=f"NCCL wrote no {file}")
    return parse(file.read_text(errors="replace"))


def log_file(pattern: str) -> Path:
    """Where NCCL of this process writes: %h is the host name up to its first dot, %p the process."""
    host = socket.gethostname().split(".")[0]
    return Path(pattern.replace("%h", host).replace("%p", str(os.getpid())))


def parse(log: str) -> Seen:
    """Transports in the log of one rank's NCCL: ib, efa, socket or the network's own name; nvlink, pcie or shm."""
    provider = _PROVIDER.search(log)
    across = {_network(name, provider.group(1).lower() if provider else "") for name in _ACROSS.findall(log)}
    links = set(_GRAPH.findall(log))
    inside = {"shm" if way == "SHM" else _peer_access(links) for way in _INSIDE.findall(log)}
    if not across and not inside:
        return Seen(unknown="NCCL's log names no channel; it does with NCCL_DEBUG_SUBSYS=INIT,NET,GRAPH")
    return Seen(tuple(sorted(across)), tuple(sorted(inside)))


def _network(name: str, provider: str) -> str:
    if name.startswith("IB"):
        return "ib"  # IBext is a vendor's plugin; RoCE goes by the same name
    if "libfabric" in name.lower():
        return provider or "libfabric"
    return name.lower()


def _peer_access(links: set[str]) -> str:
    if not links:
        return "p2p"  # over NVLink or PCIe: only the graph search says which
    return "nvlink" if links == {"NVL"} else "pcie"


def wanted(env: Mapping[str, object], folder: Path) -> dict[str, str]:
    """NCCL's variables for its log in `folder`, those that the site has set left out."""
    ours = {
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT,NET,GRAPH",
        "NCCL_DEBUG_FILE": str(folder / "nccl-%h-%p.log"),
    }
    return {name: value for name, value in ours.items() if name not in env}
