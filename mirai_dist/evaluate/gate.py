"""The gate between stages: whether rollouts are fit for the next stage to start from.

DMD cannot repair a start whose segments do not join or whose clips stand still, and its losses do not show it. So a
few fixed prompts are rolled out with the code that training uses, three numbers are measured a clip, and a stage
whose start is outside the bounds does not begin.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mirai_dist.method.health import split_steps, steps

FRAMES_PER_LATENT = 4  # pixel frames of every latent frame but the first, which holds one
STILL = 1e-6  # a step of this share of the spread is no motion but rounding


@dataclass(frozen=True)
class GateMeasures:
    """Three numbers a clip.

    boundary_jump: the largest step across a segment boundary relative to the clip's usual step: the mean step inside
    segments, or frame-wise, where every step is a boundary, the median step. 0 for a clip that stands still. The step
    from the first frame is left out: a video autoencoder encodes that frame alone, unlike all others.
    motion: mean |frame - last frame| relative to the clip's spread; 2 / sqrt(pi) = 1.13 for frames of independent
    Gaussian noise. saturation: standard deviation of the clip's values, about 1 for Wan's normalised latents.
    """

    boundary_jump: tuple[float, ...]
    motion: tuple[float, ...]
    saturation: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """JSON values: of each measure its median and every clip's value."""
        return {
            each.name: {"median": median(getattr(self, each.name)), "clips": list(getattr(self, each.name))}
            for each in fields(self)
        }


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high  # nan is outside


@dataclass(frozen=True)
class Bounds:
    """Where each measure of a clip must lie; `relative` ones are in multiples of the reference clips' median.

    failing: the share of clips that may be outside.
    """

    boundary_jump: Interval
    motion: Interval
    saturation: Interval
    failing: float = 0.25

    def of(self, measure: str) -> Interval:
        return getattr(self, measure)


RELATIVE = Bounds(Interval(0.0, 2.0), Interval(0.4, 2.0), Interval(0.5, 1.6))
ABSOLUTE = Bounds(Interval(0.0, 3.0), Interval(0.02, 1.1), Interval(0.4, 1.6))  # latents normalised to spread 1

_FAULTS = {
    "boundary_jump": ("segments join up less well", "segments jump at their boundaries"),
    "motion": ("clips stand still", "clips flicker"),
    "saturation": ("clips are washed out", "clips are over-saturated"),
}


@torch.no_grad()
def measure(videos: Tensor, frames_per_segment: int, pixels: bool = False) -> GateMeasures:
    """Measures of latent videos [N, F, C, H, W], or of pixel videos [N, T, 3, H, W] with T = 1 + 4 (F - 1).

    frames_per_segment: latent frames of a segment. ValueError: not at least two whole segments and three frames.
    """
    stride = FRAMES_PER_LATENT if pixels else 1
    frames, rest = divmod(videos.shape[1] - 1, stride)
    if rest or (frames + 1) % frames_per_segment or frames + 1 < max(3, 2 * frames_per_segment):
        raise ValueError(
            f"{videos.shape[1]} {'pixel' if pixels else 'latent'} frames cannot be measured: need two or more whole "
            f"segments of {frames_per_segment} latent frames"
        )
    videos = videos.detach().to(torch.promote_types(videos.dtype, torch.float32))
    spread = videos.flatten(1).std(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    every = steps(videos) / spread[:, None]
    # of pixels the steps from one latent frame to the next alone: those inside are the autoencoder's doing
    jumps = _jumps(every[:, ::stride], frames_per_segment)
    return GateMeasures(tuple(jumps.tolist()), tuple(every.mean(dim=1).tolist()), tuple(spread.tolist()))


def _jumps(steps: Tensor, frames_per_segment: int) -> Tensor:
    """[N] of steps [N, F - 1] between latent frames."""
    across, inside = split_steps(steps, frames_per_segment)
    usual = inside.mean(dim=1) if inside.numel() else across.median(dim=1).values
    largest = across.amax(dim=1)
    return torch.where(largest <= STILL, 0.0, largest / usual.clamp_min(STILL))


def check(measures: GateMeasures, bounds: Bounds, reference: GateMeasures | None = None) -> list[str]:
    """Why the gate fails, one sentence a measure; empty where it passes.

    reference: measures of good clips of the same shape (real ones, or the teacher's); with it the bounds are multiples
    of its medians, without it they are absolute.
    """
    reasons = []
    for measure, (too_low, too_high) in _FAULTS.items():
        values, legal = getattr(measures, measure), bounds.of(measure)
        unit = median(getattr(reference, measure)) if reference else 1.0
        low, high = legal.low * unit, legal.high * unit
        outside = [value for value in values if value not in Interval(low, high)]
        if len(outside) > bounds.failing * len(values):
            fault = too_low if median(outside) < low else too_high
            against = f", {unit:.3g} in reference clips" if reference else ""
            reasons.append(
                f"{fault}: {measure} of {len(outside)} of {len(values)} clips is outside {low:.3g} to {high:.3g} "
                f"(median {median(values):.3g}{against})"
            )
    return reasons
