"""The world size changes neither what is drawn for a sample nor, beyond rounding, what is trained.

The same global batch runs on 1, 2 and 4 ranks, once each, in module-wide fixtures. In float64: without momentum AdamW
steps by the sign of a gradient, so that in float32 the rounding of a gradient that cancels can become a whole step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest

from mirai_dist.cycle import phases
from mirai_dist.cycle.stages import Stage
from tests.procs import tiny
from tests.procs.conftest import run_threads
from tests.procs.tiny import TIMEOUT

SIZES = (1, 2, 4)
POSITIONS = {"teacher": 2, "ar_teacher": 2, "few_step": 2, "distil": 6}  # two cycles of each stage
Key = tuple[str, str, int, int, int]  # stage, what, cycle, position, sample


class Ran(NamedTuple):
    """What one world size drew, on all ranks together; metrics and all numbers at the end, by stage."""

    draws: dict[Key, Any]
    metrics: dict[str, list[dict[str, float]]]
    end: dict[str, dict[str, Any]]

    def drawn(self, what: str) -> dict[Any, Any]:
        return {key: value for key, value in self.draws.items() if key[1] == what}


class Recorder:
    """Draws of all ranks of a group. A sample drawn twice, or on two ranks, must be drawn alike."""

    def __init__(self) -> None:
        self.draws: dict[Key, Any] = {}

    def note(self, stage: Stage, what: str, sample: int, value: Any) -> None:
        key = (stage.name, what, stage.cycle, stage.position, sample)
        assert not tiny.unequal({"": self.draws.setdefault(key, value)}, {"": value}), f"{key} has two values"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note noise, prompts, latents of rollouts, exit steps and timesteps where the phases make them."""
        normal, rollout = Stage.normal, phases._rollout
        functions = {"timesteps": phases._score_timesteps, "segment timesteps": phases._segment_timesteps,
                     "kept prompts": phases._prompts}

        def noted_normal(stage: Stage, what: str, at: Any, samples: Any, shape: Any) -> Any:
            noise = normal(stage, what, at, samples, shape)
            for row, sample in zip(noise, samples, strict=True):
                self.note(stage, f"noise {what}", sample, row.clone())
            return noise

        def noted_rollout(stage: Any, at: Any, samples: list[int], text: Any, capture: int) -> Any:
            rolled = rollout(stage, at, samples, text, capture)
            for row, sample in enumerate(samples):
                self.note(stage, "latents", sample, rolled.latents[row].detach().clone())
                self.note(stage, "prompt", sample, text[row].clone())
                self.note(stage, "exit step", sample, rolled.exit_step)
                self.note(stage, "rank", sample, stage.run.rank)
            return rolled

        def noted(what: str, function: Any) -> Any:
            def run(stage: Stage, at: Any, *arguments: Any) -> Any:
                found = function(stage, at, *arguments)
                samples = [each for each in arguments if isinstance(each, list)][-1]
                for row, sample in zip(found, samples, strict=True):
                    self.note(stage, what, sample, row.clone())
                return found
            return run

        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(Stage, "normal", noted_normal))
            patches.enter_context(mock.patch.object(phases, "_rollout", noted_rollout))
            for what, function in functions.items():
                patches.enter_context(mock.patch.object(phases, function.__name__, noted(what, function)))
            yield


def ran(ranks: int, positions: dict[str, int], *overrides: str) -> Ran:
    """Stages trained for so many positions on so many ranks."""
    recipe, recorder = tiny.in_dtype(tiny.recipe(*overrides), "float64"), Recorder()

    def body(rank: int) -> tuple[dict[str, list[dict[str, float]]], dict[str, dict[str, Any]]]:
        metrics, end = {}, {}
        for name, count in positions.items():
            stage = tiny.stage_of(recipe, name)
            metrics[name] = tiny.train(stage, count)
            end[name] = tiny.everything(stage)
        return metrics, end

    with tiny.lively("float64"), recorder.listening():
        everyone = run_threads(ranks, body, timeout=TIMEOUT)
    merged = {name: {key: value for _, end in everyone for key, value in end[name].items()} for name in positions}
    return Ran(recorder.draws, everyone[0][0], merged)


@pytest.fixture(scope="module")
def by_size() -> dict[int, Ran]:
    return {ranks: ran(ranks, POSITIONS) for ranks in SIZES}


@pytest.mark.parametrize("ranks", SIZES[1:])
def test_a_sample_gets_the_same_draws_on_any_number_of_ranks(by_size, ranks: int) -> None:
    alone, together = by_size[1], by_size[ranks]
    assert alone.draws.keys() == together.draws.keys()
    kinds = {what for _, what, *_ in alone.draws}
    assert kinds == {"noise noise", "noise rollout", "noise score/noise", "noise critic/noise", "segment timesteps",
                     "kept prompts", "prompt", "latents", "exit step", "timesteps", "rank"}
    for what in kinds - {"latents", "rank"}:
        assert not tiny.unequal(alone.drawn(what), together.drawn(what)), what
    assert not tiny.unequal(alone.drawn("latents"), together.drawn("latents"), 1e-9)
    assert set(together.drawn("rank").values()) == set(range(ranks))


def test_draws_differ_where_they_should(by_size) -> None:
    """Equality above would also hold if every sample and moment drew the same."""
    for what in ("noise rollout", "noise critic/noise", "timesteps"):
        values = [str(value.tolist()) for value in by_size[1].drawn(what).values()]
        assert len(set(values)) >= 0.9 * len(values), what
    assert set(by_size[1].drawn("exit step").values()) == {0, 1}


@pytest.mark.parametrize("ranks", SIZES[1:])
@pytest.mark.parametrize("stage", POSITIONS)
def test_training_is_the_same_on_any_number_of_ranks(by_size, stage: str, ranks: int) -> None:
    alone, together = by_size[1], by_size[ranks]
    assert not tiny.unequal_run(alone.end[stage], together.end[stage])
    for one, other in zip(alone.metrics[stage], together.metrics[stage], strict=True):
        assert not tiny.unequal(one, other, 1e-9)


def test_exit_groups_draw_once_for_each_block_of_the_global_batch() -> None:
    """With accumulation: 2 ranks run the two groups in two micro-batches each, 4 ranks in one each."""
    overrides = ("rollout.exit_groups=2", "stages.distil.batch.global_size=8")
    steps = [ran(ranks, {"distil": 3}, *overrides).drawn("exit step") for ranks in (2, 4)]
    assert steps[0] == steps[1]
    moments = {key[2:4] for key in steps[0]}
    groups = {moment: [steps[0]["distil", "exit step", *moment, sample] for sample in range(8)] for moment in moments}
    assert len(groups) == 3
    for found in groups.values():
        assert len(set(found[:4])) == len(set(found[4:])) == 1
    assert any(found[0] != found[4] for found in groups.values())
