"""Folders that a run writes into: whether it may, how much room there is, and how fast it goes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from mirai_dist.node.finding import Finding

GIB = 1 << 30
_PIECE = 8 << 20  # bytes between two flushes
SIZE = 64 << 20  # bytes written
LONGEST = 5.0  # seconds after which no further piece is written


def scratch(env: Mapping[str, str]) -> Path:
    """Node-local scratch: what the site names, else /tmp."""
    return Path(env.get("SLURM_TMPDIR") or env.get("TMPDIR") or "/tmp")


def write_speed(folder: Path) -> float:
    """Bytes a second of incompressible data, flushed to the disk, into a file that is removed again.

    Raises OSError (naming the folder) where it cannot be written.
    """
    piece = os.urandom(_PIECE)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".mirai-write-") as file:
        begin = time.perf_counter()
        written = 0
        while written < SIZE and time.perf_counter() - begin < LONGEST:
            written += file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return written / (time.perf_counter() - begin)


def local(env: Mapping[str, str]) -> Finding:
    """Whether node-local scratch can be written."""
    folder = scratch(env)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"mirai")
    except OSError as error:
        return Finding("scratch", "fail", str(error), "name a writable folder of this node with TMPDIR")
    return _room("scratch", folder, "")


def checkpoints(folder: Path) -> tuple[float, Finding]:
    """Write speed of the checkpoint folder in bytes a second (0: it cannot be written), and what to say of it."""
    try:
        speed = write_speed(folder)
    except OSError as error:
        return 0.0, Finding("checkpoint folder", "fail", str(error), "name one that can be written")
    return speed, _room("checkpoint folder", folder, f", written at {speed / 1e6:.0f} MB/s")


def _room(check: str, folder: Path, more: str) -> Finding:
    status = os.statvfs(folder)
    free = status.f_frsize * status.f_bavail
    value = f"{folder}: {free / GIB:.1f} GiB free{more}"
    return Finding(check, "warn" if free < GIB else "ok", value, "make room" if free < GIB else "")
