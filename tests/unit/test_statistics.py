from __future__ import annotations

import math

import numpy as np
import pytest

from mirai_dist.evaluate.statistics import (
    bootstrap_interval,
    difference_in_differences,
    paired,
    t_probability,
    t_quantile,
)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706204736), (2, 4.302652730), (4, 2.776445105), (9, 2.262157163), (30, 2.042272456), (1e7, 1.959963985)],
)
def test_t_quantile_against_printed_tables(degrees: float, expected: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(expected, rel=1e-6)


def test_t_quantile_against_closed_forms() -> None:
    for p in (0.6, 0.9, 0.975, 0.9995):
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) * math.sqrt(2 / (1 - (2 * p - 1) ** 2)), rel=1e-9)
        assert t_quantile(1 - p, 5) == pytest.approx(-t_quantile(p, 5))
        assert t_probability(t_quantile(p, 7), 7) == pytest.approx(p, abs=1e-12)


def test_paired_by_hand() -> None:
    result = paired([1.0, 2.0, 3.0, -1.0, 0.0])
    # mean 1, sd sqrt(10/4), standard error sqrt(0.5)
    error = math.sqrt(0.5)
    assert result.mean == pytest.approx(1.0) and result.standard_error == pytest.approx(error)
    assert result.t == pytest.approx(1 / error)
    assert (result.low, result.high) == pytest.approx((1 - 2.776445105 * error, 1 + 2.776445105 * error))
    assert (result.wins, result.n) == (3, 5) and not result.excludes_zero
    assert paired([1.0, 2.0, 3.0, -1.0, 0.0], higher_is_better=False).wins == 1


def test_identical_inputs_give_zero() -> None:
    result = paired([0.0, 0.0, 0.0])
    assert (result.mean, result.standard_error, result.low, result.high, result.t) == (0, 0, 0, 0, 0)
    assert not result.excludes_zero


def test_a_constant_shift_collapses_the_interval() -> None:
    result = paired([0.1] * 3)
    assert (result.low, result.high, result.standard_error) == (0.1, 0.1, 0.0)
    assert result.t == math.inf and result.excludes_zero and result.wins == 3


def test_one_seed_has_no_interval_and_claims_nothing() -> None:
    result = paired([0.4])
    assert result.mean == 0.4 and math.isnan(result.low) and math.isnan(result.t) and not result.excludes_zero


@pytest.mark.parametrize("differences", [[], [float("nan"), 1.0], [[1.0]]])
def test_unusable_differences_are_refused(differences: list) -> None:
    with pytest.raises(ValueError, match="paired"):
        paired(differences)


def test_the_t_interval_covers_as_promised() -> None:
    samples = np.random.default_rng(3).normal(1.0, 2.0, (4000, 4))
    covered = sum(result.low <= 1.0 <= result.high for result in map(paired, samples.tolist()))
    assert covered / 4000 == pytest.approx(0.95, abs=0.015)


def test_difference_in_differences_oracles() -> None:
    control = {0: [20.0, 21.0, 19.0], 1: [15.0, 15.5, 14.0], 2: [12.0, 11.0, 13.0]}
    for same in difference_in_differences(control, control).values():
        assert (same.mean, same.low, same.high) == (0, 0, 0)
    # The pilot's trap: a gain at every k, the present included, is nothing about the future.
    everywhere = {k: [value + 1.0 for value in values] for k, values in control.items()}
    for nothing in difference_in_differences(everywhere, control).values():
        assert nothing.mean == pytest.approx(0) and not nothing.excludes_zero
    ahead = {k: [value + (0.5 if k == 1 else 0.0) for value in values] for k, values in control.items()}
    found = difference_in_differences(ahead, control)
    assert sorted(found) == [1, 2]
    assert found[1].mean == pytest.approx(0.5) and found[1].wins == 3 and found[2].mean == 0


@pytest.mark.parametrize("arm", [{0: [1.0], 1: [1.0]}, {0: [1.0, 2.0]}, {0: [1.0, 2.0], 1: [1.0, 2.0], 2: [1.0, 2.0]}])
def test_difference_in_differences_refuses_unlike_arms(arm: dict[int, list[float]]) -> None:
    with pytest.raises(ValueError, match="difference_in_differences"):
        difference_in_differences(arm, {0: [1.0, 2.0], 1: [1.0, 2.0]})
    with pytest.raises(ValueError, match="difference_in_differences"):
        difference_in_differences({1: [1.0]}, {1: [1.0]})


def test_bootstrap_oracles() -> None:
    assert bootstrap_interval([0.0] * 7, seed=1) == bootstrap_interval([0.0] * 7, seed=2)
    constant = bootstrap_interval([0.25] * 7, seed=1)
    assert (constant.low, constant.high, constant.standard_error) == (0.25, 0.25, 0.0)
    values = np.random.default_rng(5).normal(0.3, 1.0, 60)
    result = bootstrap_interval(values.tolist(), seed=1)
    exact = values.std(ddof=1) / math.sqrt(60) * math.sqrt(59 / 60)
    assert result.standard_error == pytest.approx(exact, rel=3 / math.sqrt(2 * 10_000))
    assert result.mean == pytest.approx(values.mean())
    assert (result.low + result.high) / 2 == pytest.approx(values.mean(), abs=0.1 * exact)
    assert result.high - result.low == pytest.approx(2 * 1.96 * exact, rel=0.05)
    assert result == bootstrap_interval(values.tolist(), seed=1) != bootstrap_interval(values.tolist(), seed=2)
