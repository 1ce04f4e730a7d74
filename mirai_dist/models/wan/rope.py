"""Three-axis rotary positions of Wan2.1: time, height and width each rotate their own share of a head.

Adjacent channels (2j, 2j+1) form a pair; time pairs come first, then height, then width. The angles are
computed in float64 and rounded once, to float32 (float64 for float64 activations): angles of frame 1023
keep seven digits, and nothing complex128 is ever moved.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

MAX_FRAMES = 1024  # the official table holds this many absolute positions an axis
THETA = 10000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that rotate with time, height and width: 44, 42, 42 of 128 (Wan2.1)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@lru_cache(maxsize=32)
def rotary_table(
    grid: tuple[int, int, int], first_frame: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [frames * rows * columns, head_dim / 2], of a token grid (frame-major).

    Raises ValueError when the last frame lies past the 1,024 positions Wan was trained to represent.
    """
    frames, rows, columns = grid
    if first_frame + frames > MAX_FRAMES:
        raise ValueError(
            f"frame {first_frame + frames - 1} is past Wan's {MAX_FRAMES} rotary positions: generate a shorter video"
        )
    widths = axis_widths(head_dim)
    positions = (
        torch.arange(first_frame, first_frame + frames, dtype=torch.float64).view(-1, 1, 1, 1),
        torch.arange(rows, dtype=torch.float64).view(1, -1, 1, 1),
        torch.arange(columns, dtype=torch.float64).view(1, 1, -1, 1),
    )
    per_axis = []
    for position, width in zip(positions, widths, strict=True):
        frequency = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        per_axis.append((position * frequency).expand(frames, rows, columns, -1))
    angles = torch.cat(per_axis, dim=-1).reshape(frames * rows * columns, head_dim // 2)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys [B, N, heads, head_dim] by a table of N positions; dtype is kept."""
    turns = torch.complex(*table).unsqueeze(-2)
    pairs = torch.view_as_complex(x.to(table[0].dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
