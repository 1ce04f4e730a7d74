"""The gate between stages: smooth clips pass; jumps, still, flickering, washed-out and saturated ones are named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mirai_dist.config import load
from mirai_dist.config.gates import ABSOLUTE, RELATIVE, Bounds, Interval, bounds_of
from mirai_dist.evaluate.gate import GateMeasures, judge, measure, reasons

CLIPS, FRAMES = 8, 12


def check(measures: GateMeasures, bounds: Bounds, reference: GateMeasures | None = None) -> list[str]:
    return reasons(judge(measures, bounds, reference), bounds.failing)


def smooth(frames: int = FRAMES, channels: int = 16, seed: int = 1) -> Tensor:
    """Clips of spread 1 whose content turns evenly: each frame a mixture of two pictures."""
    pictures = torch.randn(2, CLIPS, 1, channels, 8, 8, generator=torch.Generator().manual_seed(seed))
    angle = torch.linspace(0.2, 1.7, frames).view(1, frames, 1, 1, 1)
    return pictures[0] * angle.cos() + pictures[1] * angle.sin()


def with_jumps(clips: Tensor, frames_per_segment: int, size: float) -> Tensor:
    """Every segment shifted against the last, to and fro."""
    segment = torch.arange(clips.shape[1]) // frames_per_segment
    return clips + size * (segment % 2 - 0.5).view(1, -1, 1, 1, 1)


FAULTY = {
    "boundary_jump": ("segments jump at their boundaries", with_jumps(smooth(), 3, 0.4)),
    "motion": ("clips stand still", smooth()[:, :1].expand(-1, FRAMES, -1, -1, -1)),
    "saturation": ("clips are over-saturated", 2.5 * smooth()),
}


@pytest.mark.parametrize("frames_per_segment", [1, 2, 3, 4, 6])
def test_smooth_clips_pass(frames_per_segment: int) -> None:
    reference, clips = (measure(smooth(seed=seed), frames_per_segment) for seed in (1, 2))
    assert check(clips, RELATIVE, reference) == [] and check(clips, ABSOLUTE) == []
    assert clips.boundary_jump == pytest.approx([1.0] * CLIPS, rel=0.1)


@pytest.mark.parametrize("fault", FAULTY)
def test_each_fault_fails_for_its_own_reason(fault: str) -> None:
    sentence, clips = FAULTY[fault]
    reference = measure(smooth(seed=2), 3)
    for found in (check(measure(clips, 3), RELATIVE, reference), check(measure(clips, 3), ABSOLUTE)):
        assert len(found) == 1
        assert found[0].startswith(sentence) and f"{fault} of 8 of 8 clips" in found[0]


def test_washed_out_and_flickering_clips() -> None:
    noise = torch.randn(CLIPS, FRAMES, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    assert [r.split(":")[0] for r in check(measure(0.2 * smooth(), 3), ABSOLUTE)] == ["clips are washed out"]
    assert [r.split(":")[0] for r in check(measure(noise, 3), ABSOLUTE)] == ["clips flicker"]


def test_one_jump_is_enough_frame_wise_too() -> None:
    clips = smooth()
    clips[:, 6:] += 1.0
    for frames_per_segment in (1, 2, 3):
        assert check(measure(clips, frames_per_segment), ABSOLUTE)[0].startswith("segments jump")


def test_a_jump_inside_segments_is_none_at_boundaries() -> None:
    clips = smooth()
    clips[:, 4:] += 1.0
    assert max(measure(clips, 3).boundary_jump) < 1.0 < 2.0 < min(measure(clips, 4).boundary_jump)


def test_the_first_frame_may_be_unlike_the_others() -> None:
    clips = smooth()
    odd = clips.clone()
    odd[:, 0] += 3.0
    for frames_per_segment in (1, 3):
        assert measure(odd, frames_per_segment).boundary_jump == pytest.approx(
            measure(clips, frames_per_segment).boundary_jump, rel=0.7
        )
        assert check(measure(odd, frames_per_segment), Bounds(Interval(0, 2), Interval(0, 9), Interval(0, 9))) == []


def test_pixels_are_measured_between_latent_frames() -> None:
    """Each latent frame decodes to four equal pictures: no step inside, and as many boundaries as in latents."""
    clips = smooth(channels=3)
    index = torch.cat((torch.zeros(1, dtype=torch.long), torch.arange(1, FRAMES).repeat_interleave(4)))
    for frames_per_segment in (1, 2, 3):
        jumping = with_jumps(clips, frames_per_segment, 0.3)
        latent = measure(jumping, frames_per_segment)
        pixel = measure(jumping[:, index], frames_per_segment, pixels=True)
        assert pixel.boundary_jump == pytest.approx(latent.boundary_jump, rel=0.02)
        assert pixel.motion == pytest.approx([each / 4 for each in latent.motion], rel=0.05)


def test_a_few_odd_clips_pass_and_many_do_not() -> None:
    still = FAULTY["motion"][1]
    clips = smooth()
    clips[:2] = still[:2]
    assert check(measure(clips, 3), ABSOLUTE) == []
    clips[:3] = still[:3]
    (reason,) = check(measure(clips, 3), ABSOLUTE)
    assert reason.startswith("clips stand still: motion of 3 of 8 clips")


def test_closed_form() -> None:
    """Independent Gaussian frames: |difference| is 2 / sqrt(pi) of the spread."""
    noise = 3.0 * torch.randn(2, 40, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    found = measure(noise, 2)
    assert found.motion == pytest.approx([2 / math.sqrt(math.pi)] * 2, rel=0.01)
    assert found.saturation == pytest.approx([3.0] * 2, rel=0.01)
    assert found.boundary_jump == pytest.approx([1.0] * 2, rel=0.05)


def test_nothing_and_not_a_number_fail() -> None:
    zeros = measure(torch.zeros(2, 6, 4, 2, 2), 2)
    assert [r.split(":")[0] for r in check(zeros, ABSOLUTE)] == ["clips stand still", "clips are washed out"]
    clips = smooth()
    clips[1, 0, 0, 0, 0] = math.nan
    for bounds in (ABSOLUTE, Bounds(Interval(0, 9), Interval(0, 9), Interval(0, 9), failing=1.0)):
        assert check(measure(clips, 3), bounds) == ["1 of 8 clips hold values that are not finite"]


def test_bounds_are_multiples_of_the_median_where_there_is_a_reference() -> None:
    measures, reference = GateMeasures((1.0,), (3.0,), (1.0,)), GateMeasures((1.0,) * 3, (0.5, 2.0, 9.0), (1.0,) * 3)
    bounds = Bounds(Interval(0, 2), Interval(1, 2), Interval(0, 2))
    _, motion, _ = judge(measures, bounds, reference)
    assert (motion.legal, motion.reference, motion.outside) == (Interval(2, 4), 2.0, [])
    _, motion, _ = judge(measures, bounds)
    assert motion.legal == Interval(1, 2) and math.isnan(motion.reference) and motion.outside == [3.0]


def test_bounds_of_a_recipe() -> None:
    """Relative to clips, absolute where a dmd stage has prompts alone; what the recipe writes takes their place."""
    small, store = "tests/unit/data/small.yaml", ("data.prompts=x", "text.encoder=umt5", "text.path=x")
    assert bounds_of(load(small).recipe, "distil") == RELATIVE
    recipe = load(small, [*store, "stages.distil.gate={clips: 2, motion: [0, 5], failing: 0.5}"]).recipe
    assert bounds_of(recipe, "few_step") == RELATIVE
    assert bounds_of(recipe, "distil") == Bounds(ABSOLUTE.boundary_jump, Interval(0, 5), ABSOLUTE.saturation, 0.5)


@pytest.mark.parametrize(
    ("frames", "segment", "pixels"), [(4, 3, False), (3, 3, False), (2, 1, False), (8, 2, True), (5, 1, True)]
)
def test_what_is_no_clip_of_segments_is_refused(frames: int, segment: int, pixels: bool) -> None:
    with pytest.raises(ValueError, match="cannot be measured"):
        measure(torch.zeros(1, frames, 3, 4, 4), segment, pixels)
