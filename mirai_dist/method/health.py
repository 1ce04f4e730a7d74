"""What says whether a DMD run is healthy, from tensors that its cycle holds anyway. No function runs a network.

Measures are parts of means, so that ranks and micro-batches can be averaged first: `name#n` a weight, `name#x` a sum
and `name#xx` a sum of squares. `combined` makes numbers of averaged parts and of nothing else:

    n and x         name = x / n                            (n absent: 1)
    n and xx        name = sqrt(xx / n)
    n, x and xx     name/mean and name/std

A weight of zero (no sample of this cycle fell into the bucket) leaves the name out. What it all costs: a few passes
over latents, which are thousands of times smaller than the networks' activations, and for `Moved` a copy of at most
`MOST_ELEMENTS` weights of a rank's shards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mirai_dist.method.dmd import Scores
from mirai_dist.method.flow import TIMESTEPS, expand_like

BUCKETS = 5  # of equal width over 0..1000
MOST_SEGMENTS = 21  # longer rollouts are pooled into at most so many parts: names in a reduction are limited
MOST_ELEMENTS = 1 << 20  # weights of a rank's shards that are compared around an update
Parts = dict[str, Tensor]


@torch.no_grad()
def measures(scores: Scores, frames_per_segment: int) -> Parts:
    """Parts of every measure of one micro-batch of a generator update, as scalars on the latents' device.

    dmd_gradient/tA-B         mean |g| of samples whose timestep is in the bucket
    critic_error/tA-B         the critic's mean squared velocity error, its loss, on the generator's present samples
    critic_error/to_teacher   the same over all samples, relative to the unguided teacher's error on them: 1 where the
                              critic still is the teacher, below where it knows the generator better
    critic_error/to_gaussian  the same relative to the best estimate that knows each channel's mean and variance and
                              nothing else: a critic above 1 has not even followed those, so it lags
    latents/*, teacher/*      mean and std per channel and per segment, of rollouts and of the unguided teacher's x0
    motion/*                  mean |frame - last frame|, of rollouts, of the teacher's x0, and their relation
    boundary_jump             mean |difference| across segment boundaries relative to inside segments; none frame-wise
    score/guided_std          spread of the guided teacher's x0 relative to the unguided one's
    score/gap                 |fake - real|, root mean square, relative to the spread of the unguided teacher's x0
    """
    wide = torch.promote_types(scores.latents.dtype, torch.float32)
    scores = Scores(*(each.detach().to(wide) for each in scores))
    return {
        **by_bucket("dmd_gradient", scores.gradient.abs().mean(dim=(1, 2, 3, 4)), scores.timesteps),
        **critic_error(scores),
        **statistics("latents", scores.latents, frames_per_segment),
        **statistics("teacher", scores.conditional, frames_per_segment),
        **motion(scores.latents, scores.conditional),
        **boundary_jump(scores.latents, frames_per_segment),
        **score_scale(scores),
    }


def bucket_names() -> list[str]:
    """Names of the timestep buckets, "t0-200" to "t800-1000"."""
    width = int(TIMESTEPS) // BUCKETS
    return [f"t{i * width}-{(i + 1) * width}" for i in range(BUCKETS)]


def by_bucket(name: str, values: Tensor, timesteps: Tensor) -> Parts:
    """Parts of the mean of values [B] per bucket of timesteps [B] in [0, 1000]."""
    index = (timesteps * (BUCKETS / TIMESTEPS)).long().clamp(0, BUCKETS - 1)
    inside = torch.nn.functional.one_hot(index, BUCKETS).to(values.dtype)  # [B, BUCKETS]
    # where, not a product: a value that is not finite must not leak into the buckets it is not in
    sums = torch.where(inside > 0, values[:, None], 0.0).sum(0)
    return {
        **{f"{name}/{bucket}#x": part for bucket, part in zip(bucket_names(), sums.unbind(), strict=True)},
        **{f"{name}/{bucket}#n": part for bucket, part in zip(bucket_names(), inside.sum(0).unbind(), strict=True)},
    }


def critic_error(scores: Scores) -> Parts:
    """Parts of the critic's error per bucket, and relative to the teacher's and to a Gaussian's.

    What a velocity is wrong by is the error of its x0 divided by sigma. For one channel of a clip, of variance s^2,
    the best estimate of a Gaussian is wrong by s^2 / ((1 - sigma)^2 s^2 + sigma^2), whatever its mean. Clip by clip, so
    that the number does not depend on which clips share a micro-batch.
    """
    sigma = expand_like(scores.timesteps, scores.latents)
    critic, teacher = (
        ((estimate - scores.latents) / sigma).square().mean(dim=(1, 2, 3, 4))
        for estimate in (scores.fake, scores.conditional)
    )
    variance = scores.latents.var(dim=(1, 3, 4), unbiased=False)  # [B, C]
    noise = sigma.reshape(-1, 1)
    gaussian = (variance / ((1.0 - noise).square() * variance + noise.square())).mean()
    return {
        **by_bucket("critic_error", critic, scores.timesteps),
        "critic_error/to_teacher#x": critic.mean(),
        "critic_error/to_teacher#n": teacher.mean(),
        "critic_error/to_gaussian#x": critic.mean(),
        "critic_error/to_gaussian#n": gaussian,
    }


def statistics(name: str, latents: Tensor, frames_per_segment: int) -> Parts:
    """Parts of mean and std of latents [B, F, C, H, W]: of all, per channel and per segment."""
    squares = latents.square()
    segments = _pooled(latents.shape[1] // frames_per_segment)
    parts = {f"{name}/all#x": latents.mean(), f"{name}/all#xx": squares.mean()}
    for kind, tensor in (("x", latents), ("xx", squares)):
        per_channel = tensor.mean(dim=(0, 1, 3, 4)).unbind()
        parts |= {f"{name}/channel-{i:02d}#{kind}": value for i, value in enumerate(per_channel)}
        per_segment = tensor.unflatten(1, (-1, frames_per_segment)).mean(dim=(0, 2, 3, 4, 5))
        parts |= {f"{name}/segment-{s[0]:02d}#{kind}": per_segment[s[0] : s[-1] + 1].mean() for s in segments}
    return parts


def _pooled(segments: int) -> list[range]:
    """At most MOST_SEGMENTS runs of segments; a rollout has many when it is long and frame-wise."""
    length = -(-segments // MOST_SEGMENTS)
    return [range(first, min(first + length, segments)) for first in range(0, segments, length)]


def steps(latents: Tensor) -> Tensor:
    """Mean |frame - last frame| of videos [B, F, C, H, W]: [B, F - 1]."""
    return (latents[:, 1:] - latents[:, :-1]).abs().mean(dim=(2, 3, 4))


def motion(latents: Tensor, reference: Tensor) -> Parts:
    """Parts of the mean frame-to-frame difference of rollouts and of reference videos, and of their relation."""
    own, other = steps(latents).mean(), steps(reference).mean()
    return {
        "motion/latents#x": own,
        "motion/teacher#x": other,
        "motion/relative#x": own,
        "motion/relative#n": other,
    }


def boundary_jump(latents: Tensor, frames_per_segment: int) -> Parts:
    """Parts of the mean step into a segment relative to the mean step inside segments; none frame-wise.

    The step from frame 0 is left out: a video autoencoder encodes the first frame alone, unlike all others.
    """
    across, inside = split_steps(steps(latents), frames_per_segment)
    if not across.numel() or not inside.numel():
        return {}
    return {"boundary_jump#x": across.mean(), "boundary_jump#n": inside.mean()}


def split_steps(steps: Tensor, frames_per_segment: int) -> tuple[Tensor, Tensor]:
    """Steps [B, F - 1] across segment boundaries and inside segments, the step from frame 0 in neither."""
    into = torch.arange(2, steps.shape[1] + 1, device=steps.device) % frames_per_segment == 0
    return steps[:, 1:][:, into], steps[:, 1:][:, ~into]


def score_scale(scores: Scores) -> Parts:
    """Parts of what guidance does to the teacher's spread, and of the gap between the two scores."""
    guided, unguided = (
        (each - each.mean(dim=(1, 3, 4), keepdim=True)).square().mean() for each in (scores.real, scores.conditional)
    )
    return {
        "score/guided_std#xx": guided,
        "score/guided_std#n": unguided,
        "score/gap#xx": (scores.fake - scores.real).square().mean(),
        "score/gap#n": unguided,
    }


# --- timesteps -----------------------------------------------------------------------------------------------


def unshifted(timestep: float, shift: float) -> float:
    """Uniform position in [0, 1] of a timestep of the shifted schedule: the inverse of `flow.shifted`."""
    sigma = timestep / TIMESTEPS
    return sigma / (shift - (shift - 1.0) * sigma)


@dataclass(frozen=True)
class Schedule:
    """What a recipe asks of timesteps: shift, and the bounds between which scores are compared."""

    shift: float
    lowest: float
    highest: float


def timestep_deviation(timesteps: Sequence[float], schedule: Schedule, among: range = range(1000)) -> float:
    """How far drawn score timesteps are from those the schedule asks for, in standard deviations of one draw.

    among: the integers, of 0..999, that were drawn from (`dmd.score_draws`). The uniform positions of right timesteps
    have a known mean and spread, so n independent draws deviate by about 1 / sqrt(n). Computed apart from the code
    that draws, from numbers of this rank: no device is waited for. ValueError without timesteps.
    """
    if not timesteps:
        raise ValueError("no timestep was drawn")
    mean, spread = _expected(schedule, among)
    drawn = sum(unshifted(t, schedule.shift) for t in timesteps) / len(timesteps)
    return (drawn - mean) / spread


@lru_cache
def _expected(schedule: Schedule, among: range) -> tuple[float, float]:
    """Mean and standard deviation of the uniform position of one draw."""
    low, high = (unshifted(t, schedule.shift) for t in (schedule.lowest, schedule.highest))
    positions = [min(max(i / TIMESTEPS, low), high) for i in among]
    mean = sum(positions) / len(positions)
    spread = math.sqrt(sum((u - mean) ** 2 for u in positions) / len(positions))
    return mean, max(spread, 1.0 / TIMESTEPS)  # one integer alone: draws are that fine


def step_list_error(used: Sequence[float], steps: Sequence[int], shift: float) -> float:
    """Largest difference between the denoising timesteps that a rollout uses and the recipe's steps, both before the
    shift warps them; infinite when their numbers differ."""
    if len(used) != len(steps):
        return math.inf
    return max((abs(TIMESTEPS * unshifted(t, shift) - step) for t, step in zip(used, steps, strict=True)), default=0.0)


# --- updates -------------------------------------------------------------------------------------------------


class Moved:
    """Compares weights before and after an update, on a rank's own shards.

    tensors: local tensors (no DTensor), of which an even sample of at most `most` elements is copied now.
    """

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor], most: int = MOST_ELEMENTS) -> None:
        stride = max(1, -(-sum(t.numel() for t in tensors) // most))
        # a view, never a copy: it must show the weights as they will be
        self._views = [t.detach().view(-1)[::stride] for t in tensors if t.numel()]
        self._before = self._now()

    def _now(self) -> Tensor:
        """The sample [n] as it is, in one tensor: few operations, however many parameters there are."""
        return torch.cat(self._views) if self._views else torch.zeros(0)

    @torch.no_grad()
    def parts(self, name: str) -> Parts:
        """Parts of `moved/name`, the fraction of weights that changed since, and of `update_ratio/name`, the norm of
        the change relative to the weights' norm."""
        before, now = self._before, self._now()
        wide = torch.promote_types(before.dtype, torch.float32)
        return {
            f"moved/{name}#x": (now != before).sum(),
            f"moved/{name}#n": torch.tensor(float(before.numel())),
            f"update_ratio/{name}#xx": (now.to(wide) - before.to(wide)).square().sum(),
            f"update_ratio/{name}#n": before.to(wide).square().sum(),
        }


GATES = {"gate/attention": 2, "gate/ffn": 5}  # rows of a block's modulation


@torch.no_grad()
def gate_norms(modulations: Sequence[tuple[Tensor, int]]) -> Parts:
    """Parts of `gate/attention` and `gate/ffn`: root mean square of the gates of the predictor's blocks.

    modulations: of each block this rank's rows [n, dim] of [6, dim], in the order scale, shift, gate twice, and the
    index of the first of them. A rank without a gate's row adds nothing to it.
    """
    parts = {}
    for name, row in GATES.items():
        own = [rows[row - first] for rows, first in modulations if first <= row < first + len(rows)]
        gates = torch.cat(own) if own else torch.zeros(0)
        wide = torch.promote_types(gates.dtype, torch.float32)
        parts[f"{name}#xx"] = gates.detach().to(wide).square().sum()
        parts[f"{name}#n"] = torch.tensor(float(gates.numel()))
    return parts


# --- numbers out of parts ------------------------------------------------------------------------------------


def combined(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers of averaged parts (see the head of this file); values that are no parts are kept as they are."""
    groups: dict[str, dict[str, float]] = {}
    out: dict[str, float] = {}
    for key, value in values.items():
        name, sign, part = key.partition("#")
        if sign:
            groups.setdefault(name, {})[part] = value
        else:
            out[name] = value
    for name, parts in groups.items():
        out |= _number(name, parts.get("n", 1.0), parts)
    return out | _distances(out)


def _number(name: str, weight: float, parts: Mapping[str, float]) -> dict[str, float]:
    if weight == 0:
        return {}
    if "xx" not in parts:
        return {name: parts["x"] / weight}
    square = parts["xx"] / weight
    if "x" not in parts:
        return {name: math.sqrt(square)}
    mean = parts["x"] / weight
    variance = square - mean * mean
    # rounding may leave it below zero; nan stays nan
    return {f"{name}/mean": mean, f"{name}/std": 0.0 if variance <= 0 else math.sqrt(variance)}


def _distances(values: Mapping[str, float]) -> dict[str, float]:
    """How far the rollouts' channels are from the teacher's.

    drift/mean: root mean square difference of their means, in the teacher's std. drift/std: the rollouts' std relative
    to the teacher's, each the root mean square over channels; above 1 for sound samples, because an estimate of x0
    from a noisy rollout is smoother than a sample.
    """
    channels = [name.split("/")[1] for name in values if re.fullmatch(r"teacher/channel-\d+/mean", name)]
    own, other = (_root_mean_square(values[f"{who}/{c}/std"] for c in channels) for who in ("latents", "teacher"))
    if other == 0:  # nothing was measured, or the teacher's estimate has no spread
        return {}
    shift = _root_mean_square(values[f"latents/{c}/mean"] - values[f"teacher/{c}/mean"] for c in channels)
    return {"drift/mean": shift / other, "drift/std": own / other}


def _root_mean_square(values: Iterable[float]) -> float:
    """0 without values."""
    squares = [value * value for value in values]
    return math.sqrt(sum(squares) / max(1, len(squares)))
