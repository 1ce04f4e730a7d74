"""What the system lets a process have: locked memory, files, processes, cores, shared memory; and its clock."""

from __future__ import annotations

import ctypes
import os
import resource
from dataclasses import dataclass
from pathlib import Path

from mirai_dist.node.finding import Finding

GIB = 1 << 30
_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)


@dataclass(frozen=True)
class Limits:
    """Soft limits of this process; None is unlimited. shm: bytes of /dev/shm, None where it cannot be written."""

    memlock: int | None
    open_files: int | None
    processes: int | None
    cores: int
    machine_cores: int
    shm: int | None


def read() -> Limits:
    """Limits of this very process: srun and torchrun may have given it others than a login shell has."""
    shm = Path("/dev/shm")
    status = os.statvfs(shm) if os.access(shm, os.W_OK) else None
    return Limits(
        memlock=_soft(resource.RLIMIT_MEMLOCK),
        open_files=_soft(resource.RLIMIT_NOFILE),
        processes=_soft(resource.RLIMIT_NPROC),
        cores=len(os.sched_getaffinity(0)),
        machine_cores=os.cpu_count() or 1,
        shm=status.f_frsize * status.f_blocks if status else None,
    )


def _soft(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def findings(limits: Limits, gpus: int, rdma: bool) -> list[Finding]:
    """gpus: on this node. rdma: whether it has InfiniBand, RoCE or EFA, which register memory."""
    return [
        affinity(limits),
        _memlock(limits.memlock, rdma),
        _shm(limits.shm, gpus),
        _count("open files (ulimit -n)", limits.open_files, 4096, "a rank holds sockets to its peers and data files"),
        _count("processes (ulimit -u)", limits.processes, 4096, "ranks and their threads count"),
    ]


def affinity(limits: Limits) -> Finding:
    """Whether this process is bound to one core of many: what srun does where --cpus-per-task is lost."""
    value = f"{limits.cores} of {limits.machine_cores}"
    if limits.cores == 1 < limits.machine_cores:
        advice = "all threads share it; give srun --cpus-per-task again (it does not inherit sbatch's)"
        return Finding("cores", "warn", value, advice)
    return Finding("cores", "ok", value)


def _memlock(memlock: int | None, rdma: bool) -> Finding:
    value = "unlimited" if memlock is None else f"{memlock >> 10} KiB"
    if rdma and memlock is not None and memlock < GIB:
        advice = "RDMA registers memory: ulimit -l unlimited (LimitMEMLOCK=infinity for slurmd)"
        return Finding("locked memory (ulimit -l)", "fail", value, advice)
    return Finding("locked memory (ulimit -l)", "ok", value)


def _shm(shm: int | None, gpus: int) -> Finding:
    if shm is None:
        return Finding("/dev/shm", "fail", "missing or not writable", "mount a tmpfs there")
    low = shm < (GIB if gpus else GIB // 16)
    advice = "NCCL and data loaders use it: docker --shm-size, or mount the host's" if low else ""
    return Finding("/dev/shm", "warn" if low else "ok", f"{shm / GIB:.3g} GiB", advice)


def _count(check: str, limit: int | None, needed: int, why: str) -> Finding:
    low = limit is not None and limit < needed
    value = "unlimited" if limit is None else str(limit)
    return Finding(check, "warn" if low else "ok", value, f"raise it to {needed} or more: {why}" if low else "")


def clock() -> Finding:
    """Whether the kernel's clock is kept by NTP or PTP, asked of adjtimex(2) (which changes nothing here)."""
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))
    if state < 0:
        return Finding("clock", "skip", f"adjtimex: {os.strerror(ctypes.get_errno())}: not checked")
    if state == _UNSYNCHRONISED:
        advice = "run chrony or ntpd, so that times in logs and checkpoints compare"
        return Finding("clock", "warn", "not synchronised", advice)
    return Finding("clock", "ok", "synchronised")
