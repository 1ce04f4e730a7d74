"""RUN/events.jsonl: what happened to a run over all its starts, one JSON object a line, appended as it happens.

    start      ranks, hosts, device, commit, recipe (digest), steps (empty: all), job, restart; host, pid of rank 0
    begun      stage, cycles, cycle: a stage (or arm and seed of one) begins, at this cycle
    resumed    stage, cycle, position, checkpoint
    saved      stage, cycle, position, checkpoint
    finished   stage, cycles: all its cycles are done
    alarm      name, up (true or false), text: one rose or cleared
    answered   request, name, by, answer: what became of a request (control.py)
    profiled   stage, cycle, rank, trace, bytes
    stopped    by, stage, cycle, position: saved first
    failed     host, rank, error, exit_code, record: the first rank of a start that failed
    done       the run, or its steps, came to their end

Every record has `time` (seconds since 1970) and `event`. What other files say is not repeated: curves are in
metrics.jsonl, tracebacks in logs/failure-rank-N.json, and which checkpoint is good in the checkpoints themselves.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "events.jsonl"
ENDS = ("stopped", "failed", "done")
_TAIL = 1 << 16  # bytes; far more than the events of the last minutes


@dataclass(frozen=True)
class Events:
    """The writer of a run's events; without a run directory (ranks but rank 0) it writes nothing."""

    run_dir: Path | None = None

    def write(self, event: str, **details: Any) -> None:
        """Append one record. Raises OSError."""
        if self.run_dir is not None:
            append(self.run_dir, event, **details)

    def relative(self, path: Path) -> str:
        """A path as records hold it: a run directory may be moved."""
        return os.path.relpath(path, self.run_dir) if self.run_dir else str(path)


def append(run_dir: Path, event: str, **details: Any) -> None:
    """Append one record, in one write, so that writers on several hosts do not mix. Raises OSError."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **details}) + "\n"
    descriptor = os.open(run_dir / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def append_end(run_dir: Path, event: str, **details: Any) -> None:
    """Append one of ENDS, unless this start has its end already: when one rank fails, a thousand follow.

    Raises OSError.
    """
    path = run_dir / FILE
    if path.exists():
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            recent = [each["event"] for each in _records(file.read().decode(errors="replace"))]
        if next((each for each in reversed(recent) if each in (*ENDS, "start")), "start") != "start":
            return
    append(run_dir, event, **details)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All records, oldest first; empty where there are none. A line cut short is left out."""
    path = run_dir / FILE
    return _records(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else []


def _records(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn: its writer was killed, or the read began inside it
        if isinstance(record, dict) and "event" in record and "time" in record:
            found.append(record)
    return found
