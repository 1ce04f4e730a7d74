"""Alarms: they rise on what lasts, once, say what is wrong, clear, and remember all of it over a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from mirai_dist.config.schema import Alarms as Limits
from mirai_dist.observe.alarms import Alarms, Change, dmd_alarms

LIMITS = Limits(warmup_cycles=3, window_cycles=4)
HEALTHY = {
    "latents/all/std": 1.0,
    "drift/mean": 0.1,
    "motion/relative": 1.1,
    "critic_error/to_gaussian": 0.6,
    "moved/generator": 1.0,
    "moved/critic": 1.0,
    "moved/predictor": 1.0,
    "score/guided_std": 1.2,
    "timesteps/deviation": 0.05,
    "timesteps/step_list_error": 1e-12,
}
# The value that should raise each alarm; the saturation's start is healthy.
ILL = {
    "saturation": ("latents/all/std", 1.6),
    "mean_drift": ("drift/mean", 0.5),
    "motion_collapse": ("motion/relative", 0.1),
    "critic_lag": ("critic_error/to_gaussian", 1.5),
    "generator_frozen": ("moved/generator", 0.0),
    "critic_frozen": ("moved/critic", 0.0),
    "predictor_frozen": ("moved/predictor", 0.01),
    "score_scale": ("score/guided_std", 4.0),
    "score_timesteps": ("timesteps/deviation", -0.8),
    "rollout_timesteps": ("timesteps/step_list_error", 250.0),
}


def alarms_of(limits: Limits, draws: int = 24) -> Alarms:
    return Alarms(limits, dmd_alarms(limits, draws))


def feed(alarms: Alarms, cycles: range, ill: Mapping[str, float] | None = None) -> list[Change]:
    changes = []
    for cycle in cycles:
        alarms.record({**HEALTHY, **(ill or {})})
        changes += alarms.close_cycle(cycle)
    return changes


def names(changes: list[Change]) -> list[tuple[str, int, bool]]:
    return [(change.name, change.cycle, change.raised) for change in changes]


def test_a_healthy_run_raises_nothing() -> None:
    alarms = alarms_of(LIMITS)
    assert feed(alarms, range(100)) == [] and alarms.raised == []


def test_every_alarm_is_tried_here() -> None:
    assert {alarm.name for alarm in dmd_alarms(LIMITS, 24)} == set(ILL)
    assert {alarm.metric for alarm in dmd_alarms(LIMITS, 24)} == set(HEALTHY)


@pytest.mark.parametrize("name", ILL)
def test_each_fault_raises_its_own_alarm_once_and_it_clears(name: str) -> None:
    metric, value = ILL[name]
    alarms = alarms_of(LIMITS)
    assert feed(alarms, range(20)) == []
    risen = feed(alarms, range(20, 40), {metric: value})
    assert len(risen) == 1 and risen[0].name == name and risen[0].raised
    assert alarms.raised == [name]
    cleared = feed(alarms, range(40, 60))
    assert len(cleared) == 1 and cleared[0].name == name and not cleared[0].raised
    assert alarms.raised == []


@pytest.mark.parametrize("name", ILL)
def test_a_sentence_says_what_where_and_what_to_look_at(name: str) -> None:
    metric, value = ILL[name]
    alarms = alarms_of(LIMITS)
    feed(alarms, range(20))
    (change,) = feed(alarms, range(20, 40), {metric: value})
    sentence = change.sentence
    assert sentence.startswith(f"alarm {name} at cycle {change.cycle}: {metric} is ")
    assert "should be at " in sentence and "; look at " in sentence and "\n" not in sentence


def test_warm_up_then_a_full_window() -> None:
    alarms = alarms_of(LIMITS)
    assert names(feed(alarms, range(10), {"moved/critic": 0.0})) == [("critic_frozen", 3 + 4 - 1, True)]


def test_one_odd_cycle_raises_nothing() -> None:
    alarms = alarms_of(LIMITS)
    feed(alarms, range(20))
    assert feed(alarms, range(20, 21), {"moved/critic": 0.0, "motion/relative": 0.0}) == []
    assert feed(alarms, range(21, 40)) == []


def test_a_metric_that_hovers_at_its_limit_does_not_chatter() -> None:
    alarms = alarms_of(LIMITS)
    feed(alarms, range(20))
    changes = []
    for cycle in range(20, 80):  # means of 4 are 2.175, 2.025 and 1.9 in turn
        changes += feed(alarms, range(cycle, cycle + 1), {"score/guided_std": (2.6, 2.0, 1.5)[cycle % 3]})
    assert [change.raised for change in changes] == [True]


def test_a_cycle_counts_the_mean_of_its_positions() -> None:
    """The critic moves at its own positions; a generator's position has no critic."""
    alarms = alarms_of(LIMITS)
    for cycle in range(20):
        for value in (0.3, 0.6):
            alarms.record({"moved/critic": value})
        alarms.record({"moved/generator": 1.0})
        changes = alarms.close_cycle(cycle)
        assert names(changes) == ([("critic_frozen", cycle, True)] if cycle == 6 else [])


