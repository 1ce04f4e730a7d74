"""Run by the batch script before and after its step: `python -m mirai_launch.slurm.attempt begin|end ...`.

begin   takes away the STOP file that ended the attempt before, and refuses one more where several left nothing
end     decides what becomes of the job, queues it again if so, says it on one screen, returns the exit code
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mirai_dist.config import rundir
from mirai_dist.operate import control
from mirai_dist.state import commit
from mirai_launch import console
from mirai_launch.slurm import ending
from mirai_launch.slurm.client import Scheduler, SchedulerError
from mirai_launch.slurm.ending import Decision, Ending, Failure

ATTEMPTS = Path("slurm") / "attempts.jsonl"
STOP = "STOP"  # the run saves and leaves


@dataclass(frozen=True)
class Attempt:
    """One start of a job. `progress`: what the run directory held then. `started`: seconds since 1970."""

    job: str
    restart: int
    nodes: str
    started: float
    progress: str


def job_of(env: Mapping[str, str]) -> str:
    """Id of this job; of an element of an array its own, not the array's."""
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def progress(run_dir: Path) -> str:
    """What a run has come to: its finished stages, newest whole checkpoints and trajectories, as one line."""
    roots = {path.parent for path in rundir.checkpoints(run_dir)}
    newest = [str(whole[-1].relative_to(run_dir)) for root in sorted(roots) if (whole := commit.complete(root))]
    done = sorted(str(path.relative_to(run_dir)) for path in run_dir.glob("stages/**/DONE"))
    pairs = len([path for path in run_dir.glob("stages/*/pairs/*") if ".new" not in path.name])
    return " ".join([*newest, *done, *([f"pairs:{pairs}"] if pairs else [])])


def read(run_dir: Path) -> list[Attempt]:
    """All attempts of a run, oldest first; a line cut short is left out."""
    path = run_dir / ATTEMPTS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [Attempt(**json.loads(line)) for line in lines if line.endswith("\n")]


def fruitless(attempts: Sequence[Attempt], job: str, now: str) -> int:
    """Attempts of this job in a row, newest first, that began with what the run has now."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.job != job or attempt.progress != now:
            break
        count += 1
    return count


def begin(run_dir: Path, cap: int, env: Mapping[str, str]) -> int:
    """Note the attempt. Returns 0, or 20 where it must not start."""
    job, restart, now = job_of(env), int(env.get("SLURM_RESTART_COUNT", "0")), progress(run_dir)
    (run_dir / STOP).unlink(missing_ok=True)
    why = control.held(run_dir) or ending.exhausted(fruitless(read(run_dir), job, now), cap)
    if why:
        console.say(f"mirai: job {job} does not start again: {why}")
        return ending.DO_NOT_REQUEUE
    _put_away(run_dir / "logs")
    attempt = Attempt(job, restart, env.get("SLURM_JOB_NODELIST", ""), time.time(), now)
    path = run_dir / ATTEMPTS
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")
    count = f", restart {restart}" if restart else ""
    console.say(f"mirai: job {job}{count} on {attempt.nodes}, run directory {run_dir}")
    return 0


def _put_away(logs: Path) -> None:
    """Records of earlier attempts, so that those of this one are recognised without comparing clocks."""
    for record in logs.glob("failure-rank-*.json"):
        folder = logs / "earlier"
        folder.mkdir(exist_ok=True)
        record.replace(folder / f"{int(record.stat().st_mtime)}-{record.name}")


def end(run_dir: Path, cap: int, code: int, terminated: bool, env: Mapping[str, str]) -> int:
    """Decide, act, tell. Returns the batch script's exit code; 10 where the job is queued again."""
    job, scheduler = job_of(env), Scheduler()
    attempts, now = read(run_dir), progress(run_dir)
    own = next((attempt for attempt in reversed(attempts) if attempt.job == job), None)
    facts = Ending(
        code=code,
        terminated=terminated,
        stop=_stop(run_dir),
        failures=ending.first_of(failures(run_dir / "logs")),
        progressed=own is not None and own.progress != now,
        fruitless=fruitless(attempts, job, now),
        cap=cap,
        running=code == 0 or terminated or _running(scheduler, job),
    )
    decision = ending.decide(facts)
    outcome = _requeue(scheduler, job, decision) if decision.exit_code == ending.REQUEUE else ""
    for line in summary(run_dir, job, decision, outcome, now):
        console.say(line)
    return ending.DO_NOT_REQUEUE if outcome.startswith("NOT") else decision.exit_code


def _stop(run_dir: Path) -> str:
    """Who asked the run to stop: "" nobody, ending.WARNED the batch script, anything else a person."""
    if control.held(run_dir):
        return control.HOLD
    stop = run_dir / STOP
    return (stop.read_text(encoding="utf-8").split() or [STOP])[0] if stop.exists() else ""


def failures(logs: Path) -> list[Failure]:
    """Records that the ranks of this attempt left; a rank that was killed leaves none."""
    found = []
    for path in sorted(logs.glob("failure-rank-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        suspects = tuple(record.get("suspects", ()))
        found.append(Failure(record["rank"], record["host"], record["exit_code"], record["message"], suspects))
    return found


def _running(scheduler: Scheduler, job: str) -> bool:
    """Whether the scheduler counts the job as running: of a cancelled one it knows before the script hears of it."""
    found = scheduler.job(job)
    return found is not None and found.state in ("RUNNING", "SIGNALING")


def _requeue(scheduler: Scheduler, job: str, decision: Decision) -> str:
    """Queue the job again; says what came of it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it as soon as the job is back in the queue
    try:
        scheduler.requeue(job)
        if decision.exclude:
            scheduler.exclude(job, decision.exclude)  # refused while the job was running
    except SchedulerError as error:
        return f"NOT queued again as it should be: {error}"
    without = f" without {', '.join(decision.exclude)}" if decision.exclude else ""
    return f"queued again as job {job}{without}"


def summary(run_dir: Path, job: str, decision: Decision, outcome: str, now: str) -> list[str]:
    """One screen: what happened, what there is, what to do."""
    checkpoints = [word for word in now.split() if "checkpoints/" in word]
    state = outcome or ("done" if decision.exit_code == ending.DONE else "down, not queued again")
    if decision.exit_code == ending.DONE:
        following = [f"report, if the recipe makes one: {run_dir / 'report.html'}"]
    elif outcome and not outcome.startswith("NOT"):
        following = [f"squeue -j {job}", f"to keep it down: scancel {job}"]
    else:
        following = [f"to go on from the last checkpoint: mirai requeue {run_dir}, or mirai submit again"]
    rows = [
        ("job", f"{job}: {state}"),
        ("because", decision.why),
        ("checkpoint", ", ".join(checkpoints) or "none"),
        ("records", str(run_dir / "logs")),
        *(("next", line) for line in following),
    ]
    return [f"mirai: {label:<10} {text}" for label, text in rows]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line; the batch script writes it."""
    parser = argparse.ArgumentParser(prog="attempt", description="Before and after the step of a batch script.")
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--requeues", type=int, required=True, help="attempts in a row that may leave no checkpoint")
    parser.add_argument("--code", type=int, default=0, help="end: exit code of srun")
    parser.add_argument("--terminated", action="store_true", help="end: the script got TERM")
    return parser.parse_args(arguments)


def main() -> int:
    """Entry point of the batch script."""
    options = parse(sys.argv[1:])
    if options.moment == "begin":
        return begin(options.run_dir, options.requeues, os.environ)
    return end(options.run_dir, options.requeues, options.code, options.terminated, os.environ)


if __name__ == "__main__":
    sys.exit(main())
