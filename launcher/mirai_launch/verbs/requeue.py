"""`mirai requeue`: put a run that ended back into the queue; it goes on from its last checkpoint."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from mirai_dist.config.error import RecipeError
from mirai_dist.operate import control, status
from mirai_launch import console, operating
from mirai_launch.slurm import ledger
from mirai_launch.slurm.client import Scheduler


def configure(parser: argparse.ArgumentParser) -> None:
    operating.add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    """Queue the run's last job again, or submit its script again where SLURM has forgotten it. Raises RecipeError."""
    run_dir = arguments.run
    found, _ = operating.look(run_dir)
    submissions = ledger.read(run_dir)
    if not submissions:
        command = next(iter(status.following(found)), "")
        raise RecipeError(str(run_dir), f"was never submitted to SLURM; {command or 'mirai submit --help'}")
    jobs = operating.scheduled(run_dir)
    busy = [job for job in jobs if not job.ended and job.reason != "DependencyNeverSatisfied"]
    if busy:
        raise RecipeError(str(run_dir), f"job {busy[0].id} is {busy[0].state}: there is nothing to requeue")
    control.release(run_dir)
    stopped = next((job for job in jobs if job.state != "COMPLETED"), None)
    if stopped:
        Scheduler().requeue(stopped.id)
        console.say(f"requeue: job {stopped.id} is queued again; mirai status {run_dir}")
        return 0
    last = submissions[-1]
    again = Scheduler().submit(run_dir / last.script)
    ledger.append(run_dir, replace(last, job_id=again, submitted=time.time(), after=()))
    console.say(f"requeue: SLURM has forgotten job {last.job_id}; submitted again as {again}; mirai status {run_dir}")
    return 0
