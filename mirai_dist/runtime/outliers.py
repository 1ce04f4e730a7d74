"""Which of many equal machines is slow: each one's measure beside the median of all the others."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SPREAD = 5.0  # how many robust standard deviations below the median are still chance
NO_CHANCE = 0.8  # a shortfall, as a fraction of the median, that no spread excuses: few samples can spread widely
_NORMAL = 1.4826  # of the median absolute deviation: the standard deviation of a normal distribution


@dataclass(frozen=True)
class Measure:
    """Something of which more is better. floor: the shortfall, as a fraction of the median, that is still noise.

    suspect: whether a node that falls short is unfit (else it is only worth a warning). scale: for display.
    """

    name: str
    unit: str
    floor: float
    suspect: bool = True
    scale: float = 1.0


@dataclass(frozen=True)
class Sample:
    """The measure of one rank."""

    host: str
    rank: int
    value: float


@dataclass(frozen=True)
class Outlier:
    """A sample that falls short, and the median of the others."""

    sample: Sample
    median: float


def slow(samples: Sequence[Sample], measure: Measure) -> list[Outlier]:
    """Samples that fall short of the median of all others by more than their spread, and by more than the floor.

    A sample is left out of its own yardstick, or one of two could never be told from the other. The bad ones must be
    fewer than half: of two slow hosts in three, neither is named.
    """
    found = []
    for i, sample in enumerate(samples):
        others = [each.value for each in (*samples[:i], *samples[i + 1 :])]
        if not others:
            continue
        median = statistics.median(others)
        spread = _NORMAL * statistics.median([abs(value - median) for value in others])
        if sample.value < median - max(measure.floor * median, min(SPREAD * spread, NO_CHANCE * median)):
            found.append(Outlier(sample, median))
    return found


def by_host(outliers: Sequence[Outlier]) -> dict[str, Outlier]:
    """The worst outlier of each host."""
    worst: dict[str, Outlier] = {}
    for each in sorted(outliers, key=lambda each: each.sample.value / each.median):
        worst.setdefault(each.sample.host, each)
    return worst
