"""A profile of one rank for a few cycles of a running job, as a Chrome trace in RUN/profiles."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mirai_dist.operate import events

FOLDER = "profiles"


@dataclass(frozen=True)
class Wish:
    """Which rank is to be profiled, and for how many cycles."""

    rank: int
    cycles: int


class Profiling:
    """One profile at a time. All ranks count its cycles; the one that is wished for records and writes the trace.

    Shapes, stacks and memory are not recorded, and the trace is compressed: its size follows from the number of
    operations, about 10 bytes each.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._run_dir, self._rank = run_dir, rank
        self._wish: Wish | None = None
        self._cycles = 0
        self._profile: profile | None = None
        self._name = ""

    @property
    def busy(self) -> bool:
        """Whether a profile is wished for or being made."""
        return self._wish is not None

    def wish(self, wish: Wish) -> None:
        """Profile the next whole cycles."""
        self._wish, self._cycles = wish, 0

    def between_cycles(self, title: str, cycle: int) -> None:
        """A cycle of stage `title` has ended and `cycle` is next: begin or end a profile, where one is wished for."""
        if self._wish is None:
            return
        if self._cycles == self._wish.cycles:
            self.finish()
        elif self._cycles == 0 and self._wish.rank == self._rank:
            self._name = f"{title.replace(' ', '-')}-cycle-{cycle:06d}-rank-{self._rank}-{time.time_ns()}.json.gz"
            self._profile = profile(activities=activities())
            self._profile.start()
        self._cycles += 1

    def finish(self) -> None:
        """Write what was recorded; the end of a stage may cut a profile short."""
        recording, self._profile, self._wish = self._profile, None, None
        if recording is None:
            return
        recording.stop()
        trace = self._run_dir / FOLDER / self._name
        trace.parent.mkdir(exist_ok=True)
        recording.export_chrome_trace(str(trace))
        events.append(
            self._run_dir, "profiled", rank=self._rank, trace=f"{FOLDER}/{self._name}", bytes=trace.stat().st_size
        )


def activities() -> list[ProfilerActivity]:
    """What a profile records: operators of the CPU, and kernels of a GPU where there is one."""
    on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *on_gpu]
