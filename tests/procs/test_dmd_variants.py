"""Variants of the dmd stage through its real cycle: step lists, score schedules, long rollouts; on several ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mirai_dist.method.flow import shifted
from tests.procs import tiny
from tests.procs.conftest import run_threads

POSITIONS = 3  # of a cycle
VARIANTS = {
    "one step": ("rollout.steps=[1000]",),
    "two steps, four for the first segment": ("rollout.steps=[1000,500]", "rollout.first_steps=[1000,750,500,250]"),
    "one step, four for the first segment": ("rollout.steps=[1000]", "rollout.first_steps=[1000,750,500,250]"),
    "scores from the exit on": ("dmd.score_schedule=lower",),
    "scores in the exit's interval": ("dmd.score_schedule=both",),
    "a long rollout": ("rollout.total_frames=6", "rollout.window_frames=2"),
    "a long rollout with a sink": ("rollout.total_frames=5", "rollout.window_frames=3", "rollout.sink_frames=1"),
    "a long rollout, leaky": ("rollout.total_frames=6", "rollout.window_frames=3", "rollout.kv_grad=leaky"),
}


def trained(overrides: tuple[str, ...], ranks: int) -> tuple[list[dict[str, float]], dict[str, Any], list[float]]:
    """Metrics and numbers of rank 0 after one cycle and a generator update, and the timesteps of its last update."""
    recipe = tiny.in_dtype(tiny.recipe(*overrides), "float64")

    def body(rank: int) -> tuple[list[dict[str, float]], dict[str, Any], list[float]]:
        stage = tiny.stage_of(recipe, "distil")
        return tiny.train(stage, POSITIONS + 1), tiny.everything(stage), list(stage.timesteps)

    with tiny.lively("float64"):
        return run_threads(ranks, body, tiny.TIMEOUT)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_and_the_ranks_do_not_matter(name: str) -> None:
    metrics, alone, _ = trained(VARIANTS[name], 1)
    assert all(math.isfinite(value) for position in metrics for value in position.values())
    _, plain, _ = trained((), 1)
    assert any(key.startswith("generator.") for key in tiny.unequal(plain, alone)), "the variant changed nothing"
    _, together, _ = trained(VARIANTS[name], 2)
    weights = {key: value for key, value in alone.items() if not key.startswith(("replay", "average"))}
    assert tiny.unequal(weights, {key: together[key] for key in weights}, tolerance=1e-9) == []


@pytest.mark.parametrize(("schedule", "low", "high"), [("none", 0, 1000), ("lower", 500, 1000), ("both", 500, 1000)])
def test_score_timesteps_stay_in_their_interval(schedule: str, low: int, high: int) -> None:
    """With a single step the interval of its exit is (1000, 0); of two, the first one's is (1000, 500)."""
    recipe = tiny.recipe("rollout.steps=[1000,500]", f"dmd.score_schedule={schedule}", "dmd.min_timestep=0.5")

    def body(rank: int) -> list[tuple[float, float]]:
        stage = tiny.stage_of(recipe, "distil")
        found = []
        for _ in range(6 * POSITIONS):
            exits = stage.metrics
            stage.step()
            exit_step = exits.reduce()["exit_step"]
            found += [(exit_step, t) for t in stage.timesteps]
            stage.advance()
        return found

    with tiny.lively():
        found = run_threads(1, body, tiny.TIMEOUT)[0]
    first = [t for exit_step, t in found if exit_step == 0.0]
    last = [t for exit_step, t in found if exit_step == 1.0]
    assert first and last
    assert all(shifted(low / 1000, 3.0) <= t <= max(shifted(high / 1000, 3.0), 980) for t in first)
    if schedule == "both":
        assert all(t <= shifted(0.5, 3.0) for t in last)
    if schedule == "none":
        assert min(first) < shifted(0.5, 3.0)
