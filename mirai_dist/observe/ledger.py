"""Where a cycle's wall time went: every nanosecond is charged to exactly one phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mirai_dist.observe.waits import Waits

UNACCOUNTED = "unaccounted"
_NANOSECONDS = 1_000_000_000


class Ledger:
    """Phase times of the current cycle.

    At each entry and exit of a phase the time since the last one is charged to the innermost open phase, or
    to "unaccounted" when none is open. So a child's time is never counted in its parent, and the phases of a
    cycle sum to its wall time by construction. Times are kept as integer nanoseconds: floats would not sum
    exactly.

    clock: seconds, monotonic. on_phase: called with the name of the phase that is now innermost, each time
    that changes ("" when none is open); a progress bar listens here. waits: is told the phase too, and knows what
    part of it this rank waited in collectives.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        on_phase: Callable[[str], None] | None = None,
        waits: Waits | None = None,
    ) -> None:
        self._clock = clock
        self._on_phase = on_phase
        self._waits = waits or Waits()
        self._waits.phase = UNACCOUNTED
        self._stack: list[str] = []
        self._spent: dict[str, int] = {}
        self._mark = self._now()

    def _now(self) -> int:
        return round(self._clock() * _NANOSECONDS)

    def _charge(self) -> None:
        now = self._now()
        name = self._stack[-1] if self._stack else UNACCOUNTED
        self._spent[name] = self._spent.get(name, 0) + now - self._mark
        self._mark = now

    def _announce(self) -> None:
        self._waits.phase = self._stack[-1] if self._stack else UNACCOUNTED
        if self._on_phase is not None:
            self._on_phase(self._stack[-1] if self._stack else "")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time of the with-block to `name`, less the time of phases opened inside it."""
        if name == UNACCOUNTED:
            raise ValueError(f"a phase may not be called {UNACCOUNTED!r}: that is the time outside all phases")
        self._charge()
        self._stack.append(name)
        self._announce()
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()
            self._announce()

    def own_seconds(self) -> dict[str, float]:
        """Seconds of each phase of the cycle so far, less what this rank waited in collectives; once a cycle."""
        self._charge()
        waited = self._waits.take()
        return {name: spent / _NANOSECONDS - waited.get(name, 0.0) for name, spent in self._spent.items()}

    def close_cycle(self) -> dict[str, float]:
        """Seconds of each phase since the last close (or construction), in order of first use, and "unaccounted".

        The values sum to the wall time of the cycle. The next cycle starts now. RuntimeError inside a phase,
        whose time would be split over two cycles.
        """
        if self._stack:
            raise RuntimeError(f"close_cycle inside phase {self._stack[-1]!r}: leave the phase first")
        self._charge()
        outside = self._spent.pop(UNACCOUNTED)
        seconds = {name: spent / _NANOSECONDS for name, spent in self._spent.items()}
        seconds[UNACCOUNTED] = outside / _NANOSECONDS
        self._spent = {}
        return seconds
