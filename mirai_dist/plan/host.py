"""The machine a run is about to start on, without torch: what its ranks may hold."""

from __future__ import annotations

import os
from pathlib import Path

from mirai_dist.plan.estimate import HOST_CONTEXT, Cluster
from mirai_dist.plan.gpus import Gpu, of_model

CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
DRIVER = Path("/proc/driver/nvidia/gpus")


def here(ranks: int, on_gpus: bool) -> Cluster:
    """This machine as a cluster of one node. On the CPU the ranks share its memory; a GPU that the table lacks has no
    limit here, and the ranks, who can ask it, check for themselves."""
    if on_gpus:
        return Cluster(1, ranks, driver_gpu())
    return cpu_cluster(1, ranks)


def cpu_cluster(nodes: int, ranks_a_node: int) -> Cluster:
    """CPU ranks that share the memory of their machines, all like this one."""
    return Cluster(nodes, ranks_a_node, memory=machine_memory() // ranks_a_node, context=HOST_CONTEXT)


def machine_memory(cgroups: tuple[Path, ...] = CGROUPS) -> int:
    """Bytes of this machine, or of the container that we are in where that is less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    texts = (path.read_text().strip() for path in cgroups if path.exists())
    return min([*found, *(int(text) for text in texts if text.isdigit())])


def driver_gpu(driver: Path = DRIVER) -> Gpu | None:
    """The first GPU as the driver calls it in /proc, if the table has it."""
    for path in sorted(driver.glob("*/information")):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                return of_model(value.strip())
    return None
