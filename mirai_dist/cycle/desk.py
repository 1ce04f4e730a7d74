"""What signals and operators ask of a running stage, decided by all ranks alike and at no cost.

Each rank turns what it was asked into a few numbers, which ride on the reduction of the position's metrics
(observe/metrics.py): a sum above zero means that somebody asked, and every rank sees the same sum. Files, RUN/STOP and
RUN/control, are read by rank 0 alone: one reader is kind to a shared disk, and ranks that read at different moments
would disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mirai_dist.cycle.profiling import Profiling, Wish
from mirai_dist.cycle.stages import Stage
from mirai_dist.operate import control
from mirai_dist.operate.control import Request
from mirai_dist.operate.events import Events
from mirai_dist.runtime.signals import SIGNALS, StopRequest

STOP_FILE = "STOP file"
OPERATOR = "an operator"
REASONS = (*(each.name for each in SIGNALS), STOP_FILE, "a request from inside", OPERATOR)
_SAVE, _CYCLES, _RANK = range(len(REASONS), len(REASONS) + 3)


class Asked(NamedTuple):
    """What all ranks decided. stop: who asked to stop, empty to go on."""

    stop: str = ""
    save: bool = False
    profile: Wish | None = None


class Desk:
    """Takes requests and answers them; one a rank and stage. title: of the stage, as operators see it."""

    def __init__(self, run_dir: Path, rank: int, ranks: int, stop: StopRequest, title: str) -> None:
        self._run_dir, self._rank, self._ranks, self._stop, self._title = run_dir, rank, ranks, stop, title
        self._events = Events(run_dir if rank == 0 else None)
        self._taken: list[Request] = []
        self.profiling = Profiling(run_dir, rank)

    def votes(self, stage: Stage) -> list[float]:
        """Numbers to be summed over ranks: what this rank was asked so far."""
        votes = [0.0] * (_RANK + 1)
        if self._stop.requested:
            known = self._stop.reason in REASONS
            votes[REASONS.index(self._stop.reason if known else "a request from inside")] = 1.0
        for request in self._due(stage):
            self._taken.append(request)
            if request.verb == "stop":
                votes[REASONS.index(OPERATOR)] = 1.0
            elif request.verb == "save":
                votes[_SAVE] = 1.0
            else:
                votes[_CYCLES], votes[_RANK] = float(request.cycles), float(request.rank)
        return votes

    def _due(self, stage: Stage) -> list[Request]:
        """Requests that rank 0 found and whose moment this is; at most one of them is for a profile."""
        if self._rank != 0:
            return []
        due, busy = [], self.profiling.busy
        for request in control.pending(self._run_dir):
            refusal = self._refusal(request)
            if refusal:
                self._answer(request, f"refused: {refusal}")
            elif request.verb == "profile":
                due += [] if busy else [request]
                busy = True
            elif request.verb == "save" or (request.verb == "stop" and self._ends(stage, request)):
                due.append(request)
        return due

    def _refusal(self, request: Request) -> str:
        if not request.verb:
            return "it cannot be read"
        if request.verb == "profile" and not (0 <= request.rank < self._ranks and request.cycles > 0):
            return f"rank {request.rank} of {self._ranks}, {request.cycles} cycles"
        return ""

    def _ends(self, stage: Stage, request: Request) -> bool:
        """Whether a stop is due when the present position is over; at once where its stage is over already."""
        if not request.after or request.stage != self._title:
            return True
        return stage.position == len(stage.positions) - 1 and stage.cycle + 1 >= request.after

    def decide(self, sums: Sequence[float]) -> Asked:
        """What the summed votes mean; the same on all ranks."""
        asked = [reason for reason, votes in zip(REASONS, sums, strict=False) if votes]
        stop = OPERATOR if OPERATOR in asked else next(iter(asked), "")
        profile = Wish(round(sums[_RANK]), round(sums[_CYCLES])) if sums[_CYCLES] else None
        if profile:
            self.profiling.wish(profile)
        return Asked(stop, bool(sums[_SAVE]), profile)

    def done(self, asked: Asked, stage: Stage) -> None:
        """Answer the requests that were due: what was decided has been done, and saved."""
        if asked.stop:
            self.profiling.finish()
        elif stage.position == 0:
            self.profiling.between_cycles(self._title, stage.cycle)
        for request in self._taken:
            where = f"cycle {stage.cycle} position {stage.position} of {self._title}"
            answers = {
                "stop": f"stopped before {where}",
                "save": f"saved before {where}",
                "profile": f"rank {request.rank}, {request.cycles} cycles, from the next one on",
            }
            self._answer(request, answers[request.verb])
        if asked.stop and self._rank == 0:
            by = ", ".join(request.by for request in self._taken if request.verb == "stop") or asked.stop
            if asked.stop == OPERATOR:
                control.hold(self._run_dir, by)
            self._events.write("stopped", by=by, stage=self._title, cycle=stage.cycle, position=stage.position)
        self._taken = []

    def _answer(self, request: Request, text: str) -> None:
        self._events.write("answered", **request.answer(text))
        control.remove(self._run_dir, request)
