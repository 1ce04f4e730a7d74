"""Row kernels of the head: cosine and its gradient from one read of a row, and the fusion of targets."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirai_kernels.cosine_head.reference import SMALLEST_NORM, supervised
from mirai_kernels.launch import Launch, padded, row_warps


@triton.jit
def _inverse_norm(value, SMALLEST: tl.constexpr):
    return 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(value * value, 0)), SMALLEST)


@triton.jit
def cosine_rows(
    projected, target, cosine, target_token,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, SMALLEST: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Grid (rows,). Writes each row's cosine and, if asked, its gradient by the projected row over that row."""
    channel = tl.arange(0, DIM_PADDED)
    there = channel < DIM
    row = tl.program_id(0).to(tl.int64)
    value = tl.load(projected + row * DIM + channel, there, other=0.0).to(tl.float32)
    goal = tl.load(target + row * target_token + channel, there, other=0.0).to(tl.float32)
    goal = goal * _inverse_norm(goal, SMALLEST)
    inverse = _inverse_norm(value, SMALLEST)
    unit = value * inverse
    similarity = tl.sum(unit * goal, 0)
    tl.store(cosine + row, similarity)
    if GRADIENT:
        # a row shorter than the smallest norm is divided by a constant, so its length has no gradient
        along = tl.where(inverse * SMALLEST < 1.0, similarity, 0.0)
        slope = (goal - along * unit) * inverse
        tl.store(projected + row * DIM + channel, slope.to(projected.dtype.element_ty), there)


@triton.jit
def fuse_rows(
    features, out, batch_stride, token_stride, segments, segment_tokens, targets,
    OFFSETS: tl.constexpr, LAST: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Grid (batch * targets * segment_tokens,). Bit k of OFFSETS stands for offset k, LAST is the largest."""
    channel = tl.arange(0, DIM_PADDED)
    there = channel < DIM
    row = tl.program_id(0).to(tl.int64)
    batch = row // (targets * segment_tokens)
    segment = row // segment_tokens % targets
    place = features + batch * batch_stride + channel
    total = tl.zeros([DIM_PADDED], tl.float32)
    for k in tl.static_range(LAST + 1):
        if (OFFSETS >> k) % 2 == 1:
            token = (segment + k) * segment_tokens + row % segment_tokens
            ahead = there & (segment + k < segments)
            total += tl.load(place + token * token_stride, ahead, other=0.0).to(tl.float32)
    # the mean has the direction of the sum
    tl.store(out + row * DIM + channel, (total * _inverse_norm(total, SMALLEST)).to(out.dtype.element_ty), there)


def _constants(dim: int) -> dict[str, int | float | bool]:
    return {"DIM": dim, "DIM_PADDED": padded(dim), "SMALLEST": SMALLEST_NORM}


def cosine_launch(projected: Tensor, target: Tensor, cosine: Tensor, gradient: bool) -> Launch:
    """projected [rows, D], contiguous, becomes its gradient if asked; target [rows, D]; cosine [rows] float32."""
    rows, dim = projected.shape
    arguments: dict[str, Tensor | int | None] = {
        "projected": projected,
        "target": target,
        "cosine": cosine,
        "target_token": target.stride(0),
    }
    return Launch(cosine_rows, (rows,), arguments, _constants(dim) | {"GRADIENT": gradient}, row_warps(dim))


def fuse_launch(features: Tensor, segments: int, offsets: tuple[int, ...], out: Tensor) -> Launch:
    """features [B, segments * S, D]; out [B, supervised segments, S, D], contiguous."""
    batch, tokens, dim = features.shape
    targets, segment_tokens = supervised(segments, offsets), tokens // segments
    arguments: dict[str, Tensor | int | None] = {
        "features": features,
        "out": out,
        "batch_stride": features.stride(0),
        "token_stride": features.stride(1),
        "segments": segments,
        "segment_tokens": segment_tokens,
        "targets": targets,
    }
    fixed = _constants(dim) | {"OFFSETS": sum(1 << k for k in set(offsets)), "LAST": max(offsets)}
    return Launch(fuse_rows, (batch * targets * segment_tokens,), arguments, fixed, row_warps(dim))


def target_like(features: Tensor, segments: int, offsets: tuple[int, ...]) -> Tensor:
    """Memory for the targets. Raises ValueError where segments do not divide the tokens."""
    batch, tokens, dim = features.shape
    if tokens % segments:
        raise ValueError(f"{segments} segments do not divide {tokens} tokens")
    return torch.empty(
        batch, supervised(segments, offsets), tokens // segments, dim, dtype=features.dtype, device=features.device
    )
