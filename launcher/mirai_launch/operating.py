"""What the operator's verbs share: the run they speak of, what the scheduler says of it, and asking it something."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mirai_dist.config.error import RecipeError
from mirai_dist.operate import control, events, status
from mirai_dist.operate.status import Status
from mirai_launch import console
from mirai_launch.slurm import ledger
from mirai_launch.slurm.client import Scheduler, SchedulerError
from mirai_launch.slurm.parse import Job

PATIENCE = 4.0  # seconds that a request waits for its answer before the shell is given back


def add_run(parser: argparse.ArgumentParser) -> None:
    """The argument all these verbs have."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")


def look(run_dir: Path) -> tuple[Status, list[str]]:
    """The state of a run, and a line for each of its jobs that the scheduler still knows. Raises RecipeError."""
    found = status.of(run_dir)
    try:
        jobs = scheduled(run_dir)
    except SchedulerError as error:
        return found, [f"not known: {error}"]
    return _with_queue(found, jobs), [_line(job) for job in jobs]


def _with_queue(found: Status, jobs: Sequence[Job]) -> Status:
    """What the scheduler knows better than the directory: a job that waits, and one that died without a word."""
    holding = [job for job in jobs if job.holds_nodes]
    early = [job for job in holding if job.start and job.start > (found.started or 0.0)]
    if early and found.state != "running":
        return replace(found, state="starting", why=f"job {early[0].id} has its nodes")
    if holding:
        return found
    waiting = [job for job in jobs if job.waiting]
    if waiting and found.state != "running":
        return replace(found, state="queued", why=f"it was {found.state} before" if found.starts else "")
    dead = next((job for job in jobs if job.id == found.job_id and job.ended), None)
    if dead and found.state == "stale":
        return replace(found, state="failed", why=f"job {dead.id} ended as {dead.state}, and the run said nothing")
    return found


def scheduled(run_dir: Path) -> list[Job]:
    """Jobs of this run that the scheduler still knows, in the order they were submitted. Raises SchedulerError."""
    ids = [submission.job_id for submission in ledger.read(run_dir)]
    found = {job.id: job for job in Scheduler().jobs(ids)} if ids else {}
    return [found[each] for each in ids if each in found]


def _line(job: Job) -> str:
    why = f" ({job.reason})" if job.reason else ""
    where = f" on {', '.join(job.nodes)}" if job.nodes else ""
    return f"{job.id} {job.name}: {job.state}{why}{where}, {job.restarts} restarts"


def present(run_dir: Path, verb: str) -> Status:
    """The state of a run that can take a request. Raises RecipeError, with what to do instead, where none can."""
    found, _ = look(run_dir)
    if found.state == "running":
        return found
    if found.state == "stale":
        what = f"{found.why}: nobody there to answer; look at mirai logs {run_dir}, then mirai cancel {run_dir}"
    elif found.state == "queued":
        what = f"its job waits in the queue; mirai cancel {run_dir} takes it out"
    else:
        what = f"it is {found.state}, not running; mirai status {run_dir} says more"
    raise RecipeError(str(run_dir), f"cannot {verb}: {what}")


def ask(run_dir: Path, request: control.Request, patience: float = PATIENCE) -> dict[str, object] | None:
    """Put a request down, and wait a little for its answer; None where none came yet.

    Raises RecipeError where the run directory cannot be written.
    """
    try:
        asked = control.ask(run_dir, replace(request, by=control.operator()))
    except OSError as error:
        raise RecipeError(str(run_dir), f"cannot be written ({error}), so nothing can be asked of the run") from None
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        answers = [each for each in events.read(run_dir) if each["event"] == "answered"]
        mine = next((each for each in answers if each["name"] == asked.name), None)
        if mine:
            return mine
        time.sleep(0.1)
    return None


def tell(run_dir: Path, request: control.Request, answer: dict[str, object] | None, otherwise: str) -> int:
    """Say what came of a request. Returns the exit code: 1 where the run refused or dropped it."""
    if answer is None:
        console.say(f"{request.verb}: asked; {otherwise}. mirai status {run_dir} shows what came of it")
        return 0
    console.say(f"{request.verb}: {answer['answer']}")
    return 1 if str(answer["answer"]).startswith(("refused", "dropped")) else 0
