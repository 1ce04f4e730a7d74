"""Learning rates count a network's own updates: linear warm-up, then constant or cosine to 3 %."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirai_dist.config.schema import Optimizer
from mirai_dist.cycle.roles import learning_rate

RATE = 2e-4


def test_constant() -> None:
    assert [learning_rate(Optimizer(lr=RATE), update, 10) for update in (0, 5, 9, 1000)] == [RATE] * 4


def test_warm_up_reaches_the_rate_with_its_last_update() -> None:
    settings = Optimizer(lr=RATE, warmup=4)
    rates = [learning_rate(settings, update, 10) / RATE for update in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_cosine_falls_to_three_percent() -> None:
    settings = Optimizer(lr=RATE, schedule="cosine")
    rates = [learning_rate(settings, update, 100) / RATE for update in (0, 25, 50, 75, 100)]
    assert rates == pytest.approx([1, 0.03 + 0.97 * 0.853553, 0.515, 0.03 + 0.97 * 0.146447, 0.03], abs=1e-5)


def test_warm_up_multiplies_the_cosine() -> None:
    warm, plain = (Optimizer(lr=RATE, schedule="cosine", warmup=w) for w in (10, 0))
    assert learning_rate(warm, 4, 50) == pytest.approx(0.5 * learning_rate(plain, 4, 50))
    assert learning_rate(warm, 30, 50) == learning_rate(plain, 30, 50)


@given(total=st.integers(1, 500), warmup=st.integers(0, 50), schedule=st.sampled_from(["constant", "cosine"]))
def test_every_update_moves_and_none_exceeds_the_rate(total: int, warmup: int, schedule: str) -> None:
    settings = Optimizer(lr=RATE, warmup=warmup, schedule=schedule)
    rates = [learning_rate(settings, update, total) for update in range(total)]
    assert all(0 < rate <= RATE for rate in rates)
    after = rates[max(0, warmup - 1) :]
    assert all(later <= earlier for earlier, later in zip(after, after[1:], strict=False))
