"""The gate between stages: whether rollouts are fit for the next stage to start from.

DMD cannot repair a start whose segments do not join or whose clips stand still, and its losses do not show it. So a
few fixed prompts are rolled out with the code that training uses, three numbers are measured a clip, and a stage
whose start is outside the bounds does not begin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median

import torch
from torch import Tensor

from mirai_dist.config.gates import Bounds, Interval
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

    @classmethod
    def of_clips(cls, clips: Sequence[GateMeasures]) -> GateMeasures:
        """The measures of several sets of clips, in their order."""
        return cls(*(tuple(v for each in clips for v in getattr(each, field.name)) for field in fields(cls)))


@dataclass(frozen=True)
class Judged:
    """One measure of all clips, and the bounds it was held against, both in its own unit.

    reference: the median of the reference clips, of which the bounds are multiples; nan where they are absolute.
    """

    measure: str
    values: tuple[float, ...]
    legal: Interval
    reference: float

    @property
    def median(self) -> float:
        """nan where a value is."""
        return median(self.values) if all(map(math.isfinite, self.values)) else math.nan

    @property
    def outside(self) -> list[float]:
        return [value for value in self.values if value not in self.legal]


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


def judge(measures: GateMeasures, bounds: Bounds, reference: GateMeasures | None = None) -> list[Judged]:
    """Each measure beside its bounds.

    reference: measures of good clips of the same shape (real ones, or the teacher's); with it the bounds are multiples
    of its medians, without it they are absolute.
    """
    found = []
    for each in fields(GateMeasures):
        legal, values = bounds.of(each.name), getattr(measures, each.name)
        unit = median(getattr(reference, each.name)) if reference else 1.0
        legal = Interval(legal.low * unit, legal.high * unit)
        found.append(Judged(each.name, values, legal, unit if reference else math.nan))
    return found


def reasons(judged: Sequence[Judged], failing: float) -> list[str]:
    """Why the gate fails, one sentence a measure; empty where it passes. failing: share of clips that may fail."""
    broken = {i for each in judged for i, value in enumerate(each.values) if not math.isfinite(value)}
    if broken:
        return [f"{len(broken)} of {len(judged[0].values)} clips hold values that are not finite"]
    found = []
    for each in judged:
        outside, clips = each.outside, len(each.values)
        if len(outside) > failing * clips:
            fault = _FAULTS[each.measure][0 if median(outside) < each.legal.low else 1]
            against = "" if math.isnan(each.reference) else f", {each.reference:.3g} in clean clips"
            found.append(
                f"{fault}: {each.measure} of {len(outside)} of {clips} clips is outside {each.legal} "
                f"(median {each.median:.3g}{against})"
            )
    return found
