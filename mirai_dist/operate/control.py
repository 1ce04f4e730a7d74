"""Requests to a running job: RUN/control holds one file each, written by rename, so that two operators never
overwrite one another. The run answers in events.jsonl and removes the file.

    stop      save at the end of this position, or of cycle `after`, and end; RUN/HOLD keeps it from being requeued
    save      save at the end of this position and go on
    profile   record `cycles` cycles of rank `rank` with torch.profiler
    stacks    every rank dumps its stacks; a thread answers, so it works while the loop hangs

A request is for the start of the run that it was written to: whatever is left over is removed, and said to be
dropped, when a run starts or ends.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FOLDER = "control"
ALIVE = "alive"  # in FOLDER; rank 0 touches it while its process lives
HOLD = "HOLD"  # in the run directory: an operator stopped the run, nothing may requeue it
VERBS = ("stop", "save", "profile", "stacks")


@dataclass(frozen=True)
class Request:
    """One request. after: for stop, the number of cycles of `stage` after which to stop; 0: now. name: its file."""

    verb: str
    by: str = ""
    stage: str = ""
    after: int = 0
    cycles: int = 0
    rank: int = 0
    name: str = ""

    def answer(self, text: str) -> dict[str, Any]:
        """Fields of the `answered` event that ends this request."""
        return {"request": self.verb, "name": self.name, "by": self.by, "answer": text}


def operator() -> str:
    """Who asks: user@host."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def ask(run_dir: Path, request: Request) -> Request:
    """Write a request; returns it with its name. Raises OSError."""
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    name = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}-{request.verb}.json"
    beside = folder / f".{name}"
    beside.write_text(json.dumps({**asdict(request), "name": name}), encoding="utf-8")
    beside.replace(folder / name)
    return Request(**{**asdict(request), "name": name})


def pending(run_dir: Path) -> list[Request]:
    """Requests that are not answered yet, oldest first. One that cannot be read has an empty verb."""
    try:
        names = sorted(os.listdir(run_dir / FOLDER))
    except FileNotFoundError:
        return []
    return [_read(run_dir, name) for name in names if name.endswith(".json") and not name.startswith(".")]


def _read(run_dir: Path, name: str) -> Request:
    try:
        found = json.loads((run_dir / FOLDER / name).read_text(encoding="utf-8"))
        request = Request(**{**found, "name": name})
    except (OSError, ValueError, TypeError):
        return Request("", name=name)
    right = all(type(getattr(request, each.name)).__name__ == each.type for each in fields(Request))
    return request if right and request.verb in VERBS else Request("", name=name)


def remove(run_dir: Path, request: Request) -> None:
    """Take an answered request away."""
    (run_dir / FOLDER / request.name).unlink(missing_ok=True)


def open_for(run_dir: Path) -> list[Request]:
    """Make the folder ready for a run that starts or ends; returns what was left over, now removed."""
    (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    left = pending(run_dir)
    for request in left:
        remove(run_dir, request)
    return left


def hold(run_dir: Path, by: str) -> None:
    """Keep the run from being requeued until somebody starts it on purpose. Raises OSError."""
    beside = run_dir / f"{HOLD}.new"
    beside.write_text(f"stopped by {by} at {time.strftime('%Y-%m-%d %H:%M:%S')}\n", encoding="utf-8")
    beside.replace(run_dir / HOLD)


def held(run_dir: Path) -> str:
    """Who stopped the run for good, as RUN/HOLD says; empty when nobody did."""
    path = run_dir / HOLD
    return (path.read_text(encoding="utf-8").strip() or "HOLD") if path.exists() else ""


def release(run_dir: Path) -> None:
    """Somebody wants the run to go on: take HOLD away."""
    (run_dir / HOLD).unlink(missing_ok=True)
