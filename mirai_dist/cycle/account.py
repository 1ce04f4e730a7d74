"""What a finished run can say of itself: training curves, seconds a phase, and what produced its numbers."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mirai_dist.config import Resolved
from mirai_dist.config.digest import digest
from mirai_dist.config.jobs import Job
from mirai_dist.evaluate.charts import LineChart
from mirai_dist.evaluate.report import Provenance, StageCurves, Timing, read_series

CURVES = {
    "loss/flow": "flow-matching loss",
    "loss/consistency": "consistency loss",
    "loss/ode": "ODE distillation loss",
    "loss/dmd": "DMD loss",
    "dmd_gradient": "mean |DMD gradient|",
    "loss/critic": "critic loss",
    "cosine/foresight": "foresight cosine, generator step",
    "cosine/replay": "foresight cosine, replay",
    "grad_norm/generator": "generator gradient norm",
}
PACKAGES = ("torch", "numpy", "omegaconf", "rich", "tensorboard", "av", "mirai-dist")


def curves(jobs: Sequence[Job]) -> list[StageCurves]:
    """Curves of every stage; the dmd stage draws one line an arm and seed."""
    stages: dict[str, list[Job]] = {}
    for job in jobs:
        stages.setdefault(job.stage, []).append(job)
    found = []
    for stage, members in stages.items():
        charts = []
        for metric, title in CURVES.items():
            series = [read_series(job.directory / "metrics.jsonl", metric, job.arm or stage) for job in members]
            series = [line for line in series if line.x]
            if series:
                charts.append(LineChart(title, "cycle", metric, series, smoothing=0.9))
        found.append(StageCurves(stage, charts))
    return found


def timings(jobs: Sequence[Job]) -> list[Timing]:
    """Mean seconds of a cycle by phase: each stage, and each arm of the dmd stage over its seeds."""
    spent: dict[str, list[dict[str, float]]] = {}
    for job in jobs:
        cycles = [r for r in records(job.directory / "metrics.jsonl") if "seconds" in r]
        # the first cycle allocates and warms up
        spent.setdefault(job.arm or job.stage, []).extend(cycles[1:] or cycles)
    found = []
    for label, cycles in spent.items():
        names = [n for n in dict.fromkeys(n for c in cycles for n in c) if n.startswith("seconds/")]
        means = {n.removeprefix("seconds/"): sum(float(c.get(n, 0.0)) for c in cycles) / len(cycles) for n in names}
        found.append(Timing(label, means))
    return found


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a metrics.jsonl."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def provenance(resolved: Resolved, jobs: Sequence[Job], report_seconds: float) -> Provenance:
    """Command, commit, machine, versions, and seconds of every job."""
    return Provenance(
        command=shlex.join(["python", "-m", "mirai_dist", *sys.argv[1:]]),
        commit=commit_of_code(),
        machine=f"{platform.machine()}, {cpu_count()} cores, Python {platform.python_version()}",
        recipe_digest=digest(resolved.recipe),
        versions={name: metadata.version(name) for name in PACKAGES if _installed(name)},
        stage_seconds=seconds(jobs) | {"report": report_seconds},
    )


def seconds(jobs: Sequence[Job]) -> dict[str, float]:
    """Seconds that every job took, by its title; of one that was interrupted, those after the interruption."""
    return {job.title: json.loads((job.directory / "DONE").read_text())["seconds"] for job in jobs}


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def commit_of_code() -> str:
    """Commit of the source tree, marked when it has uncommitted changes; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    return commit + (" with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
