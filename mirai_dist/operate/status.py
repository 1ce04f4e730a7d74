"""Where a run stands, derived from what it has written; nothing here is stored, and nothing is changed.

    not started   no start is on record
    running       its last start has no end, and it gives signs of life
    stale         its last start has no end, and it gives none
    stopped       it saved and left; it can go on
    failed        an error ended it
    done          it came to its end

What is queued, or has nodes and has not started yet, only the scheduler knows (mirai_launch/operating.py).
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirai_dist.config import RecipeError, load
from mirai_dist.config.jobs import Job, is_done, jobs
from mirai_dist.operate import control, events
from mirai_dist.state import commit

SLOW = "slow rank"  # how the names of alarms on ranks begin (cycle/watch.py)
LIFELESS = 60.0  # seconds without a sign of life after which a run is stale
_RECENT = 20  # cycles whose median is the pace
_TAIL = 1 << 20  # bytes of metrics.jsonl; some hundred records


@dataclass(frozen=True)
class Failure:
    """The first rank of the last start that failed; `error` is one line."""

    host: str
    rank: int
    error: str
    time: float


@dataclass(frozen=True)
class Status:
    """A run at one moment. Times are seconds since 1970, durations seconds; None: not known (yet).

    stage: title of the stage (or arm and seed of one) it is in, `cycle` of `cycles` done there. checkpoint: newest
    complete one of the run. eta: to the end of that stage. last_position: when the last position ended. rank_hours:
    ranks times hours over all starts, GPU-hours where `device` is cuda. hold: who stopped it for good. requests: not
    answered yet. started: when the last start began. job_id: of SLURM; host, pid: of rank 0.
    """

    run_dir: str
    state: str
    why: str
    stage: str = ""
    cycle: int = 0
    cycles: int = 0
    seconds_per_cycle: float | None = None
    eta: float | None = None
    last_position: float | None = None
    checkpoint: str = ""
    jobs_done: int = 0
    jobs: int = 0
    starts: int = 0
    ranks: int = 0
    hosts: tuple[str, ...] = ()
    device: str = ""
    rank_hours: float = 0.0
    failure: Failure | None = None
    alarms: tuple[str, ...] = ()
    hold: str = ""
    requests: tuple[str, ...] = ()
    started: float | None = None
    job_id: str = ""
    host: str = ""
    pid: int = 0

    @property
    def ended(self) -> bool:
        """Whether nothing runs that could take a request."""
        return self.state not in ("running", "stale")


def of(run_dir: Path, now: float | None = None) -> Status:
    """The state of a run. Raises RecipeError for a directory that holds none."""
    now = time.time() if now is None else now
    every = members(run_dir)
    history = events.read(run_dir)
    starts = split(history)
    job = _present(every, starts[-1] if starts else [])
    records = _records(job.directory / "metrics.jsonl") if job else []
    signs = [_modified(run_dir / control.FOLDER / control.ALIVE), history[-1]["time"] if history else 0.0]
    signs.append(records[-1]["time"] if records else 0.0)
    state, why = _state(starts[-1] if starts else [], now - max(signs), all(map(is_done, every)))
    pace = _pace(records)
    cycle = _cycle(job, records)
    running = starts[-1][0] if starts else {}
    return Status(
        run_dir=str(run_dir),
        state=state,
        why=why,
        stage=job.title if job else "",
        cycle=cycle,
        cycles=job.cycles if job else 0,
        seconds_per_cycle=pace,
        eta=pace * (job.cycles - cycle) if job and pace is not None and state == "running" else None,
        last_position=records[-1]["time"] if records else None,
        checkpoint=_newest_checkpoint(run_dir, every, job),
        jobs_done=sum(map(is_done, every)),
        jobs=len(every),
        starts=len(starts),
        ranks=running.get("ranks", 0),
        hosts=tuple(running.get("hosts", ())),
        device=running.get("device", ""),
        rank_hours=_rank_hours(starts, max(signs)),
        failure=_failure(run_dir, starts[-1] if starts else []),
        alarms=_alarms(history),
        hold=control.held(run_dir),
        requests=tuple(f"{each.verb or 'unreadable'} by {each.by}" for each in control.pending(run_dir)),
        started=running.get("time"),
        job_id=running.get("job", ""),
        host=running.get("host", ""),
        pid=running.get("pid", 0),
    )


def members(run_dir: Path) -> list[Job]:
    """The training runs of a run directory, by the recipe in it. Raises RecipeError where there is none."""
    if not run_dir.is_dir():
        raise RecipeError(str(run_dir), "is no run directory; name one that mirai train or mirai submit has made")
    written = [run_dir / "recipe.yaml", *sorted(run_dir.glob("slurm/*/recipe.yaml"), reverse=True)]  # of a start, a job
    recipe = next((path for path in written if path.exists()), None)
    if recipe is None:
        raise RecipeError(str(run_dir), "holds no recipe.yaml, so no run was started in it; see mirai train --help")
    return list(jobs(load(recipe), run_dir))


def split(history: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The events of each start, in order."""
    starts: list[list[dict[str, Any]]] = []
    for record in history:
        if record["event"] == "start":
            starts.append([])
        if starts:
            starts[-1].append(record)
    return starts


