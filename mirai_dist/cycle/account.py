"""What a finished run can say of itself: training curves, alarms, seconds a phase, and what produced its numbers."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mirai_dist.config import Resolved
from mirai_dist.config.digest import digest
from mirai_dist.config.jobs import Job
from mirai_dist.evaluate.charts import LineChart
from mirai_dist.evaluate.report import AlarmChange, Provenance, RunAlarms, StageCurves, Timing, series_of
from mirai_dist.method.health import GATES, bucket_names
from mirai_dist.observe.alarms import silence


@dataclass(frozen=True)
class Curve:
    """One chart of the report. One metric: a line an arm. Several that belong together: a line each, a chart an arm."""

    title: str
    metrics: tuple[str, ...]


TRAINED = ("teacher", "generator", "critic", "predictor")
# Heading -> its charts; a chart without data is left out.
CURVES = {
    "": [
        Curve("flow-matching loss", ("loss/flow",)),
        Curve("consistency loss", ("loss/consistency",)),
        Curve("ODE distillation loss", ("loss/ode",)),
        Curve("DMD loss", ("loss/dmd",)),
        Curve("mean |DMD gradient|", ("dmd_gradient",)),
        Curve("critic loss", ("loss/critic",)),
        Curve("foresight cosine, generator step", ("cosine/foresight",)),
        Curve("foresight cosine, replay", ("cosine/replay",)),
        Curve("generator gradient norm", ("grad_norm/generator",)),
    ],
    "samples": [
        Curve("spread of the latents", ("latents/all/std",)),
        Curve("channel means off the teacher's", ("drift/mean",)),
        Curve("spread relative to the teacher's", ("drift/std",)),
        Curve("motion relative to the teacher's", ("motion/relative",)),
        Curve("jump at segment boundaries", ("boundary_jump",)),
    ],
    "scores": [
        Curve("critic error, of a Gaussian's", ("critic_error/to_gaussian",)),
        Curve("critic error, of the teacher's", ("critic_error/to_teacher",)),
        Curve("critic x0 - teacher x0", ("score/gap",)),
        Curve("spread of the guided teacher's x0", ("score/guided_std",)),
        Curve("mean |DMD gradient| by timestep", tuple(f"dmd_gradient/{bucket}" for bucket in bucket_names())),
        Curve("critic error by timestep", tuple(f"critic_error/{bucket}" for bucket in bucket_names())),
    ],
    "updates": [
        Curve("predictor: update relative to weights", ("update_ratio/predictor",)),
        Curve("fraction of weights moved", tuple(f"moved/{role}" for role in TRAINED)),
        Curve("gates of the predictor", tuple(GATES)),
    ],
}
DRAWN = {"cycle", *(metric for charts in CURVES.values() for curve in charts for metric in curve.metrics)}
PACKAGES = ("torch", "numpy", "omegaconf", "rich", "tensorboard", "av", "mirai-dist")


def curves(jobs: Sequence[Job]) -> list[StageCurves]:
    """Curves of every stage, by heading; the dmd stage draws one line an arm and seed."""
    stages: dict[str, list[Job]] = {}
    for job in jobs:
        stages.setdefault(job.stage, []).append(job)
    found = []
    for stage, members in stages.items():
        runs = [(job.arm or stage, _drawn(job)) for job in members]
        for heading, group in CURVES.items():
            charts = [chart for curve in group for chart in _charts(curve, runs)]
            if charts:
                found.append(StageCurves(f"{stage}: {heading}" if heading else stage, charts))
    return found


Records = list[dict[str, Any]]


def _drawn(job: Job) -> Records:
    """The records of a job, less what no chart shows."""
    every = records(job.directory / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key in DRAWN} for record in every]


def _charts(curve: Curve, runs: Sequence[tuple[str, Records]]) -> list[LineChart]:
    """The charts of a curve that have data. runs: arm, or stage where there are no arms, and records; one a seed."""
    if len(curve.metrics) == 1:
        (metric,) = curve.metrics
        groups = {curve.title: [series_of(run, metric, name) for name, run in runs]}
    else:
        metric, groups = curve.metrics[0].partition("/")[0], {}
        for name, run in runs:
            lines = [series_of(run, each, each.rpartition("/")[2]) for each in curve.metrics]
            groups.setdefault(f"{curve.title}, {name}", []).extend(lines)
    drawn = {title: [line for line in lines if line.x] for title, lines in groups.items()}
    return [LineChart(title, "cycle", metric, lines, smoothing=0.9) for title, lines in drawn.items() if lines]


def alarms(jobs: Sequence[Job]) -> list[RunAlarms]:
    """What the alarms of every dmd stage, arm and seed said."""
    found = []
    for job in jobs:
        stage = job.recipe.stages[job.stage]
        if stage.kind == "dmd":
            said = [r for r in records(job.directory / "metrics.jsonl") if "alarm" in r]
            changes = [AlarmChange(r["cycle"], r[f"alarm/{r['alarm']}"] == 1.0, r["sentence"]) for r in said]
            found.append(RunAlarms(job.title, changes, silence(job.recipe.alarms, stage.cycles)))
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
