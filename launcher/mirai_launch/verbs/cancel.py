"""`mirai cancel`: end a run's jobs, running and waiting; what is running saves first if it can."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from pathlib import Path

from mirai_dist.config.error import RecipeError
from mirai_dist.operate import control
from mirai_dist.operate.status import Status
from mirai_launch import console, operating
from mirai_launch.slurm.client import Scheduler


def configure(parser: argparse.ArgumentParser) -> None:
    operating.add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    """Cancel every job of the run, or the run on this machine. Raises RecipeError."""
    run_dir = arguments.run
    found, _ = operating.look(run_dir)
    jobs = [job for job in operating.scheduled(run_dir) if not job.ended]
    if jobs:
        control.hold(run_dir, control.operator())
        for job in reversed(jobs):  # those that wait for another first: nothing may start in between
            Scheduler().cancel(job.id)
        console.say(f"cancel: {', '.join(job.id for job in jobs)} told to end; mirai status {run_dir}")
        return 0
    if found.ended:
        raise RecipeError(str(run_dir), f"cannot cancel: it is {found.state}, and no job of it is queued")
    return _here(run_dir, found)


def _here(run_dir: Path, found: Status) -> int:
    if found.host != socket.gethostname() or not Path(f"/proc/{found.pid}").exists():
        where = f"rank 0 is process {found.pid} of {found.host}"
        raise RecipeError(str(run_dir), f"cannot cancel from here: {where}; {found.why}")
    control.hold(run_dir, control.operator())
    os.kill(found.pid, signal.SIGTERM)
    console.say(f"cancel: process {found.pid} told to save and leave; if it hangs: kill -9 {found.pid}")
    return 0
