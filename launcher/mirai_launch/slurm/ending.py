"""What becomes of a job whose step has ended: done, queued again, or down. Pure; the batch script asks through attempt.

Neither the exit code of srun nor the signal that came says it: with --kill-on-bad-exit the first rank that leaves has
the others killed, and of a preemption with grace time the batch script hears nothing. What the run left behind says
it: the records of failures, a STOP file, checkpoints that were not there before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

DONE = 0
REQUEUE = 10
DO_NOT_REQUEUE = 20
SUSPECT_NODE = 30
TERMINATED = 143  # as a shell has it for TERM

# What a STOP file says that the batch script wrote; any other is a person's.
WARNED = "requeue"


@dataclass(frozen=True)
class Failure:
    """One rank's record of why it ended (RUN/logs/failure-rank-N.json)."""

    rank: int
    host: str
    exit_code: int
    message: str
    suspects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    code: srun's exit code. terminated: whether the batch script got TERM. stop: first word of the STOP file ("" without
    one). failures: records of this attempt. progressed: whether there is a checkpoint that was not there at its start.
    fruitless: attempts of this job in a row, this one included, since there was one. cap: how many of those may be.
    running: whether the scheduler still counts the job as running.
    """

    code: int
    terminated: bool
    stop: str
    failures: tuple[Failure, ...]
    progressed: bool
    fruitless: int
    cap: int
    running: bool


@dataclass(frozen=True)
class Decision:
    """exit_code: of the batch script; REQUEUE: it is to be queued again, without the hosts in `exclude`."""

    exit_code: int
    why: str
    exclude: tuple[str, ...] = ()


def decide(ending: Ending) -> Decision:
    """What becomes of the job. Only a step that ended with 0 is done; every other ending is a failure to `afterok`."""
    if ending.code == DONE:
        return Decision(DONE, "done")
    if ending.terminated or not ending.running:
        # To requeue now would bring back a job that somebody cancelled; what SLURM preempts it queues again itself.
        return Decision(TERMINATED, "ended by SLURM (cancelled, preempted or out of time)")
    refused = [failure for failure in ending.failures if failure.exit_code == DO_NOT_REQUEUE]
    if refused:
        return Decision(DO_NOT_REQUEUE, _said(refused[0]))
    if ending.stop not in ("", WARNED):
        return Decision(DO_NOT_REQUEUE, "stopped on request, saved")
    if ending.code == DO_NOT_REQUEUE:
        return Decision(DO_NOT_REQUEUE, "the run refused to go on; see above")
    again = _again(ending)
    if again.exit_code == REQUEUE and not ending.progressed and exhausted(ending.fruitless, ending.cap):
        return Decision(DO_NOT_REQUEUE, f"{again.why}; {exhausted(ending.fruitless, ending.cap)}")
    return again


def _again(ending: Ending) -> Decision:
    suspect = [failure for failure in ending.failures if failure.exit_code == SUSPECT_NODE]
    if suspect:
        # Rank 0 saw all that came and all that did not; another rank only saw what it could not reach itself.
        first = min(suspect, key=lambda failure: failure.rank)
        return Decision(REQUEUE, _said(first), first.suspects)
    if ending.stop == WARNED:
        return Decision(REQUEUE, "warned of the time limit or of preemption, saved")
    if ending.code == REQUEUE:
        return Decision(REQUEUE, "stopped by a signal, saved")
    said = _said(ending.failures[0]) if ending.failures else f"the step ended with {ending.code}"
    if ending.progressed:
        return Decision(REQUEUE, f"{said}; there is a new checkpoint to go on from")
    return Decision(ending.code, f"{said}; no new checkpoint since this attempt began, so it would end the same way")


def exhausted(fruitless: int, cap: int) -> str:
    """Why an attempt must not even start: the ones before it, which SLURM itself may have queued, left nothing."""
    if fruitless <= cap:
        return ""
    return f"attempts in a row without a new checkpoint: {fruitless}, of {cap} allowed; the nodes are given back"


def first_of(failures: Iterable[Failure]) -> tuple[Failure, ...]:
    """Records in the order in which they explain: one that says something about itself before a bare error."""
    return tuple(sorted(failures, key=lambda failure: (failure.exit_code not in (DO_NOT_REQUEUE, SUSPECT_NODE))))


def _said(failure: Failure) -> str:
    return f"{failure.host} (rank {failure.rank}): {failure.message}"
