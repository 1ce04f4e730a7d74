"""Where the raw output of a rank goes: what libraries print, warnings, tracebacks.

Rank 0 speaks on the console. A thousand others would bury it, so they write into RUN/logs/rank-N.out instead, a plain
file that survives any crash; only what guard.py says of a failure still reaches the console.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

LARGEST = 16 << 20  # bytes; the file and the one before it are kept

_console = 2  # descriptor of the console's standard error


class Outlet:
    """Standard output and error of this process; with rank 0 they stay as they are."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / "logs" / f"rank-{rank}.out" if rank else None

    def redirect(self) -> Outlet:
        """Write into the rank's file from now on. Raises OSError."""
        global _console
        if self._path is not None:
            _console = os.dup(2)
            self._open()
        return self

    def bound(self) -> None:
        """Begin a new file where this one has grown too large. Raises OSError."""
        if self._path is not None and self._path.stat().st_size > LARGEST:
            self._path.replace(self._path.with_suffix(".out.1"))
            self._open()
            os.write(2, b"mirai: continued; what came before is in the file of this name and .1\n")

    def _open(self) -> None:
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)


def tell_console(line: str) -> None:
    """One line on the console's standard error, wherever this process writes otherwise."""
    sys.stderr.flush()
    os.write(_console, f"{line}\n".encode())