def _state(start: Sequence[dict[str, Any]], silence: float, trained: bool) -> tuple[str, str]:
    if not start:
        return "not started", "no start is on record"
    end = next((each for each in start if each["event"] in events.ENDS), None)
    if end is None:
        gone = "; its process is gone" if _gone(start[0]) else ""
        if gone or silence > LIFELESS:
            return "stale", f"no sign of life for {_duration(silence)}{gone}"
        return "running", f"sign of life {_duration(silence)} ago"
    if end["event"] == "stopped":
        return "stopped", f"by {end['by']}"
    steps = start[0].get("steps", [])
    if end["event"] == "done" and steps and not trained:
        return "stopped", f"after {', '.join(steps)}, which it was started for"
    return end["event"], end.get("error", "")


def _gone(start: dict[str, Any]) -> bool:
    """Whether rank 0 ran on this machine and does no more."""
    return start["host"] == socket.gethostname() and not Path(f"/proc/{start['pid']}").exists()


def _present(every: Sequence[Job], start: Sequence[dict[str, Any]]) -> Job | None:
    """The job that the last start was in, else the first that is not done, else the last."""
    begun = [each["stage"] for each in start if each["event"] == "begun"]
    by_title = {job.title: job for job in every}
    if begun and begun[-1] in by_title:
        return by_title[begun[-1]]
    return next((job for job in every if not is_done(job)), every[-1] if every else None)


def _records(path: Path) -> list[dict[str, Any]]:
    """The last records of a metrics.jsonl; a torn last line is left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().decode(errors="replace").split("\n")
    whole = lines[1:-1] if path.stat().st_size > _TAIL else lines[:-1]
    return [json.loads(line) for line in whole]


def _pace(records: Sequence[dict[str, Any]]) -> float | None:
    seconds = [float(record["seconds"]) for record in records if "seconds" in record]
    return statistics.median(seconds[-_RECENT:]) if seconds else None


def _cycle(job: Job | None, records: Sequence[dict[str, Any]]) -> int:
    """Cycles done: a record with `seconds` closes its cycle."""
    closed = [int(record["cycle"]) + 1 for record in records if "seconds" in record]
    if closed:
        return closed[-1]
    return job.cycles if job and is_done(job) and not records else 0


def _newest_checkpoint(run_dir: Path, every: Sequence[Job], job: Job | None) -> str:
    """Newest complete checkpoint of the present job, else of the latest one before it that has any."""
    before = every[: every.index(job) + 1] if job else every
    for each in reversed(before):
        whole = commit.complete(each.directory / "checkpoints")
        if whole:
            return os.path.relpath(whole[-1], run_dir)
    return ""


def _rank_hours(starts: Sequence[Sequence[dict[str, Any]]], last_sign: float) -> float:
    total = 0.0
    for number, start in enumerate(starts, start=1):
        end = start[-1]["time"] if number < len(starts) or start[-1]["event"] in events.ENDS else last_sign
        total += start[0]["ranks"] * max(0.0, end - start[0]["time"]) / 3600
    return total


def _failure(run_dir: Path, start: Sequence[dict[str, Any]]) -> Failure | None:
    """The first failure since the last start began, or before it could begin (ranks that did not find each other)."""
    since = start[0]["time"] if start else 0.0
    found = [
        Failure(each["host"], each["rank"], each["error"], each["time"]) for each in start if each["event"] == "failed"
    ]
    for path in (run_dir / "logs").glob("failure-rank-*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["time"] >= since:
            error = " ".join(f"{record['type']}: {record['message']}".split())
            found.append(Failure(record["host"], record["rank"], error, record["time"]))
    return min(found, key=lambda each: each.time, default=None)


def _alarms(history: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Sentences of the alarms that are up. They belong to a stage; a resumed one does not raise again what is up."""
    up: dict[str, str] = {}
    stage = ""
    for each in history:
        if each["event"] == "begun":
            gone = [name for name in up if each["stage"] != stage or name.startswith(SLOW)]  # other ranks, perhaps
            stage = each["stage"]
            for name in gone:
                del up[name]
        if each["event"] == "alarm":
            up.pop(each["name"], None)
            up |= {each["name"]: each["text"]} if each["up"] else {}
    return tuple(up.values())


