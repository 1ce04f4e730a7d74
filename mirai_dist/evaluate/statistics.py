"""Paired comparisons over seeds, with the intervals that a handful of seeds allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """Paired differences of n units (seeds): mean, standard error, 95 % interval, wins, t = mean / standard error.

    With one unit nothing can be said about spread: standard_error, low, high and t are nan.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    wins: int
    n: int
    t: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero; False when there is no interval."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Interval:
    """A bootstrap mean: its standard error and 95 % percentile interval."""

    mean: float
    standard_error: float
    low: float
    high: float


def paired(differences: Sequence[float], higher_is_better: bool = True) -> Paired:
    """Student's t interval of the mean of paired differences (treatment minus control, one a seed).

    wins counts the seeds in which the treatment is better: a positive difference, or a negative one for a
    measure where lower is better; a tie is no win. ValueError for no or non-finite differences.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"paired: a list of differences is needed, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"paired: differences must be finite, got {values.tolist()}")
    n = values.size
    mean = float(values.mean())
    wins = int((values > 0).sum() if higher_is_better else (values < 0).sum())
    if n == 1:
        return Paired(mean, math.nan, math.nan, math.nan, wins, n, math.nan)
    # Equal differences have no spread; np.std would return a rounding residue and an absurd t.
    spread = 0.0 if (values == values[0]).all() else float(values.std(ddof=1))
    error = spread / math.sqrt(n)
    half = t_quantile(0.5 + CONFIDENCE / 2, n - 1) * error
    if error > 0:
        t = mean / error
    else:
        mean = float(values[0])
        t = math.copysign(math.inf, mean) if mean else 0.0
    return Paired(mean, error, mean - half, mean + half, wins, n, t)


def difference_in_differences(
    arm: Mapping[int, Sequence[float]], control: Mapping[int, Sequence[float]]
) -> dict[int, Paired]:
    """For each k >= 1, the paired (arm_k - arm_0) - (control_k - control_0) over seeds.

    arm, control: k segments ahead -> one value a seed, seeds in the same order in both. A gain that also
    shows at k = 0 (better features in general) cancels; what is left concerns the future. ValueError when
    the two do not hold the same k (k = 0 among them) or the same number of seeds.
    """
    if set(arm) != set(control) or 0 not in arm:
        raise ValueError(f"difference_in_differences: k = {sorted(arm)} against {sorted(control)}; both need 0")
    lengths = {len(values) for side in (arm, control) for values in side.values()}
    if len(lengths) != 1:
        raise ValueError(f"difference_in_differences: unequal numbers of seeds {sorted(lengths)}")

    def beyond_now(side: Mapping[int, Sequence[float]], k: int) -> np.ndarray:
        return np.asarray(side[k], dtype=np.float64) - np.asarray(side[0], dtype=np.float64)

    return {k: paired((beyond_now(arm, k) - beyond_now(control, k)).tolist()) for k in sorted(arm) if k >= 1}


def bootstrap_interval(values: Sequence[float], seed: int, replicates: int = 10_000) -> Interval:
    """Percentile bootstrap of a mean: `values` (one a unit, for a paired test their differences) are drawn
    with replacement `replicates` times. The interval covers the sampling of these units and nothing else.

    The replicates' standard error is sd(values) / sqrt(n) * sqrt((n - 1) / n) up to Monte-Carlo error.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"bootstrap_interval: a list of values is needed, got shape {sample.shape}")
    draws = np.random.default_rng(seed).integers(sample.size, size=(replicates, sample.size))
    means = sample[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(sample.mean()), float(means.std(ddof=1)), float(low), float(high))


@lru_cache(maxsize=256)
def t_quantile(probability: float, degrees: float) -> float:
    """The value below which Student's t with `degrees` degrees of freedom lies with `probability` in (0, 1)."""
    if not 0 < probability < 1 or degrees <= 0:
        raise ValueError(f"t_quantile: probability {probability} in (0, 1) and degrees {degrees} > 0 are needed")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability:
        high *= 2
    while high - low > 1e-13 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def t_probability(t: float, degrees: float) -> float:
    """P(T <= t) of Student's t, by the regularised incomplete beta function."""
    tail = 0.5 * _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))
    return 1 - tail if t > 0 else tail


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised I_x(a, b) by its continued fraction (Abramowitz and Stegun 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast only below this point
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / a / _beta_fraction(a, b, x)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)) by the modified Lentz method."""
    tiny = 1e-300
    value, c, d = 1.0, 1.0, 0.0
    for step in range(1, 500):
        m = step // 2
        if step % 2 == 0:
            term = m * (b - m) * x / ((a + step - 1) * (a + step))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + step - 1) * (a + step))
        d = 1 / ((1 + term * d) or tiny)
        c = (1 + term / c) or tiny
        value *= c * d
        if abs(c * d - 1) < 1e-16:
            return value
    raise ArithmeticError(f"incomplete beta did not converge at a={a}, b={b}, x={x}")
