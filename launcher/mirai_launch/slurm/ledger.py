"""The jobs of a run: `RUN/slurm/jobs.jsonl`, one JSON object a line, appended by whoever submits."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

LEDGER = Path("slurm") / "jobs.jsonl"


@dataclass(frozen=True)
class Submission:
    """One job that was submitted for a run.

    step: of the recipe's pipeline, or "all". submitted: seconds since 1970. cluster, script: paths; the script is the
    rendered one, relative to the run directory. after: ids of the jobs it waits for.
    """

    job_id: str
    step: str
    submitted: float
    cluster: str
    nodes: int
    script: str
    after: tuple[str, ...] = ()


def append(run_dir: Path, submission: Submission) -> None:
    """Add one line, at once on disk: a job that nobody knows of holds nodes."""
    path = run_dir / LEDGER
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(submission)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(run_dir: Path) -> list[Submission]:
    """All submissions of a run, oldest first; empty where none was made. A line cut short is left out."""
    path = run_dir / LEDGER
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            entry = json.loads(line)
            found.append(Submission(**{**entry, "after": tuple(entry["after"])}))
    return found
