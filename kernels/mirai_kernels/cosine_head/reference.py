"""Specification of the cosine head: a linear map without bias, then the mean cosine to a constant target."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_NORM = 1e-8  # below it a vector counts as this long, as in torch's cosine_similarity


def cosine_head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of cos(weight hidden, target): a scalar in float32, or float64 for float64 inputs.

    hidden [..., dim] and weight [target_dim, dim] carry gradient; target [..., target_dim] is a constant.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    projected = hidden.to(wide) @ weight.to(wide).T
    goal = target.detach().to(wide)
    lengths = projected.norm(dim=-1).clamp_min(SMALLEST_NORM) * goal.norm(dim=-1).clamp_min(SMALLEST_NORM)
    return ((projected * goal).sum(dim=-1) / lengths).mean()


def supervised(segments: int, offsets: tuple[int, ...]) -> int:
    """How many segments have a target: the first ones, for which the nearest offset is within the video.

    Raises ValueError where an offset points backwards or none is given.
    """
    if not offsets or min(offsets) < 0:
        raise ValueError(f"offsets are segments ahead, 0 or more of them: {offsets}")
    return max(0, segments - min(offsets))


def fuse_targets(features: Tensor, segments: int, offsets: tuple[int, ...]) -> Tensor:
    """Unit vectors [B, supervised segments, S, D] in the dtype of features [B, segments * S, D], without graph.

    Segment i has the direction of the mean over those of its offsets k for which there is a segment i + k.
    """
    wide = features.detach().to(torch.promote_types(features.dtype, torch.float32)).unflatten(1, (segments, -1))
    fused = torch.stack(
        [
            wide[:, [i + k for k in offsets if i + k < segments]].mean(dim=1)
            for i in range(supervised(segments, offsets))
        ],
        dim=1,
    )
    return (fused / fused.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)).to(features.dtype)
