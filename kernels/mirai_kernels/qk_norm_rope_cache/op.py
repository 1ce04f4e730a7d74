"""The operators as the rest of the code sees them: torch sees one call each, with its shapes and its gradient.

`norm_rope` takes one tensor, `qk_norm_rope` two; both have gradients. `qk_norm_rope_cache` also moves the values, and
writes keys and values where the cache wants them; what is cached is a constant, so it serves passes without gradient.
Saved for backward: the inputs, nothing of the size of a tensor besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mirai_kernels.launch import check_rows
from mirai_kernels.qk_norm_rope_cache.reference import Angles, Placement, angles, check_placement
from mirai_kernels.qk_norm_rope_cache.triton_norm_rope import backward_launch, forward_launch


def norm_rope(x: Tensor, weight: Tensor | None, heads: int, placement: Placement | None) -> Tensor:
    """x [B, N, dim] normalised (if there is a weight [dim]) and rotated (if there is a placement), as [B, N, heads,
    head_dim]. Without a weight it rotates keys that a sliding window reads at other frames than they were written."""
    check_rows("x", x)
    cos, sin = _angles(x, heads, placement)
    return _norm_rope(x, weight, cos, sin, heads, _position(placement))


def qk_norm_rope(
    q: Tensor, k: Tensor, weights: tuple[Tensor, Tensor], heads: int, placement: Placement, rotate_keys: bool = True
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, N, dim] normalised by their weights [dim] and rotated, as [B, N, heads, head_dim].

    rotate_keys: false leaves keys at no position, for a cache whose reader decides where its window starts.
    """
    check_rows("q", q)
    check_rows("k", k)
    cos, sin = _angles(q, heads, placement)
    return _qk_norm_rope(q, k, list(weights), cos, sin, heads, _position(placement), rotate_keys)


def qk_norm_rope_cache(
    qkv: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    slots: tuple[Tensor, Tensor],
    placement: Placement,
    rotate_keys: bool = True,
) -> Tensor:
    """Queries as from `qk_norm_rope`; keys so treated, and values as they are, go into the slots.

    qkv: each [B, N, dim]. slots: where this segment's keys and values belong in the cache, [B, N, heads, head_dim], of
    any batch and token stride. Raises RuntimeError where a gradient would be lost: what is cached carries none.
    """
    if torch.is_grad_enabled() and any(each.requires_grad for each in (*qkv, *weights)):
        raise RuntimeError("qk_norm_rope_cache writes constants: call it without gradient, or qk_norm_rope with")
    for name, x in zip("qkv", qkv, strict=True):
        check_rows(name, x)
    for name, slot in zip(("key slot", "value slot"), slots, strict=True):
        if slot.shape[:2] != qkv[0].shape[:2] or slot.stride()[2:] != (slot.shape[3], 1):
            raise ValueError(f"the {name} {tuple(slot.shape)} is no run of whole tokens like {tuple(qkv[0].shape)}")
    cos, sin = _angles(qkv[0], slots[0].shape[2], placement)
    return _qk_norm_rope_cache(*qkv, list(weights), *slots, [cos, sin], [*_position(placement), int(rotate_keys)])


def _angles(x: Tensor, heads: int, placement: Placement | None) -> Angles | tuple[None, None]:
    if placement is None:
        return None, None
    check_placement(placement, x.shape[1])
    return angles(x.shape[2] // heads, x.device, torch.float32)


def _position(placement: Placement | None) -> list[int]:
    return [1, 1, 0] if placement is None else [*placement.grid[1:], placement.first_frame]


def _placed(position: list[int], x: Tensor) -> Placement:
    rows, columns, first_frame = position[:3]
    return Placement((x.shape[1] // (rows * columns), rows, columns), first_frame)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.new_empty(*x.shape[:2], heads, x.shape[2] // heads)


def _table(cos: Tensor | None, sin: Tensor | None) -> Angles | None:
    return None if cos is None or sin is None else (cos, sin)


@torch.library.custom_op("mirai::norm_rope", mutates_args=())
def _norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, heads: int, position: list[int]
) -> Tensor:
    out = _heads(x, heads)
    forward_launch([x], [out], [weight], _placed(position, x), _table(cos, sin)).run()
    return out


@_norm_rope.register_fake
def _(x: Tensor, weight: Any, cos: Any, sin: Any, heads: int, position: list[int]) -> Tensor:
    return _heads(x, heads)


@torch.library.custom_op("mirai::norm_rope_backward", mutates_args=())
def _norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, position: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradients by x and weight (of no elements where there is none)."""
    launch, grad_x, partial = backward_launch(grad, x, weight, _placed(position, x), _table(cos, sin))
    launch.run()
    if weight is None or partial is None:
        return grad_x, x.new_empty(0)
    return grad_x, partial.sum(dim=0).to(weight.dtype)


@_norm_rope_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor | None, cos: Any, sin: Any, position: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else torch.empty_like(weight)


@torch.library.custom_op("mirai::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    heads: int,
    position: list[int],
    rotate_keys: bool,
) -> tuple[Tensor, Tensor]:
    out = _heads(q, heads), _heads(k, heads)
    forward_launch([q, k], list(out), list(weights), _placed(position, q), (cos, sin), rotate_keys).run()
    return out


@_qk_norm_rope.register_fake
def _(q: Tensor, k: Tensor, weights: Any, cos: Any, sin: Any, heads: int, position: Any, rotate_keys: Any) -> Any:
    return _heads(q, heads), _heads(k, heads)


@torch.library.custom_op("mirai::qk_norm_rope_cache", mutates_args=("key_slot", "value_slot"))
def _qk_norm_rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: list[Tensor],
    key_slot: Tensor,
    value_slot: Tensor,
    angles: list[Tensor],
    position: list[int],
) -> Tensor:
    out = _heads(q, key_slot.shape[2])
    outputs = [out, key_slot, value_slot]
    table = angles[0], angles[1]
    forward_launch([q, k, v], outputs, list(weights), _placed(position, q), table, bool(position[3])).run()
    return out


@_qk_norm_rope_cache.register_fake
def _(q: Tensor, k: Any, v: Any, weights: Any, key_slot: Tensor, value_slot: Any, angles: Any, position: Any) -> Tensor:
    return _heads(q, key_slot.shape[2])


def _save_one(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, cos, sin, _, ctx.position = inputs
    ctx.save_for_backward(x, weight, cos, sin)


def _one_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, cos, sin = ctx.saved_tensors
    grad_x, grad_weight = _norm_rope_backward(grad.contiguous(), x, weight, cos, sin, ctx.position)
    return grad_x, None if weight is None else grad_weight, None, None, None, None


def _save_two(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, weights, cos, sin, _, ctx.position, ctx.rotate_keys = inputs
    ctx.save_for_backward(q, k, *weights, cos, sin)


def _two_backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Any, ...]:
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    table = (cos, sin) if ctx.rotate_keys else (None, None)
    by_q, by_q_weight = _norm_rope_backward(grad_q.contiguous(), q, q_weight, cos, sin, ctx.position)
    by_k, by_k_weight = _norm_rope_backward(grad_k.contiguous(), k, k_weight, *table, ctx.position)
    return by_q, by_k, [by_q_weight, by_k_weight], None, None, None, None, None


_norm_rope.register_autograd(_one_backward, setup_context=_save_one)
_qk_norm_rope.register_autograd(_two_backward, setup_context=_save_two)
