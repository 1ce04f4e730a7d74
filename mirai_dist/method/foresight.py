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
from torch.nn.functional import cosine_similarity, linear

from mirai_dist.method.arithmetic import PRESETS as PRESETS
from mirai_dist.method.arithmetic import Arithmetic, supervised_segments
from mirai_dist.method.arithmetic import captured_blocks as captured_blocks


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


@dataclass(frozen=True)
class Comparison:
    """How predictions are compared with targets: the arithmetic, and what computes it.

    fuse: targets [B, I, S, D] of features [B, segments * S, D], segments and offsets, as `fuse_targets`; only their
    directions matter, lengths may differ. cosine: mean cosine of hidden states [..., dim] times a weight [D, dim], and
    targets [..., D].
    """

    arithmetic: Arithmetic
    fuse: Callable[[Tensor, int, Sequence[int]], Tensor]
    cosine: Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(arithmetic: Arithmetic) -> Comparison:
    """In plain torch: all predictions are held, to be compared."""
    return Comparison(
        arithmetic,
        lambda features, segments, offsets: fuse_targets(features, segments, offsets, arithmetic),
        lambda hidden, weight, targets: cosine(linear(hidden, weight), targets, arithmetic),
    )


Predict = Callable[[Tensor, Sequence[Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]], Tensor]


def foresight_loss(
    predictor: Predict, states: Tensor, targets: Sequence[Tensor], comparison: Comparison
) -> tuple[Tensor, Tensor]:
    """(loss, cosine) of states [B, I, S, dim] against the targets of each answer of the predictor, [B, I or fewer, S,
    D]: one where offsets are fused.

    The predictor reads segments as batch, so that nothing crosses them, and gives the mean cosine over tokens, samples
    and (segment, answer) pairs. The loss is 1 - cos (release: -cos).
    """
    similarity = predictor(states, targets, comparison.cosine)
    return comparison.arithmetic.constant - similarity, similarity
