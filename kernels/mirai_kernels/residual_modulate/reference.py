"""Specification: x + gate y, LayerNorm without affine parameters, then (1 + scale) and shift of each token's frame.

Computed in at least float32. The residual is rounded where it is stored, and what follows starts from the stored one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6
E4M3_MAX = 448.0
SMALLEST_ROW = 1e-12  # the largest value of a row counts as at least this much where rows are scaled


def frames_of(x: Tensor, vectors: list[Tensor]) -> int:
    """Frames that x [B, N, dim] is divided into by vectors, each [1 or B, 1 or frames, dim].

    Raises ValueError where shapes disagree or a vector's channels are not contiguous.
    """
    frames = max(each.shape[1] for each in vectors)
    for each in vectors:
        fits = each.shape[0] in (1, x.shape[0]) and each.shape[1] in (1, frames) and each.shape[2:] == x.shape[2:]
        if not fits or each.stride(-1) != 1 or x.shape[1] % frames:
            raise ValueError(
                f"a gate, scale or shift is [1 or batch, 1 or frames, dim], contiguous in dim, with frames dividing "
                f"the tokens; got {tuple(each.shape)} with strides {tuple(each.stride())} for {tuple(x.shape)}"
            )
    return frames


def per_frame(vector: Tensor, tokens: int) -> Tensor:
    """A vector [., frames, dim] for each token of its frame: [., tokens, dim]."""
    return vector.repeat_interleave(tokens // vector.shape[1], dim=1)


def residual_modulate(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """(residual, modulated), both like x [B, N, dim]. Without y the residual is x; without gate it counts as 1."""
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens = x.shape[1]
    residual = x
    if y is not None:
        update = y.to(wide) if gate is None else y.to(wide) * per_frame(gate.to(wide), tokens)
        residual = (x.to(wide) + update).to(x.dtype)
    normed = functional.layer_norm(residual.to(wide), (x.shape[-1],), eps=EPS)
    modulated = normed * (1 + per_frame(scale.to(wide), tokens)) + per_frame(shift.to(wide), tokens)
    return residual, modulated.to(x.dtype)


def row_scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x / scale as float8 e4m3, scale [..., 1] in at least float32) with each row's largest value at the format's."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST_ROW) / E4M3_MAX
    return (wide / scale).to(torch.float8_e4m3fn), scale
