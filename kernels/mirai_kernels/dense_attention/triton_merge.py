"""Two attended results of the same queries, over different keys, as the one over all of these keys."""

from __future__ import annotations

import triton
import triton.language as tl

from mirai_kernels.dense_attention.library import Attended
from mirai_kernels.launch import Launch, padded, programs

ROWS = 32  # rows of one head a program


@triton.jit(do_not_specialize=["rows"])
def merge(
    out, lse, other_out, other_lse, rows, out_batch, other_batch, lse_batch, lse_head, other_lse_batch, other_lse_head,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):
    """`rows` rows of a sample are tokens x heads. A part weighs exp(its lse - that of both)."""
    sample = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    real = row < rows
    inside = real[:, None] & (column < WIDTH)[None, :]
    token, head = row // HEADS, row % HEADS
    at = lse + sample * lse_batch + head * lse_head + token
    ours = tl.load(at, mask=real, other=0.0)
    theirs = tl.load(other_lse + sample * other_lse_batch + head * other_lse_head + token, mask=real, other=0.0)
    largest = tl.maximum(ours, theirs)
    our_weight, their_weight = tl.exp(ours - largest), tl.exp(theirs - largest)
    total = our_weight + their_weight
    place = row[:, None] * WIDTH + column[None, :]
    into = out + sample * out_batch + place
    mine = tl.load(into, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(other_out + sample * other_batch + place, mask=inside, other=0.0).to(tl.float32)
    both = mine * (our_weight / total)[:, None] + other * (their_weight / total)[:, None]
    tl.store(into, both.to(out.dtype.element_ty), mask=inside)
    tl.store(at, largest + tl.log(total), mask=real)


def merge_launch(attended: Attended, other: Attended) -> Launch:
    """Make `attended` what it would be over its own keys and those of `other`, in place.

    Tokens and heads of outputs lie densely; samples and, in log-sum-exps, heads may lie apart.
    """
    samples, tokens, heads, width = attended.out.shape
    rows = tokens * heads
    arguments = {
        "out": attended.out,
        "lse": attended.lse,
        "other_out": other.out,
        "other_lse": other.lse,
        "rows": rows,
        "out_batch": attended.out.stride(0),
        "other_batch": other.out.stride(0),
        "lse_batch": attended.lse.stride(0),
        "lse_head": attended.lse.stride(1),
        "other_lse_batch": other.lse.stride(0),
        "other_lse_head": other.lse.stride(1),
    }
    constants = {"HEADS": heads, "WIDTH": width, "PADDED": padded(width), "ROWS": ROWS}
    return Launch(merge, (programs(rows, ROWS), samples), arguments, constants, warps=4)
