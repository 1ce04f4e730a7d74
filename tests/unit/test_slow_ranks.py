"""Who is slow is named by host, rank and phase, when it lasts; nobody else is."""

from __future__ import annotations

import random

from mirai_dist.observe.ledger import UNACCOUNTED, Ledger
from mirai_dist.observe.slow import RISES, WINDOW, Change, SlowRanks
from mirai_dist.observe.waits import Waits

HOSTS = ("n1", "n1", "n2", "n2", "n3", "n3", "n4", "n4")


def cycle(noise: random.Random, **late: float) -> dict[str, list[float]]:
    """Own seconds of eight ranks in three phases with 5 % noise; late: phase=seconds more on rank 5."""
    usual = {"rollout": 6.0, "backward": 3.0, "data": 0.02, UNACCOUNTED: 0.1}
    return {
        phase: [own * noise.uniform(0.95, 1.05) + (late.get(phase, 0.0) if rank == 5 else 0.0) for rank in range(8)]
        for phase, own in usual.items()
    }


def changes(slow: SlowRanks, cycles: int, **late: float) -> list[Change]:
    noise = random.Random(cycles)
    return [change for _ in range(cycles) for change in slow.cycle_ended(cycle(noise, **late))]


def test_a_slow_rank_is_named_once_and_let_go() -> None:
    slow = SlowRanks(HOSTS)
    assert changes(slow, 50) == []
    [named] = changes(slow, 30, backward=2.0)
    assert (named.rank, named.phase, named.slow) == (5, "backward", True)
    assert named.text.startswith("n3:5 is slow in phase backward: 2") and "all others wait for it" in named.text
    [let_go] = changes(slow, 30)
    assert let_go == Change(5, "backward", False, "n3:5 is no longer slow in phase backward")


def test_it_takes_most_of_the_window_and_one_odd_cycle_names_nobody() -> None:
    slow = SlowRanks(HOSTS)
    assert changes(slow, RISES - 1, rollout=4.0) == []
    assert changes(slow, 1, rollout=4.0) != []
    odd = SlowRanks(HOSTS)
    for _ in range(5):
        assert changes(odd, 1, rollout=30.0) == [] and changes(odd, WINDOW // 2) == []


def test_what_costs_little_is_not_worth_a_word() -> None:
    assert changes(SlowRanks(HOSTS), 30, data=0.3) == [], "15 times the median, but 3 % of the cycle"
    assert changes(SlowRanks(HOSTS), 30, rollout=0.9) == [], "10 % of the cycle, but within a fifth of the median"
    short = SlowRanks()
    assert [c for _ in range(30) for c in short.cycle_ended({"forward": [0.01, 0.09]})] == [], "clocks and schedulers"


def test_rank_zero_keeps_the_books_and_is_not_blamed() -> None:
    assert changes(SlowRanks(HOSTS), 30, **{UNACCOUNTED: 5.0}) == []


def test_of_two_ranks_the_later_one_is_slow() -> None:
    slow = SlowRanks(("a", "b"))
    found = [each for _ in range(WINDOW) for each in slow.cycle_ended({"forward": [1.0, 1.5]})]
    assert [(each.rank, each.slow) for each in found] == [(1, True)]


def test_replicas_are_compared_among_themselves() -> None:
    """The replica that waits for the other in an all-reduce, which is not measured, is not taken for the slow one."""
    slow = SlowRanks(HOSTS[:4], together=2)
    own = {"backward": [5.0, 5.0, 1.0, 1.0], "forward": [1.0, 1.0, 1.0, 5.0]}
    found = [each for _ in range(WINDOW) for each in slow.cycle_ended(own)]
    assert [(each.rank, each.phase) for each in found] == [(3, "forward")]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_own_seconds_are_those_outside_collectives(monkeypatch) -> None:
    clock, waits = Clock(), Waits()
    monkeypatch.setattr("mirai_dist.observe.waits.time.perf_counter", clock)
    ledger = Ledger(clock, waits=waits)
    with ledger.phase("forward"):
        clock.now += 2
        with waits.collective():
            clock.now += 3
        with ledger.phase("inner"), waits.collective():
            clock.now += 5
    with waits.collective():
        clock.now += 7
    assert ledger.own_seconds() == {"forward": 2.0, "inner": 0.0, UNACCOUNTED: 0.0}
    assert sum(ledger.close_cycle().values()) == 17.0, "a cycle's phases still sum to its wall time"
    with ledger.phase("forward"):
        clock.now += 1
    assert ledger.own_seconds()["forward"] == 1.0, "what was waited in the cycle before is forgotten"
