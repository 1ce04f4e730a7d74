"""Foresight in the last part of a stage: before `foresight.start_cycle` the run is the baseline's, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mirai_dist.cycle.saver import Saver
from tests.procs import tiny
from tests.procs.conftest import run_threads

POSITIONS = 3  # of a cycle: the generator update and two critic updates
LATE = ("foresight.start_cycle=1",)
NONE = ("foresight.weight=0",)


def trained(positions: int, *overrides: str) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Metrics of every position and all numbers at the end, on one rank."""

    def body(rank: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
        with tiny.lively():
            stage = tiny.stage_of(tiny.recipe(*overrides), "distil")
        return tiny.train(stage, positions), tiny.everything(stage)

    return run_threads(1, body, tiny.TIMEOUT)[0]


def without_predictor(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if not name.startswith(("predictor", "extras.updates"))}


def test_the_first_cycles_are_the_baselines() -> None:
    late, late_end = trained(POSITIONS, *LATE)
    none, none_end = trained(POSITIONS, *NONE)
    assert late == none
    assert tiny.unequal(without_predictor(late_end), without_predictor(none_end)) == []
    assert late_end["extras.updates"]["predictor"] == 0


def test_then_foresight_trains() -> None:
    metrics, end = trained(2 * POSITIONS, *LATE)
    _, baseline = trained(2 * POSITIONS, *NONE)
    assert not any("cosine/foresight" in each or "cosine/replay" in each for each in metrics[:POSITIONS])
    assert "cosine/foresight" in metrics[POSITIONS] and "cosine/replay" in metrics[POSITIONS + 1]
    assert end["extras.updates"]["predictor"] == 1 + 2
    changed = tiny.unequal(without_predictor(end), without_predictor(baseline))
    assert any(name.startswith("generator.") for name in changed)


def test_a_run_saved_before_the_start_resumes(tmp_path: Path) -> None:
    """The predictor's optimizer has no moments yet; loading must give it none."""
    _, straight = trained(2 * POSITIONS, *LATE)

    def body(rank: int) -> dict[str, Any]:
        recipe = tiny.recipe(*LATE)
        with tiny.lively():
            stage = tiny.stage_of(recipe, "distil")
        saver = Saver(tmp_path / "checkpoints", recipe.checkpoint, "recipe", rank, tiny.console(tmp_path))
        tiny.train(stage, POSITIONS - 1)
        saver.save(stage)
        with tiny.lively():
            resumed = tiny.stage_of(recipe, "distil")
        assert saver.resume(resumed)
        tiny.train(resumed, POSITIONS + 1)
        return tiny.everything(resumed)

    resumed = run_threads(1, body, tiny.TIMEOUT)[0]
    assert tiny.unequal(straight, resumed) == []
