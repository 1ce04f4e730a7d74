"""Everything about this node that can be known without torch, gathered once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mirai_dist.node import fabric, gpus, limits, software, storage
from mirai_dist.node.finding import Finding


@dataclass(frozen=True)
class Node:
    """`same`: must be alike on all nodes of a run; `usual`: usually is; `findings`: what is good or bad by itself."""

    name: str
    gpus: int
    same: dict[str, str]
    usual: dict[str, str]
    findings: list[Finding]


def examine(env: Mapping[str, str] = os.environ) -> Node:
    """Look at this node."""
    driver, ports = gpus.ask_driver(), fabric.read_ports()
    libraries = software.library_path(env)
    devices = ", ".join(sorted({gpu.name for gpu in driver.gpus}))
    same = software.versions() | {
        "gpus": f"{len(driver.gpus)} x {devices}" if driver.gpus else "none",
        "fabric": fabric.summary(ports),
    }
    usual = software.paths() | software.settings(env) | {
        "driver": driver.version or "none",
        "kernel": os.uname().release,
        "NCCL library": next((str(each) for each in libraries if each.name.startswith("libnccl.so")), "none"),
    }
    found = [
        *gpus.findings(driver, gpus.read_xids() if driver.gpus else [], gpus.on_the_bus()),
        *fabric.findings(ports, len(driver.gpus), libraries),
        *fabric.interfaces(env),
        software.nccl(libraries),
        *limits.findings(limits.read(), len(driver.gpus), bool(ports)),
        limits.clock(),
        storage.local(env),
        *software.surroundings(env),
    ]
    return Node(software.node_name(env), len(driver.gpus), same, usual, found)
