"""Which rank is slow, and in which phase, from every rank's own seconds (waits.py) of the last cycles."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mirai_dist.observe.ledger import UNACCOUNTED

WINDOW = 10  # cycles that are looked at together
RISES, CLEARS = 8, 2  # in so many of them a rank must be late to be named, and in no more of them to be let go
FACTOR = 1.2  # of the median rank's own seconds in that phase
SHARE = 0.05  # of the cycle
LEAST = 0.1  # seconds a cycle; less is the noise of clocks and schedulers


class Change(NamedTuple):
    """A rank that became slow in a phase, or is no longer."""

    rank: int
    phase: str
    slow: bool
    text: str


class SlowRanks:
    """Watches one stage. A rank is late in a phase of a cycle when its own time there exceeds FACTOR times the median
    rank's, and by SHARE of the cycle and LEAST at that. It is named when it is late nearly always, so that one odd
    cycle names nobody. Time outside all phases is not compared: rank 0 keeps the books there.

    hosts: of each rank. together: so many neighbouring ranks share one copy of each network, and are compared with one
    another alone: how long replicas wait for each other is not measured. 0: all ranks.
    """

    def __init__(self, hosts: Sequence[str] = (), together: int = 0) -> None:
        self._hosts, self._together = tuple(hosts), together
        self._window: deque[dict[tuple[int, str], float]] = deque(maxlen=WINDOW)
        self._up: set[tuple[int, str]] = set()

    def cycle_ended(self, own: Mapping[str, Sequence[float]]) -> list[Change]:
        """Take every rank's own seconds in each phase of a cycle; returns who became slow, and who no longer is."""
        self._window.append(self._late(own))
        changes = []
        for rank, phase in dict.fromkeys(each for cycle in self._window for each in cycle) | dict.fromkeys(self._up):
            late = [cycle[rank, phase] for cycle in self._window if (rank, phase) in cycle]
            up = (rank, phase) in self._up
            if (len(late) <= CLEARS) if up else (len(late) >= RISES):
                (self._up.discard if up else self._up.add)((rank, phase))
                changes.append(Change(rank, phase, not up, self._sentence(rank, phase, late, not up)))
        return changes

    def _late(self, own: Mapping[str, Sequence[float]]) -> dict[tuple[int, str], float]:
        """Seconds by which (rank, phase) was late in one cycle, for those that were."""
        # a cycle lasts as long as its slowest rank's own work, at least
        cycle = max((sum(each) for each in zip(*own.values(), strict=True)), default=0.0)
        found = {}
        for phase in (each for each in own if each != UNACCOUNTED):
            size = self._together or len(own[phase])
            for first in range(0, len(own[phase]), size):
                peers = own[phase][first : first + size]
                median = statistics.median_low(peers)
                limit = median + max((FACTOR - 1) * median, SHARE * cycle, LEAST)
                found |= {(first + i, phase): one - median for i, one in enumerate(peers) if one > limit}
        return found

    def _sentence(self, rank: int, phase: str, late: Sequence[float], slow: bool) -> str:
        name = f"{self._hosts[rank]}:{rank}" if rank < len(self._hosts) else f"rank {rank}"
        if not slow:
            return f"{name} is no longer slow in phase {phase}"
        behind = f"{statistics.median(late):.2g} s behind the median rank in {len(late)} of {len(self._window)} cycles"
        return f"{name} is slow in phase {phase}: {behind}; all others wait for it"
