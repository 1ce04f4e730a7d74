"""The foresight head by fused kernels: how a run gets it, and how exact it is here (cycle/fusing.py chooses)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirai_dist.method.arithmetic import PRESETS, Arithmetic
from mirai_dist.method.foresight import Comparison, plain

SEGMENTS, TOKENS, OFFSETS = 3, 4, (0, 1)  # of what is probed


def load(arithmetic: Arithmetic) -> Comparison:
    """By the kernels of `mirai_kernels`: targets are unit vectors in the features' dtype, and of predictions only a
    chunk is held at a time. Raises ImportError without triton, which they are written in."""
    from mirai_kernels.cosine_head.op import cosine_head, fuse_targets

    def fuse(features: Tensor, segments: int, offsets: Sequence[int]) -> Tensor:
        return fuse_targets(features, segments, tuple(offsets))

    return Comparison(arithmetic, fuse, cosine_head)


@torch.enable_grad()
def largest_error(comparison: Comparison, widths: tuple[int, int], device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of the cosine, its gradients or the targets' directions, nan if there is one, against
    plain torch in float64. widths: of hidden states and of targets."""
    dim, target_dim = widths
    draws = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, SEGMENTS * TOKENS, dim, generator=draws)
    weight = torch.randn(target_dim, dim, generator=draws) / dim**0.5
    # Features that are like predictions: the mean of cosines that cancel has no relative error worth a bound.
    features = hidden @ weight.T + torch.randn(1, SEGMENTS * TOKENS, target_dim, generator=draws)
    rounded = [each.to(dtype) for each in (hidden, weight, features)]
    found = _results(comparison, [each.to(device) for each in rounded])
    exact = _results(plain(PRESETS["paper"]), [each.to(device).double() for each in rounded])
    errors = [(mine.double() - other).norm() / other.norm() for mine, other in zip(found, exact, strict=True)]
    return torch.stack(errors).max().item()


def _results(comparison: Comparison, inputs: list[Tensor]) -> list[Tensor]:
    """Directions of the targets, the cosine with features and its gradients by hidden states and weight."""
    hidden, weight = leaves = [each.requires_grad_() for each in inputs[:2]]
    features = inputs[2]
    targets = comparison.fuse(features, SEGMENTS, OFFSETS).double()
    found = comparison.cosine(hidden, weight, features)
    directions = targets / targets.norm(dim=-1, keepdim=True)
    return [directions, found.detach(), *torch.autograd.grad(found, leaves)]
