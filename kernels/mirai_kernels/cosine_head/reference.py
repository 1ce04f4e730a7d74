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
