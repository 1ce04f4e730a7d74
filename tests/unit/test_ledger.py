from __future__ import annotations

import pytest

from mirai_dist.observe.ledger import Ledger


class Clock:
    def __init__(self) -> None:
        self.now = 0.1

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_nested_phase_is_not_counted_in_its_parent() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    clock.sleep(1)
    with ledger.phase("generator"):
        clock.sleep(2)
        with ledger.phase("rollout"):
            clock.sleep(4)
        clock.sleep(8)
    clock.sleep(16)
    with ledger.phase("rollout"):
        clock.sleep(32)
    assert ledger.close_cycle() == {"generator": 10, "rollout": 36, "unaccounted": 17}


def test_phases_and_unaccounted_sum_to_wall_time_to_the_nanosecond() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    for cycle in range(50):
        begin = clock.now
        for step in range(30):
            clock.sleep(1e-7 * (step + 1) / 3)
            with ledger.phase(f"phase {step % 7}"):
                clock.sleep(0.1 / (step + 3))
                with ledger.phase("inner"):
                    clock.sleep(0.01 / (cycle + 7))
        seconds = ledger.close_cycle()
        nanoseconds = sum(round(value * 1e9) for value in seconds.values())
        assert nanoseconds == round(clock.now * 1e9) - round(begin * 1e9)


def test_the_next_cycle_starts_at_the_close() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    with ledger.phase("a"):
        clock.sleep(1)
    ledger.close_cycle()
    clock.sleep(3)
    assert ledger.close_cycle() == {"unaccounted": 3}


def test_an_exception_closes_its_phase() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    with pytest.raises(RuntimeError, match="boom"), ledger.phase("a"):
        clock.sleep(1)
        raise RuntimeError("boom")
    clock.sleep(2)
    assert ledger.close_cycle() == {"a": 1, "unaccounted": 2}


def test_misuse_is_refused() -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="unaccounted"), ledger.phase("unaccounted"):
        pass
    with ledger.phase("a"), pytest.raises(RuntimeError, match="'a'"):
        ledger.close_cycle()


def test_the_listener_hears_the_innermost_phase() -> None:
    heard: list[str] = []
    ledger = Ledger(Clock(), on_phase=heard.append)
    with ledger.phase("a"), ledger.phase("b"):
        pass
    assert heard == ["a", "b", "a", ""]
