"""AR teachers by diffusion forcing and with a noised past, through their real stage, on several ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.procs import tiny
from tests.procs.conftest import run_threads

VARIANTS = {
    "diffusion forcing": ("stages.ar_teacher.kind=diffusion_forcing",),
    "noised past": ("stages.ar_teacher.context_noise=200",),
    "diffusion forcing in segments of three": ("stages.ar_teacher.kind=diffusion_forcing", "video.frames_per_segment=3",
                                               "foresight.offsets=[0]"),
}


def trained(overrides: tuple[str, ...], ranks: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Metrics and numbers of rank 0 after three updates."""
    recipe = tiny.in_dtype(tiny.recipe(*overrides), "float64")

    def body(rank: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
        stage = tiny.stage_of(recipe, "ar_teacher")
        return tiny.train(stage, 3), tiny.everything(stage)

    with tiny.lively("float64"):
        return run_threads(ranks, body, tiny.TIMEOUT)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_and_the_ranks_do_not_matter(name: str) -> None:
    metrics, alone = trained(VARIANTS[name], 1)
    assert all(math.isfinite(value) for update in metrics for value in update.values())
    _, plain = trained((), 1)
    assert any(key.startswith("generator.") for key in tiny.unequal(plain, alone)), "the variant changed nothing"
    _, together = trained(VARIANTS[name], 2)
    weights = {key: value for key, value in alone.items() if not key.startswith("average")}
    assert tiny.unequal(weights, {key: together[key] for key in weights}, tolerance=1e-9) == []


def test_a_whole_video_as_one_segment_hides_nothing() -> None:
    """Diffusion forcing of a single segment is bidirectional flow matching at one timestep: every frame sees all."""
    one = ("video.frames_per_segment=3", "foresight.offsets=[0]", "stages.ar_teacher.kind=diffusion_forcing")
    several = ("stages.ar_teacher.kind=diffusion_forcing",)
    (whole, _), (causal, _) = trained(one, 1), trained(several, 1)
    assert whole[0]["loss/flow"] != causal[0]["loss/flow"]


def test_the_past_is_noised_up_to_the_level() -> None:
    """A level of nearly nothing is teacher forcing, nearly; the loss moves with the level."""
    (clean, _), (faint, _), (loud, _) = (
        trained(each, 1) for each in ((), ("stages.ar_teacher.context_noise=0.001",), VARIANTS["noised past"]))
    assert faint[0]["loss/flow"] == pytest.approx(clean[0]["loss/flow"], rel=1e-4)
    assert loud[0]["loss/flow"] != pytest.approx(clean[0]["loss/flow"], rel=1e-4)
