"""How long this rank waited in collectives, by phase: the clock that shows who is slow.

Ranks that meet in every layer all take as long as the slowest of them, so wall time names nobody. What differs is
where the time goes: the slow rank works while the others wait for it. A rank's own time in a phase, wall time less
time in collectives, is high on the slow rank alone, whatever made it slow: a throttled GPU, a busy core, a slow disk,
a sleep. (CPU time would not show the last two.)

On the CPU a collective blocks its caller and the caller's clock measures it. On a GPU it waits on the device, between
two events on the stream it runs on; they are read when the cycle's metrics are, which waits for the device anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Waits:
    """Seconds in collectives since they were last taken, by the phase that was open. device: where they run."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._spent: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.phase = ""

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Charge the collective in this block to the open phase."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((self.phase, begin, end))
            return
        started = time.perf_counter()
        yield
        self._charge(self.phase, time.perf_counter() - started)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; on a GPU this waits for the collectives that were started."""
        for phase, begin, end in self._events:
            end.synchronize()
            self._charge(phase, begin.elapsed_time(end) / 1000)
        spent, self._spent, self._events = self._spent, {}, []
        return spent

    def _charge(self, phase: str, seconds: float) -> None:
        self._spent[phase] = self._spent.get(phase, 0.0) + seconds
