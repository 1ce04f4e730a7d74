"""Row kernels: a program walks over rows of one frame, with the frame's gate, scale and shift in registers.

Backward: each program keeps its own sums for the three vectors' gradients; they are added up afterwards in a fixed
order, so two runs agree bit for bit.
"""

# pyright: reportGeneralTypeIssues=false
# A compiled function that another calls has a value, though triton declares that it never returns.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirai_kernels.launch import Launch, padded, programs, row_warps
from mirai_kernels.residual_modulate.reference import E4M3_MAX, EPS, SMALLEST_ROW, frames_of

PROGRAMS = 528  # aimed at: four on each of 132 multiprocessors
MOST_ROWS = 40  # of one program


@triton.jit
def _centred(value, there, DIM: tl.constexpr, EPSILON: tl.constexpr):
    """(value - mean, 1 / standard deviation) of a row."""
    centred = tl.where(there, value - tl.sum(value, 0) / DIM, 0.0)
    return centred, tl.rsqrt(tl.sum(centred * centred, 0) / DIM + EPSILON)


@triton.jit
def _vector(vector, batch_stride, frame_stride, channel, there):
    """This program's row of a gate, scale or shift, whose stride is 0 where it is shared."""
    row = vector + tl.program_id(0).to(tl.int64) * batch_stride + tl.program_id(1).to(tl.int64) * frame_stride
    return tl.load(row + channel, there, other=0.0).to(tl.float32)


