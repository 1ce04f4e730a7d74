"""The only file that runs SLURM's commands: sbatch, squeue, scontrol and scancel.

Each call is bounded in time, and what a command refuses comes back as one line, in the command's own words.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirai_dist.config.error import RecipeError
from mirai_launch.slurm import parse
from mirai_launch.slurm.parse import Job

_UNKNOWN_JOB = "Invalid job id"


class SchedulerError(RecipeError):
    """SLURM's commands are missing, do not answer, or refuse; `str` is one line."""


@dataclass(frozen=True)
class Scheduler:
    """SLURM as the environment's commands reach it. timeout: seconds one command may take."""

    timeout: float = 30.0

    def submit(self, script: Path, options: Sequence[str] = ()) -> str:
        """Queue a batch script; returns the job id. Raises SchedulerError."""
        return parse.job_id(self._run("sbatch", "--parsable", *options, str(script)))

    def job(self, job: str) -> Job | None:
        """What the scheduler knows of one job or array element ("12_3"); None when it has forgotten it.

        Of a whole array, its first record. Raises SchedulerError.
        """
        try:
            found = parse.show_job(self._run("scontrol", "-o", "show", "job", job))
        except SchedulerError as error:
            if _UNKNOWN_JOB in error.what:
                return None
            raise
        return found[0] if found else None

    def jobs(self, ids: Iterable[str] = (), user: str = "") -> list[Job]:
        """The jobs of these ids (or of a user) that the scheduler still knows, every array element by itself.

        Raises SchedulerError.
        """
        wanted = ",".join(ids)
        chosen = ["-j", wanted] if wanted else ["-u", user] if user else []
        fields = ",".join(f"{name}:|" for name in parse.SQUEUE_FIELDS)
        try:
            return parse.squeue(self._run("squeue", "-h", "-r", "-t", "all", *chosen, "-O", fields))
        except SchedulerError as error:
            if wanted and _UNKNOWN_JOB in error.what:
                return []
            raise

    def cancel(self, job: str, signal: str | None = None, batch_only: bool = False) -> None:
        """End a job, or send it a signal ("USR2"): to its tasks, or only to its batch script. Raises SchedulerError."""
        named = [f"--signal={signal}"] if signal else []
        self._run("scancel", *named, *(["--batch"] if batch_only else []), job)

    def requeue(self, job: str) -> None:
        """Put a job, or one element of an array, back into the queue. Raises SchedulerError."""
        self._run("scontrol", "requeue", job)

    def exclude(self, job: str, hosts: Sequence[str]) -> None:
        """Keep these hosts out of the job's next start, beside those it avoids already. Raises SchedulerError."""
        known = parse.excluded(self._run("scontrol", "-o", "show", "job", job))
        self._run("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(dict.fromkeys([*known, *hosts]))}")

    def _run(self, *command: str) -> str:
        # One form of times, whatever the user's environment asks these commands to print.
        env = {**os.environ, "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}
        name = command[0]
        try:
            done = subprocess.run(
                command,
                env=env,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            what = "is not on the PATH; run this on a login node, or load the site's SLURM module"
            raise SchedulerError(name, what) from None
        except subprocess.TimeoutExpired:
            raise SchedulerError(name, f"did not answer in {self.timeout:.0f} s; try again later") from None
        if done.returncode:
            said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise SchedulerError(name, " / ".join(said) or f"failed with exit code {done.returncode}")
        return done.stdout
