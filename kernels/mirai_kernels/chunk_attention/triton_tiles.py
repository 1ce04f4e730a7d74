"""What the kernels of this folder share: rows of one head of a [tokens, heads, width] tensor, as a tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(base, rows, limit, TOKEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr):
    """[len(rows), PADDED] in DTYPE: `WIDTH` numbers a row, rows TOKEN numbers apart; zeros from `limit` and WIDTH on.

    What lies there is not read: a cache holds whatever it held."""
    columns = tl.arange(0, PADDED)
    mask = (rows < limit)[:, None]
    if WIDTH < PADDED:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * TOKEN + columns[None, :], mask=mask, other=0.0).to(DTYPE)


@triton.jit
def store_tile(base, tile, rows, limit, TOKEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The reverse, in the dtype of what `base` points to."""
    columns = tl.arange(0, PADDED)
    mask = (rows < limit)[:, None]
    if WIDTH < PADDED:
        mask = mask & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * TOKEN + columns[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def head_of(tensor, batch_stride, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Where this program's head of its sample begins; axis 1 of the grid counts samples x heads."""
    sample, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    return tensor + sample.to(tl.int64) * batch_stride + head * WIDTH
