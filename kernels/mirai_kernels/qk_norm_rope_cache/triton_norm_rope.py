"""Row kernels: a program holds one token's [heads, head_dim] in registers, so every tensor moves once.

Forward: the second grid axis picks queries, keys or values, which share a launch. Backward: a program walks over
tokens a fixed stride apart and keeps its own row of the weight's gradient; the rows are added up afterwards in a
fixed order, so two runs agree bit for bit.
"""

# pyright: reportGeneralTypeIssues=false
# A compiled function that another calls has a value, though triton declares that it never returns.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirai_kernels.launch import Launch, padded, row_warps
from mirai_kernels.qk_norm_rope_cache.reference import EPS, Angles, Placement, axis_widths

WALKERS = 528  # programs of the backward kernel: four on each of 132 multiprocessors


@triton.jit
def _tile(HEADS: tl.constexpr, DIM: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM_PADDED: tl.constexpr):
    """Offsets of a row's channels as [heads, head_dim], padded to powers of two, and which of them exist."""
    head = tl.arange(0, HEADS_PADDED)[:, None]
    channel = tl.arange(0, DIM_PADDED)[None, :]
    return head * DIM + channel, (head < HEADS) & (channel < DIM)


@triton.jit
def _turns(
    cos, sin, token, rows, columns, first_frame, TIME: tl.constexpr, SIDE: tl.constexpr, HALF_PADDED: tl.constexpr
):
    """Cosines and sines [1, pairs] of one token: each pair reads the row of its own axis' position."""
    pair = tl.arange(0, HALF_PADDED)
    frame = first_frame + token // (rows * columns)
    position = tl.where(pair < TIME, frame, tl.where(pair < TIME + SIDE, token // columns % rows, token % columns))
    there = pair < TIME + 2 * SIDE
    offset = position * (TIME + 2 * SIDE) + pair
    return tl.load(cos + offset, there, other=0.0)[None, :], tl.load(sin + offset, there, other=0.0)[None, :]


@triton.jit
def _rotate(x, cos, sin):
    """Pairs of x [heads, 2 pairs] turned; a negated sine turns them back."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [x.shape[0], x.shape[1]])


@triton.jit
def _row(
    x, out, weight, cos, sin, token, rows, columns, first_frame,
    HEADS: tl.constexpr, DIM: tl.constexpr, TIME: tl.constexpr, SIDE: tl.constexpr, ROTATE: tl.constexpr,
    EPSILON: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """One row from x to out, normalised if there is a weight, rotated if asked."""
    offset, there = _tile(HEADS, DIM, HEADS_PADDED, DIM_PADDED)
    value = tl.load(x + offset, there, other=0.0).to(tl.float32)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(tl.sum(value * value, 1), 0) / (HEADS * DIM) + EPSILON)
        value = value * scale * tl.load(weight + offset, there, other=0.0).to(tl.float32)
    if ROTATE:
        c, s = _turns(cos, sin, token, rows, columns, first_frame, TIME, SIDE, DIM_PADDED // 2)
        value = _rotate(value, c, s)
    tl.store(out + offset, value.to(out.dtype.element_ty), there)


@triton.jit
def norm_rope_forward(
    q, k, v, q_out, k_out, v_out, q_weight, k_weight, cos, sin,
    q_batch, q_token, k_batch, k_token, v_batch, v_token,
    q_out_batch, q_out_token, k_out_batch, k_out_token, v_out_batch, v_out_token,
    tokens, rows, columns, first_frame,
    HEADS: tl.constexpr, DIM: tl.constexpr, TIME: tl.constexpr, SIDE: tl.constexpr,
    ROTATE: tl.constexpr, ROTATE_KEYS: tl.constexpr,
    EPSILON: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (batch * tokens, tensors): queries, then keys where there are any, then values."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = tl.program_id(0) % tokens
    part = tl.program_id(1)
    if part == 0:
        _row(
            q + batch * q_batch + token.to(tl.int64) * q_token,
            q_out + batch * q_out_batch + token.to(tl.int64) * q_out_token,
            q_weight, cos, sin, token, rows, columns, first_frame,
            HEADS, DIM, TIME, SIDE, ROTATE, EPSILON, HEADS_PADDED, DIM_PADDED,
        )  # fmt: skip
    if k is not None:  # noqa: SIM102 - decided when it is compiled, then when it runs
        if part == 1:
            _row(
                k + batch * k_batch + token.to(tl.int64) * k_token,
                k_out + batch * k_out_batch + token.to(tl.int64) * k_out_token,
                k_weight, cos, sin, token, rows, columns, first_frame,
                HEADS, DIM, TIME, SIDE, ROTATE_KEYS, EPSILON, HEADS_PADDED, DIM_PADDED,
            )  # fmt: skip
    if v is not None:  # noqa: SIM102
        if part == 2:
            _row(
                v + batch * v_batch + token.to(tl.int64) * v_token,
                v_out + batch * v_out_batch + token.to(tl.int64) * v_out_token,
                None, cos, sin, token, rows, columns, first_frame,
                HEADS, DIM, TIME, SIDE, False, EPSILON, HEADS_PADDED, DIM_PADDED,
            )  # fmt: skip


@triton.jit
def norm_rope_backward(
    grad, x, weight, grad_x, partial, cos, sin,
    x_batch, x_token, grad_batch, grad_token, total, tokens, rows, columns, first_frame,
    HEADS: tl.constexpr, DIM: tl.constexpr, TIME: tl.constexpr, SIDE: tl.constexpr, ROTATE: tl.constexpr,
    EPSILON: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (walkers,). grad_x is contiguous; partial [walkers, heads * head_dim] float32 is this walker's row."""
    offset, there = _tile(HEADS, DIM, HEADS_PADDED, DIM_PADDED)
    collected = tl.zeros([HEADS_PADDED, DIM_PADDED], tl.float32)
    for step in range(tl.cdiv(total - tl.program_id(0), tl.num_programs(0))):
        place = tl.program_id(0) + step * tl.num_programs(0)
        batch = (place // tokens).to(tl.int64)
        token = place % tokens
        slope = tl.load(
            grad + batch * grad_batch + token.to(tl.int64) * grad_token + offset, there, other=0.0
        ).to(tl.float32)  # fmt: skip
        if ROTATE:
            c, s = _turns(cos, sin, token, rows, columns, first_frame, TIME, SIDE, DIM_PADDED // 2)
            slope = _rotate(slope, c, -s)
        if weight is not None:
            value = tl.load(
                x + batch * x_batch + token.to(tl.int64) * x_token + offset, there, other=0.0
            ).to(tl.float32)  # fmt: skip
            scale = tl.rsqrt(tl.sum(tl.sum(value * value, 1), 0) / (HEADS * DIM) + EPSILON)
            value = value * scale
            collected += slope * value
            slope = slope * tl.load(weight + offset, there, other=0.0).to(tl.float32)
            along = tl.sum(tl.sum(slope * value, 1), 0) / (HEADS * DIM)
            slope = scale * (slope - value * along)
        row = grad_x + place.to(tl.int64) * (HEADS * DIM)
        tl.store(row + offset, slope.to(grad_x.dtype.element_ty), there)
    if weight is not None:
        tl.store(partial + tl.program_id(0).to(tl.int64) * (HEADS * DIM) + offset, collected, there)


def constants(heads: int, head_dim: int) -> dict[str, int | float | bool]:
    """What a head's shape fixes."""
    time, side, _ = axis_widths(head_dim)
    return {
        "HEADS": heads,
        "DIM": head_dim,
        "TIME": time // 2,
        "SIDE": side // 2,
        "EPSILON": EPS,
        "HEADS_PADDED": padded(heads),
        "DIM_PADDED": padded(head_dim),
    }


def where(placement: Placement | None, angles: Angles | None) -> dict[str, Tensor | int | None]:
    """The arguments of the position."""
    (_, rows, columns), first = placement or Placement((1, 1, 1))
    cos, sin = angles or (None, None)
    return {"cos": cos, "sin": sin, "rows": rows, "columns": columns, "first_frame": first}


def forward_launch(
    inputs: list[Tensor],
    outputs: list[Tensor],
    weights: list[Tensor | None],
    placement: Placement | None,
    angles: Angles | None,
    rotate_keys: bool = True,
) -> Launch:
    """inputs: one, two or three of q, k, v [B, N, dim]; outputs [B, N, heads, head_dim], of any batch and token stride;
    weights: of q and k."""
    batch, tokens, _ = inputs[0].shape
    heads, head_dim = outputs[0].shape[2:]
    arguments: dict[str, Tensor | int | None] = {"tokens": tokens, **where(placement, angles)}
    for index, name in enumerate("qkv"):
        x, out = (each[index] if index < len(inputs) else None for each in (inputs, outputs))
        arguments |= {name: x, f"{name}_out": out}
        arguments |= {f"{name}_batch": x.stride(0) if x is not None else 0}
        arguments |= {f"{name}_token": x.stride(1) if x is not None else 0}
        arguments |= {f"{name}_out_batch": out.stride(0) if out is not None else 0}
        arguments |= {f"{name}_out_token": out.stride(1) if out is not None else 0}
    arguments |= {"q_weight": weights[0], "k_weight": weights[1] if len(weights) > 1 else None}
    fixed = constants(heads, head_dim) | {"ROTATE": angles is not None}
    fixed |= {"ROTATE_KEYS": angles is not None and rotate_keys}
    grid = (batch * tokens, len(inputs))
    return Launch(norm_rope_forward, grid, arguments, fixed, row_warps(heads * head_dim))


def backward_launch(
    grad: Tensor, x: Tensor, weight: Tensor | None, placement: Placement | None, angles: Angles | None
) -> tuple[Launch, Tensor, Tensor | None]:
    """(launch, gradient of x, rows to add up for the weight's) for grad [B, N, heads, head_dim] and x [B, N, dim]."""
    batch, tokens, heads, head_dim = grad.shape
    total = batch * tokens
    walkers = min(WALKERS, total)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    partial = None if weight is None else x.new_empty(walkers, heads * head_dim, dtype=torch.float32)
    arguments: dict[str, Tensor | int | None] = {
        "grad": grad,
        "x": x,
        "weight": weight,
        "grad_x": grad_x,
        "partial": partial,
        "x_batch": x.stride(0),
        "x_token": x.stride(1),
        "grad_batch": grad.stride(0),
        "grad_token": grad.stride(1),
        "total": total,
        "tokens": tokens,
        **where(placement, angles),
    }
    fixed = constants(heads, head_dim) | {"ROTATE": angles is not None}
    launch = Launch(norm_rope_backward, (walkers,), arguments, fixed, row_warps(heads * head_dim))
    return launch, grad_x, partial