def _modified(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _duration(seconds: float) -> str:
    """42 s, 3 min, 2 h 07 min, 3 days."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min" if whole < 2 * 86400 else f"{whole // 86400} days"


def lines(status: Status, queue: Sequence[str] = (), now: float | None = None) -> list[str]:
    """The status on one screen, and what to do next. queue: what the scheduler says of its jobs."""
    now = time.time() if now is None else now
    rows = [("state", f"{status.state}{f': {status.why}' if status.why else ''}")]
    rows += [("job", job) for job in queue]
    if status.hold:
        rows.append(("hold", f"{status.hold}; it is not requeued"))
    if status.stage:
        rows.append(("stage", f"{status.stage}, cycle {status.cycle} of {status.cycles}; {_of_jobs(status)}"))
    if status.seconds_per_cycle is not None:
        rows.append(("pace", _pace_line(status, now)))
    rows.append(("checkpoint", status.checkpoint or "none"))
    if status.starts:
        rows.append(("spent", _spent(status)))
    if status.failure and status.state != "done":
        rows.append(("failed", f"{status.failure.host}:{status.failure.rank} {status.failure.error}"))
    rows += [("alarm", alarm) for alarm in status.alarms if status.state != "done"]
    rows += [("asked", request) for request in status.requests]
    rows += [("next", command) for command in following(status)]
    return [f"{name:<10} {text}" for name, text in rows]


def _of_jobs(status: Status) -> str:
    return f"{status.jobs_done} of {status.jobs} trained" if status.jobs > 1 else "the only one"


def _pace_line(status: Status, now: float) -> str:
    assert status.seconds_per_cycle is not None
    parts = [f"{status.seconds_per_cycle:.3g} s a cycle"]
    if status.eta is not None:
        parts.append(f"stage done in {_duration(status.eta)}")
    if status.last_position is not None and status.state in ("running", "stale"):
        parts.append(f"last position ended {_duration(now - status.last_position)} ago")
    return ", ".join(parts)


def _spent(status: Status) -> str:
    unit = "GPU-hours" if status.device == "cuda" else "rank-hours"
    hosts = ", ".join(status.hosts[:4]) + (f" and {len(status.hosts) - 4} more" if len(status.hosts) > 4 else "")
    restarts = f"{status.starts - 1} restart{'s' if status.starts != 2 else ''}"
    return f"{status.rank_hours:.3g} {unit}, {restarts}; {status.ranks} ranks on {hosts}"


def following(status: Status) -> list[str]:
    """The commands that make sense now."""
    run = status.run_dir
    again = f"mirai requeue {run}" if status.job_id else _train(status)
    return {
        "not started": [again],
        "queued": [f"mirai cancel {run}"],
        "starting": [f"mirai status {run}", f"mirai cancel {run}"],
        "running": [f"mirai logs {run} --follow", f"mirai stop {run}"],
        "stale": [f"mirai stacks {run}", f"mirai logs {run}", f"mirai cancel {run}", again],
        "stopped": [again],
        "failed": [f"mirai logs {run} --errors", again],
        "done": [f"open {run}/report.html"] if (Path(run) / "report.html").exists() else [],
    }[status.state]


def _train(status: Status) -> str:
    ranks = f" --nproc {status.ranks}" if status.ranks else ""
    return f"mirai train {status.run_dir}/recipe.yaml --run-dir {status.run_dir}{ranks}"
