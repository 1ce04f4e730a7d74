"""Specification: RMSNorm over the full width, then rotation of channel pairs by frame, row and column.

Adjacent channels (2j, 2j+1) of a head form a pair; the pairs of time come first, then those of height, then of width
(44, 42 and 42 of 128 channels). Everything is computed in at least float32 and rounded once, at the end.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-6
THETA = 10000.0
POSITIONS = 1024  # an axis; Wan was trained to represent this many
Angles = tuple[Tensor, Tensor]  # cosines and sines, each [positions, head_dim / 2]


class Placement(NamedTuple):
    """Where a run of tokens stands: its grid (frames, rows, columns), frame-major, and the frame it starts at.

    The frame may count from the video's beginning or from that of a sliding window; nothing else changes.
    """

    grid: tuple[int, int, int]
    first_frame: int = 0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that rotate with time, height and width."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@lru_cache(maxsize=8)
def angles(head_dim: int, device: torch.device, dtype: torch.dtype) -> Angles:
    """Cosines and sines [POSITIONS, head_dim / 2] of every position by each pair's own frequency.

    A pair's axis decides which row it reads, so one small table serves all grids and offsets. Computed in float64.
    """
    frequencies = [
        THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width) for width in axis_widths(head_dim)
    ]
    turns = torch.arange(POSITIONS, dtype=torch.float64).unsqueeze(1) * torch.cat(frequencies)
    return turns.cos().to(device, dtype), turns.sin().to(device, dtype)


def check_placement(placement: Placement, tokens: int) -> None:
    """Raise ValueError where tokens and grid disagree, or a position has no angle."""
    (frames, rows, columns), first = placement
    if frames * rows * columns != tokens:
        held = frames * rows * columns
        raise ValueError(f"a grid of {frames} x {rows} x {columns} holds {held} tokens, not {tokens}")
    if not 0 <= first <= POSITIONS - frames or max(rows, columns) > POSITIONS:
        last = first + frames - 1
        raise ValueError(f"frames {first} to {last} of a {rows} x {columns} grid pass position {POSITIONS}")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., dim] over its root mean square, times weight [dim]; in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight.to(x.dtype)


def rotate(x: Tensor, placement: Placement) -> Tensor:
    """Rotate x [B, N, heads, head_dim] (float32 or float64) to its tokens' positions."""
    check_placement(placement, x.shape[1])
    frames, rows, columns = placement.grid
    time, side, _ = (width // 2 for width in axis_widths(x.shape[-1]))
    token = torch.arange(x.shape[1], device=x.device)
    index = token.new_empty(x.shape[1], x.shape[-1] // 2)
    index[:, :time] = (placement.first_frame + token // (rows * columns)).unsqueeze(1)
    index[:, time : time + side] = (token // columns % rows).unsqueeze(1)
    index[:, time + side :] = (token % columns).unsqueeze(1)
    cos, sin = (table.gather(0, index).unsqueeze(1) for table in angles(x.shape[-1], x.device, x.dtype))
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def norm_rope(x: Tensor, weight: Tensor | None, heads: int, placement: Placement | None) -> Tensor:
    """x [B, N, dim] normalised (if there is a weight) and rotated (if there is a placement): [B, N, heads,
    head_dim]."""
    y = x.to(torch.promote_types(x.dtype, torch.float32)) if weight is None else rms_norm(x, weight)
    y = y.unflatten(-1, (heads, -1))
    return (y if placement is None else rotate(y, placement)).to(x.dtype)
