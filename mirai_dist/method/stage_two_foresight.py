"""Foresight while the few-step start is distilled: the target is the ground-truth future (Video-Mirai D.4).

In causal ODE distillation the generator is teacher-forced on ground truth, so its future is known: the encoder reads
the whole ground-truth video at timestep 0, as it reads the finished rollout in DMD, and the state of segment i is the
residual stream of the noisy half at mid depth, at whatever timestep the segment is noised to. What is compared is one
of three things ("fusion"):

    none      one target an offset k: features of segment i + k, token by token
    frames    one target an offset k: features of segment i + k averaged over the frames of that segment, so that
              what is left is one token a place; the state is averaged alike before the predictor reads it
    offsets   one target: features averaged over the valid offsets, token by token, as in DMD

The paper names them "no fusion (one loss per offset)", "per-frame averaging (encoder features averaged across frames
within each segment)" and averaging across offsets. It leaves open, and we decide: the state is pooled like the target,
before the predictor (the authors' release pools so where it pools at all, over places); with one loss an offset the
predictor answers every offset from an output of its own, since a single answer to several cosine losses would be an
answer to their mean; the loss is the mean over all (segment, offset) pairs that exist. With one frame a segment,
`frames` is `none`. The encoder reads the whole clip, not the future segment alone, as in DMD. There is no replay: the
predictor of DMD has critic updates to learn in, this one is updated with every update of the generator.

The paper speaks of ODE distillation alone. Consistency distillation is teacher-forced on ground truth just as well, so
both few-step starts can have it; there the states are the student's, never those of its moving average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mirai_dist.method.arithmetic import outputs_of_predictor as outputs_of_predictor
from mirai_dist.method.foresight import Comparison, supervised_segments

FUSIONS = ("none", "frames", "offsets")


class Clip(NamedTuple):
    """How the tokens of a video lie: segments, and frames a segment."""

    segments: int
    frames: int


def ground_truth_targets(
    features: Tensor, clip: Clip, offsets: Sequence[int], fusion: str, comparison: Comparison
) -> list[Tensor]:
    """Targets of each of the predictor's answers, [B, I, S, D], without graph, from encoder features
    [B, segments * frames * places, D].

    Entry n of an answer is the target of segment n: an answer has targets for the first I segments, those that have
    a segment so far ahead (0 for an offset beyond the clip). S is frames * places, or places where frames are averaged.
    ValueError for an unknown fusion.
    """
    _check(fusion)
    if fusion == "offsets":
        return [comparison.fuse(features, clip.segments, offsets)]
    features = features.detach()
    if comparison.arithmetic.wide_fusion:
        features = features.to(torch.promote_types(features.dtype, torch.float32))
    pooled = _by_segment(features, clip, fusion)
    return [pooled[:, k:] for k in offsets]


def segment_states(hidden: Tensor, clip: Clip, offsets: Sequence[int], fusion: str) -> Tensor:
    """What the predictor reads, [B, I, S, dim]: the states [B, segments * frames * places, dim] of those segments
    that have any target. ValueError for an unknown fusion."""
    _check(fusion)
    supervised = len(supervised_segments(clip.segments, offsets))  # they are the first ones
    return _by_segment(hidden, clip, fusion)[:, :supervised]


def _by_segment(tokens: Tensor, clip: Clip, fusion: str) -> Tensor:
    """Tokens [B, segments * frames * places, D] as [B, segments, S, D], averaged over frames if the fusion does."""
    framed = tokens.unflatten(1, (clip.segments, clip.frames, -1))
    return framed.mean(dim=2) if fusion == "frames" else framed.flatten(2, 3)


def _check(fusion: str) -> None:
    if fusion not in FUSIONS:
        raise ValueError(f"fusion {fusion!r} is none of {', '.join(FUSIONS)}")
