"""Foresight distillation: pull generator states toward what the encoder saw of the future (Video-Mirai section 3).

States h_i come from the exit pass of each segment; the encoder reads the finished rollout, future included, at
timestep 0. The target of segment i is the mean of the features of segments i + k over the valid offsets k
(target fusion, one loss); the last segments keep what offsets remain, and are dropped when none do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

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


def foresight_loss(
    predictor: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """(loss, cosine) of states [B, I, S, dim] against targets [B, I, S, D]; segments become batch, so that
    nothing crosses them. The loss is the mean over supervised segments of 1 - cos (release: -cos)."""
    predicted = predictor(states.flatten(0, 1))
    similarity = cosine(predicted, targets.flatten(0, 1), arithmetic)
    return arithmetic.constant - similarity, similarity