def test_warm_up_of_a_metric_begins_with_it() -> None:
    """Foresight that starts late: the predictor's alarm knows nothing before."""
    alarms = alarms_of(LIMITS)
    for cycle in range(50):
        alarms.record({name: value for name, value in HEALTHY.items() if name != "moved/predictor"})
        assert alarms.close_cycle(cycle) == []
    assert names(feed(alarms, range(50, 70), {"moved/predictor": 0.0})) == [("predictor_frozen", 56, True)]


def test_saturation_is_relative_to_the_start() -> None:
    for start in (0.2, 5.0):
        alarms = alarms_of(LIMITS)
        assert feed(alarms, range(20), {"latents/all/std": start}) == []
        (up,) = feed(alarms, range(20, 40), {"latents/all/std": 1.7 * start})
        assert up.name == "saturation" and "of its value at the start" in up.sentence
        feed(alarms, range(40, 60), {"latents/all/std": start})
        (down,) = feed(alarms, range(60, 80), {"latents/all/std": 0.5 * start})
        assert down.name == "saturation" and down.raised and "at least 0.667" in down.sentence


@pytest.mark.parametrize(("draws", "rises"), [(8, False), (9, False), (10, True), (400, True)])
def test_timesteps_are_judged_by_how_many_were_drawn(draws: int, rises: bool) -> None:
    """A mean of 1 standard deviation over 4 cycles is 2 sqrt(draws) of its own: limit 6."""
    alarms = alarms_of(LIMITS, draws)
    found = feed(alarms, range(20), {"timesteps/deviation": 1.0})
    assert [change.name for change in found] == (["score_timesteps"] if rises else [])


def test_a_value_that_is_not_finite_is_outside() -> None:
    for value in (math.nan, math.inf, -math.inf):
        alarms = alarms_of(LIMITS)
        feed(alarms, range(20))
        found = feed(alarms, range(20, 22), {"motion/relative": value})
        assert names(found) == [("motion_collapse", 20, True)]
        json.dumps(alarms.state(), allow_nan=False)


@pytest.mark.parametrize(
    "off", ["saturation", "mean_drift", "motion", "critic_lag", "moved", "score_scale", "timesteps"]
)
def test_a_limit_of_zero_turns_its_alarms_off(off: str) -> None:
    left = {alarm.name for alarm in dmd_alarms(replace(Limits(), **{off: 0}), 24)}
    gone = {"motion": {"motion_collapse"}, "moved": {"generator_frozen", "critic_frozen", "predictor_frozen"},
            "timesteps": {"score_timesteps", "rollout_timesteps"}}.get(off, {off})
    assert left == set(ILL) - gone
    alarms = alarms_of(replace(Limits(), **{off: 0}))
    feed(alarms, range(30), {ILL[name][0]: ILL[name][1] for name in gone})
    assert alarms.raised == []


# --- resume --------------------------------------------------------------------------------------------------


def positions(cycle: int) -> list[dict[str, float]]:
    ill = {"moved/critic": 0.0} if cycle >= 10 else {}
    return [{**HEALTHY, **ill}, {"moved/critic": ill.get("moved/critic", 0.9)}]


def run(stop_at: int) -> tuple[list[tuple[str, int, bool]], dict]:
    """All changes of 30 cycles of two positions, with a resume from JSON before position `stop_at`."""
    alarms, changes, done = alarms_of(LIMITS), [], 0
    for cycle in range(30):
        for values in positions(cycle):
            if done == stop_at:
                state = json.loads(json.dumps(alarms.state(), allow_nan=False))
                alarms = alarms_of(LIMITS)
                alarms.load(state)
                assert alarms.state() == state
            alarms.record(values)
            done += 1
        changes += names(alarms.close_cycle(cycle))
    return changes, alarms.state()


def test_a_resumed_run_says_what_the_uninterrupted_one_would() -> None:
    straight = run(-1)
    assert [change[0] for change in straight[0]] == ["critic_frozen"]
    for stop_at in (1, 2, 5, 19, 20, 25, 27, 28, 40, 59):
        assert run(stop_at) == straight, stop_at


def test_a_state_is_not_shared() -> None:
    alarms = alarms_of(LIMITS)
    feed(alarms, range(10))
    alarms.record(HEALTHY)
    state = alarms.state()
    kept = json.dumps(state)
    other = alarms_of(LIMITS)
    other.load(state)
    feed(other, range(10, 30), {"moved/critic": 0.0})
    alarms.record(HEALTHY)
    assert json.dumps(state) == kept


def test_alarms_turned_on_or_off_since_the_checkpoint() -> None:
    few = alarms_of(Limits(warmup_cycles=3, window_cycles=4, moved=0))
    feed(few, range(20))
    every = alarms_of(LIMITS)
    every.load(few.state())
    assert names(feed(every, range(20, 40), {"moved/critic": 0.0})) == [("critic_frozen", 26, True)]
    few.load(every.state())
    assert few.raised == []


def test_a_shorter_window_is_taken_at_once() -> None:
    long = alarms_of(Limits(warmup_cycles=3, window_cycles=10))
    feed(long, range(20))
    short = alarms_of(LIMITS)
    short.load(long.state())
    assert names(feed(short, range(20, 30), {"moved/critic": 0.0}))[0][1] <= 23