@triton.jit
def residual_modulate_forward(
    x, y, gate, scale, shift, residual, out, row_scale,
    x_batch, x_token, y_batch, y_token,
    gate_batch, gate_frame, scale_batch, scale_frame, shift_batch, shift_frame,
    tokens, frame_tokens, rows,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, EPSILON: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Grid (batch, frames, groups of rows). residual and out are contiguous; a row_scale asks for scaled rows."""
    channel = tl.arange(0, DIM_PADDED)
    there = channel < DIM
    factor = 1.0 + _vector(scale, scale_batch, scale_frame, channel, there)
    offset = _vector(shift, shift_batch, shift_frame, channel, there)
    if gate is not None:
        gated = _vector(gate, gate_batch, gate_frame, channel, there)
    batch = tl.program_id(0).to(tl.int64)
    first = tl.program_id(2) * rows
    for step in range(tl.minimum(rows, frame_tokens - first)):
        token = (tl.program_id(1) * frame_tokens + first + step).to(tl.int64)
        place = batch * tokens + token
        value = tl.load(x + batch * x_batch + token * x_token + channel, there, other=0.0).to(tl.float32)
        if y is not None:
            update = tl.load(y + batch * y_batch + token * y_token + channel, there, other=0.0).to(tl.float32)
            if gate is not None:
                update = update * gated
            stored = (value + update).to(residual.dtype.element_ty)
            tl.store(residual + place * DIM + channel, stored, there)
            value = stored.to(tl.float32)
        centred, inverse = _centred(value, there, DIM, EPSILON)
        value = centred * inverse * factor + offset
        if row_scale is not None:
            size = tl.maximum(tl.max(tl.where(there, tl.abs(value), 0.0), 0), SMALLEST) / LARGEST
            tl.store(row_scale + place, size)
            value = value / size
        tl.store(out + place * DIM + channel, value.to(out.dtype.element_ty), there)


@triton.jit
def residual_modulate_backward(
    grad_residual, grad_out, residual, y, gate, scale, grad_x, grad_y, partial,
    grad_residual_batch, grad_residual_token, grad_out_batch, grad_out_token,
    residual_batch, residual_token, y_batch, y_token, gate_batch, gate_frame, scale_batch, scale_frame,
    tokens, frame_tokens, rows,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, EPSILON: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Grid as forward. grad_x, grad_y contiguous; partial [batch, frames, groups, VECTORS, dim] float32 in the order
    scale, shift, gate."""
    channel = tl.arange(0, DIM_PADDED)
    there = channel < DIM
    factor = 1.0 + _vector(scale, scale_batch, scale_frame, channel, there)
    by_scale = tl.zeros([DIM_PADDED], tl.float32)
    by_shift = tl.zeros([DIM_PADDED], tl.float32)
    if gate is not None:
        gated = _vector(gate, gate_batch, gate_frame, channel, there)
        by_gate = tl.zeros([DIM_PADDED], tl.float32)
    batch = tl.program_id(0).to(tl.int64)
    first = tl.program_id(2) * rows
    for step in range(tl.minimum(rows, frame_tokens - first)):
        token = (tl.program_id(1) * frame_tokens + first + step).to(tl.int64)
        place = batch * tokens + token
        row = residual + batch * residual_batch + token * residual_token
        centred, inverse = _centred(tl.load(row + channel, there, other=0.0).to(tl.float32), there, DIM, EPSILON)
        normed = centred * inverse
        row = grad_out + batch * grad_out_batch + token * grad_out_token
        slope = tl.load(row + channel, there, other=0.0).to(tl.float32)
        by_shift += slope
        by_scale += slope * normed
        slope = slope * factor
        slope = inverse * (slope - tl.sum(slope, 0) / DIM - normed * (tl.sum(slope * normed, 0) / DIM))
        if grad_residual is not None:
            row = grad_residual + batch * grad_residual_batch + token * grad_residual_token
            slope += tl.load(row + channel, there, other=0.0).to(tl.float32)
        tl.store(grad_x + place * DIM + channel, slope.to(grad_x.dtype.element_ty), there)
        if y is not None:
            if gate is not None:
                by_gate += slope * tl.load(
                    y + batch * y_batch + token * y_token + channel, there, other=0.0
                ).to(tl.float32)  # fmt: skip
                slope = slope * gated
            tl.store(grad_y + place * DIM + channel, slope.to(grad_y.dtype.element_ty), there)
    program = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    sums = partial + program * VECTORS * DIM + channel
    tl.store(sums, by_scale, there)
    tl.store(sums + DIM, by_shift, there)
    if gate is not None:
        tl.store(sums + 2 * DIM, by_gate, there)


def _rows(name: str, x: Tensor | None) -> dict[str, Tensor | int | None]:
    """A tensor [B, N, dim] and its strides, as arguments."""
    strides = x.stride() if x is not None else (0, 0)
    return {name: x, f"{name}_batch": strides[0], f"{name}_token": strides[1]}


def _shared(name: str, x: Tensor | None) -> dict[str, Tensor | int | None]:
    """A vector [1 or B, 1 or frames, dim] and its strides, 0 where it is shared."""
    strides = [0, 0] if x is None else [x.stride(axis) if x.shape[axis] > 1 else 0 for axis in (0, 1)]
    return {name: x, f"{name}_batch": strides[0], f"{name}_frame": strides[1]}


def _grid(x: Tensor, frames: int) -> tuple[tuple[int, int, int], dict[str, Tensor | int | None]]:
    """The grid, and how its programs share the rows."""
    batch, tokens, _ = x.shape
    frame_tokens = tokens // frames
    rows = min(MOST_ROWS, frame_tokens, programs(batch * tokens, PROGRAMS))
    return (batch, frames, programs(frame_tokens, rows)), {
        "tokens": tokens, "frame_tokens": frame_tokens, "rows": rows,
    }  # fmt: skip


def _constants(dim: int) -> dict[str, int | float | bool]:
    return {"DIM": dim, "DIM_PADDED": padded(dim), "EPSILON": EPS}


def forward_launch(
    sources: tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor],
    residual: Tensor | None,
    out: Tensor,
    row_scale: Tensor | None = None,
) -> Launch:
    """sources: x, y, gate, scale, shift as in the reference. residual and out are written, and row_scale [B, N, 1] if
    given (out is then float8)."""
    x, y, gate, scale, shift = sources
    vectors = [each for each in (gate, scale, shift) if each is not None]
    grid, shares = _grid(x, frames_of(x, vectors))
    arguments = _rows("x", x) | _rows("y", y) | _shared("gate", gate) | _shared("scale", scale) | shares
    arguments |= _shared("shift", shift) | {"residual": residual, "out": out, "row_scale": row_scale}
    fixed = _constants(x.shape[2]) | {"LARGEST": E4M3_MAX, "SMALLEST": SMALLEST_ROW}
    return Launch(residual_modulate_forward, grid, arguments, fixed, row_warps(x.shape[2]))


def backward_launch(
    grads: tuple[Tensor | None, Tensor],
    saved: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
    frames: int,
    grad_x: Tensor,
    grad_y: Tensor | None,
) -> tuple[Launch, Tensor]:
    """(launch, sums [batch, frames, groups, 2 or 3, dim] for scale, shift and gate).

    grads: of the residual (if it was stored) and of the output. saved: residual, y, gate, scale.
    """
    residual, y, gate, scale = saved
    grid, shares = _grid(residual, frames)
    vectors = 2 if gate is None else 3
    partial = residual.new_empty(*grid, vectors, residual.shape[2], dtype=torch.float32)
    arguments = _rows("grad_residual", grads[0]) | _rows("grad_out", grads[1]) | _rows("residual", residual)
    arguments |= _rows("y", y) | _shared("gate", gate) | _shared("scale", scale) | shares
    arguments |= {"grad_x": grad_x, "grad_y": grad_y, "partial": partial}
    fixed = _constants(residual.shape[2]) | {"VECTORS": vectors}
    return Launch(residual_modulate_backward, grid, arguments, fixed, row_warps(residual.shape[2])), partial
