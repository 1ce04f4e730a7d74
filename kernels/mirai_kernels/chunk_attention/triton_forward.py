"""Attention of a segment's queries to runs of a cache and to its own keys, in one pass of online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from mirai_kernels.chunk_attention.triton_tiles import head_of, load_tile, store_tile

RUN_ENDS = ["first_0", "end_0", "first_1", "end_1", "first_2", "end_2"]  # first and end of three runs of the cache
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
    state, q, k, v, start, stop, scale,
    TOKEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(weighted values, sum of weights, largest score so far) after keys start .. stop; scores in powers of two."""
    attended, total, largest = state
    for first in range(start, stop, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        keys = load_tile(k, rows, stop, TOKEN, WIDTH, PADDED, q.dtype)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where((rows < stop)[None, :], scores, float("-inf"))
        reached = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - reached[:, None])
        kept = tl.exp2(largest - reached)
        total = total * kept + tl.sum(weights, 1)
        values = load_tile(v, rows, stop, TOKEN, WIDTH, PADDED, q.dtype)
        attended = attended * kept[:, None]
        attended = tl.dot(weights.to(q.dtype), values, attended, input_precision=PRECISION)
        largest = reached
    return attended, total, largest


@triton.jit(do_not_specialize=[*RUN_ENDS, "queries", "own"])
def forward(
    q, own_k, own_v, cached_k, cached_v, out, lse,
    first_0, end_0, first_1, end_1, first_2, end_2, queries, own, q_batch, own_batch, cached_batch, scale,
    RUNS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):
    """One tile of queries of one head. Of the three runs of cached tokens the first RUNS count."""
    TOKEN: tl.constexpr = HEADS * WIDTH
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    tile = load_tile(head_of(q, q_batch, HEADS, WIDTH), rows, queries, TOKEN, WIDTH, PADDED, COMPUTE)
    own_k, own_v = head_of(own_k, own_batch, HEADS, WIDTH), head_of(own_v, own_batch, HEADS, WIDTH)
    cached_k, cached_v = head_of(cached_k, cached_batch, HEADS, WIDTH), head_of(cached_v, cached_batch, HEADS, WIDTH)
    attended = tl.zeros([BLOCK_Q, PADDED], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    state = (attended, total, largest)
    power = scale * LOG2_E
    runs = (first_0, end_0, first_1, end_1, first_2, end_2)
    for run in tl.static_range(RUNS):
        first, end = runs[2 * run], runs[2 * run + 1]
        state = _attend(state, tile, cached_k, cached_v, first, end, power, TOKEN, WIDTH, PADDED, BLOCK_K, PRECISION)
    attended, total, largest = _attend(
        state, tile, own_k, own_v, 0, own, power, TOKEN, WIDTH, PADDED, BLOCK_K, PRECISION
    )
    attended = attended / total[:, None]
    store_tile(head_of(out, queries * TOKEN, HEADS, WIDTH), attended, rows, queries, TOKEN, WIDTH, PADDED)
    normaliser = (largest + tl.log2(total)) / LOG2_E
    tl.store(lse + tl.program_id(1).to(tl.int64) * queries + rows, normaliser, mask=rows < queries)
