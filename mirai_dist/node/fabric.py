"""InfiniBand, RoCE and EFA devices from sysfs, and whether the interfaces that the site names exist here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mirai_dist.node.finding import Finding


@dataclass(frozen=True)
class Port:
    """One port of an RDMA device. `kind`: InfiniBand, RoCE or EFA."""

    device: str
    kind: str
    active: bool
    state: str
    rate: str


def read_ports(root: Path = Path("/")) -> list[Port]:
    """Ports of all RDMA devices of this machine, by name."""
    found = []
    for device in sorted((root / "sys/class/infiniband").glob("*")):
        driver = (device / "device/driver").resolve().name
        for port in sorted((device / "ports").glob("*")):
            layer, state, rate = (_line(port / name) for name in ("link_layer", "state", "rate"))
            kind = "EFA" if driver == "efa" else "InfiniBand" if layer == "InfiniBand" else "RoCE"
            found.append(Port(device.name, kind, state.startswith("4"), state, rate))
    return found


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # some drivers refuse to tell the rate of a port that is down
        return ""


def summary(ports: list[Port]) -> str:
    """What must be alike on all nodes: `8 x InfiniBand 400 Gb/sec (4X NDR)`; active ports alone."""
    kinds = [f"{port.kind} {port.rate}".strip() for port in ports if port.active]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds))) or "none"


def findings(ports: list[Port], gpus: int, libraries: list[Path]) -> list[Finding]:
    """libraries: the NCCL files on the library path, of which EFA needs the plugin libnccl-net."""
    if not ports:
        level = "warn" if gpus else "skip"
        advice = "between nodes NCCL would use plain sockets" if gpus else ""
        return [Finding("fabric", level, "no InfiniBand or EFA device", advice)]
    down = [f"{port.device} is {port.state}" for port in ports if not port.active]
    rows = [Finding("fabric", "ok", summary(ports))]
    if down:
        rows.append(Finding("fabric ports", "warn", "; ".join(down), "fine if no cable is meant to be there"))
    if any(port.kind == "EFA" for port in ports) and not any("libnccl-net" in path.name for path in libraries):
        advice = "put aws-ofi-nccl's lib folder on LD_LIBRARY_PATH, or NCCL uses plain sockets"
        rows.append(Finding("EFA plugin", "warn", "EFA devices, and no libnccl-net on the library path", advice))
    return rows


def interfaces(env: Mapping[str, str], root: Path = Path("/")) -> list[Finding]:
    """Whether NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name interfaces that this machine has."""
    here = sorted(path.name for path in (root / "sys/class/net").glob("*"))
    rows = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = env.get(variable, "")
        if not value or value.startswith("^"):
            continue
        exact = variable.startswith("GLOO") or value.startswith("=")
        names = value.removeprefix("=").split(",")
        found = [name for name in here if (name in names if exact else name.startswith(tuple(names)))]
        level, advice = ("ok", "") if found else ("fail", f"this machine has {', '.join(here)}")
        rows.append(Finding(variable, level, value if found else f"{value}: no such interface", advice))
    return rows
