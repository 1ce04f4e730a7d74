"""Foresight distillation: pull generator states toward what the encoder saw of the future (Video-Mirai section 3).

States h_i come from the exit pass of each segment; the encoder reads the finished rollout, future included, at
timestep 0. The target of segment i is the mean of the features of segments i + k over the valid offsets k
(target fusion, one loss); the last segments keep what offsets remain, and are dropped when none do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


@dataclass(frozen=True)
class Arithmetic:
    """What the paper and the authors' release compute differently (spec 7.3).

    extra_blocks: the release reads the output of block *index* L, one block later than the paper's L blocks.
    constant: 1 - cos in the paper, -cos in the release (same gradient).
    wide_fusion: fuse and compare in float32; the release works in the features' own dtype.
    gated_predictor: six learned vectors a predictor block, starting at zero, as the release's AdaLN amounts to.
    bf16_predictor: the release stores predictor masters in bfloat16, where most updates round away.
    replay_after_generator: whether the critic update next to the generator update replays too (paper: all).
    """

    extra_blocks: int
    constant: float
    wide_fusion: bool
    gated_predictor: bool
    bf16_predictor: bool
    replay_after_generator: bool


PRESETS = {
    "paper": Arithmetic(0, 1.0, True, False, False, True),
    "release": Arithmetic(1, 0.0, False, True, True, False),
}


def captured_blocks(blocks: int, depth: float, arithmetic: Arithmetic) -> int:
    """Blocks executed before the residual stream is read: 15 of 30 and 20 of 40 at depth 0.5 (release: +1).

    At least one and at most all.
    """
    return min(blocks, max(1, round(blocks * depth) + arithmetic.extra_blocks))


def supervised_segments(segments: int, offsets: Sequence[int]) -> list[int]:
    """Segments that have at least one valid target."""
    return [i for i in range(segments) if any(i + k < segments for k in offsets)]


def fuse_targets(features: Tensor, segments: int, offsets: Sequence[int], arithmetic: Arithmetic) -> Tensor:
    """Targets [B, supervised segments, S, D] from encoder features [B, segments * S, D], without graph.

    Token s of segment i is matched with token s of segment i + k: same frame within the segment, same place.
    """
    features = features.detach().unflatten(1, (segments, -1))
    if arithmetic.wide_fusion:
        features = features.to(torch.promote_types(features.dtype, torch.float32))
    fused = []
    for i in supervised_segments(segments, offsets):
        valid = [i + k for k in offsets if i + k < segments]
        fused.append(features[:, valid].mean(dim=1))
    return torch.stack(fused, dim=1)


def cosine(predicted: Tensor, targets: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Mean cosine over tokens, then over samples and segments; predicted and targets [..., S, D]."""
    if arithmetic.wide_fusion:
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        predicted, targets = predicted.to(dtype), targets.to(dtype)
    return cosine_similarity(predicted, targets.to(predicted.dtype), dim=-1).mean()


def foresight_loss(
    predictor: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """(loss, cosine) of states [B, I, S, dim] against targets [B, I, S, D]; segments become batch, so that
    nothing crosses them. The loss is the mean over supervised segments of 1 - cos (release: -cos)."""
    predicted = predictor(states.flatten(0, 1))
    similarity = cosine(predicted, targets.flatten(0, 1), arithmetic)
    return arithmetic.constant - similarity, similarity
