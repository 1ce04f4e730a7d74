"""The operators as the rest of the code sees them: torch sees one call each, with its shapes and its gradient.

The head never holds more projected features than one chunk. Its gradient by hidden and weight is made in the forward
pass, while the chunk is at hand, and multiplied in the backward pass by the one number that arrives there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mirai_kernels.cosine_head.triton_cosine import cosine_launch, fuse_launch, target_like
from mirai_kernels.launch import check_rows

CHUNK = 4096  # tokens projected at a time: 42 MB of 5,120 bf16 channels, which stay in the L2 cache


def cosine_head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of cos(weight hidden, target): a scalar in float32.

    hidden [..., dim] and weight [target_dim, dim] carry gradient; target [..., target_dim], of any length, does not.
    """
    tokens, goal = hidden.flatten(0, -2), target.detach().flatten(0, -2)
    check_rows("target", goal)
    if weight.shape != (goal.shape[1], tokens.shape[1]) or goal.shape[0] != tokens.shape[0]:
        raise ValueError(f"{tuple(weight.shape)} does not map {tuple(hidden.shape)} to {tuple(target.shape)}")
    gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _cosine_head(tokens, weight, goal, gradient)[0]


def fuse_targets(features: Tensor, segments: int, offsets: tuple[int, ...]) -> Tensor:
    """Unit targets [B, supervised segments, S, D] from features [B, segments * S, D], as in the reference; no graph."""
    features = features.detach()
    check_rows("features", features)
    return _fuse_targets(features, segments, list(offsets))


@torch.library.custom_op("mirai::cosine_head", mutates_args=())
def _cosine_head(hidden: Tensor, weight: Tensor, target: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(mean cosine, gradients of the sum of cosines by hidden and, in float32, by weight; empty if not asked for)."""
    cosine = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    grad_hidden, grad_weight = _gradients_like(hidden, weight, gradient)
    grad_weight.zero_()
    for first in range(0, hidden.shape[0], CHUNK):
        chunk = slice(first, first + CHUNK)
        projected = hidden[chunk] @ weight.T
        cosine_launch(projected, target[chunk], cosine[chunk], gradient).run()
        if gradient:
            torch.mm(projected, weight, out=grad_hidden[chunk])
            grad_weight += projected.T @ hidden[chunk]
    return cosine.mean(), grad_hidden, grad_weight


def _gradients_like(hidden: Tensor, weight: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    if not gradient:
        return hidden.new_empty(0), weight.new_empty(0, dtype=torch.float32)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape, dtype=torch.float32)


@_cosine_head.register_fake
def _(hidden: Tensor, weight: Tensor, target: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty((), dtype=torch.float32), *_gradients_like(hidden, weight, gradient)


@torch.library.custom_op("mirai::fuse_targets", mutates_args=())
def _fuse_targets(features: Tensor, segments: int, offsets: list[int]) -> Tensor:
    out = target_like(features, segments, tuple(offsets))
    fuse_launch(features, segments, tuple(offsets), out).run()
    return out


@_fuse_targets.register_fake
def _(features: Tensor, segments: int, offsets: list[int]) -> Tensor:
    return target_like(features, segments, tuple(offsets))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # nobody asks for the gradient of a gradient; zeros for it would cost memory
    hidden, weight = inputs[:2]
    ctx.tokens, ctx.weight_dtype = hidden.shape[0], weight.dtype
    ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, grad: Tensor, by_hidden: None, by_weight: None) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight = ctx.saved_tensors
    share = grad / ctx.tokens
    return grad_hidden * share, (grad_weight * share).to(ctx.weight_dtype), None, None


_cosine_head.register_autograd(_gradients, setup_context=_save)
