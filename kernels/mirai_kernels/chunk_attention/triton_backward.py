"""Gradients of chunk attention: of queries towards all keys, of keys and values for the segment's own alone.

Cached keys are constants, so of the five matrix products of a full backward the cached part needs three. Both kernels
take the log-sum-exp over all keys: each part's weights are then final, and parts add up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirai_kernels.chunk_attention.triton_forward import LOG2_E, RUN_ENDS
from mirai_kernels.chunk_attention.triton_tiles import head_of, load_tile, store_tile


@triton.jit
def _towards_queries(
    grad_q, q, grad_out, normaliser, delta, k, v, start, stop, power,
    TOKEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_q [BLOCK_Q, PADDED], unscaled, with what keys start .. stop add to it."""
    for first in range(start, stop, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        keys = load_tile(k, rows, stop, TOKEN, WIDTH, PADDED, q.dtype)
        values = load_tile(v, rows, stop, TOKEN, WIDTH, PADDED, q.dtype)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * power
        scores = tl.where((rows < stop)[None, :], scores, float("-inf"))
        weights = tl.exp2(scores - normaliser[:, None])
        towards = tl.dot(grad_out, tl.trans(values), input_precision=PRECISION)
        slopes = weights * (towards - delta[:, None])
        grad_q = tl.dot(slopes.to(q.dtype), keys, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit(do_not_specialize=[*RUN_ENDS, "queries", "own"])
def backward_queries(
    q, own_k, own_v, cached_k, cached_v, out, grad_out, lse, delta, grad_q,
    first_0, end_0, first_1, end_1, first_2, end_2, queries, own, q_batch,
    own_batch, cached_batch, scale,
    RUNS: tl.constexpr, OWN: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):
    """grad_q of one tile of queries of one head, and delta, the sum of grad_out x out of each row.

    OWN: own keys too. Without them grad_q already holds their part, and the cached part is added to it.
    """
    TOKEN: tl.constexpr = HEADS * WIDTH
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    at = tl.program_id(1).to(tl.int64) * queries + rows
    flat = queries * TOKEN  # from one sample to the next where tensors are contiguous
    tile = load_tile(head_of(q, q_batch, HEADS, WIDTH), rows, queries, TOKEN, WIDTH, PADDED, COMPUTE)
    grad = load_tile(head_of(grad_out, flat, HEADS, WIDTH), rows, queries, TOKEN, WIDTH, PADDED, COMPUTE)
    attended = load_tile(head_of(out, flat, HEADS, WIDTH), rows, queries, TOKEN, WIDTH, PADDED, tl.float32)
    sums = tl.sum(attended * grad.to(tl.float32), 1)
    tl.store(delta + at, sums, mask=rows < queries)
    normaliser = tl.load(lse + at, mask=rows < queries, other=0.0) * LOG2_E
    power = scale * LOG2_E
    total = tl.zeros([BLOCK_Q, PADDED], tl.float32)
    k, v = head_of(cached_k, cached_batch, HEADS, WIDTH), head_of(cached_v, cached_batch, HEADS, WIDTH)
    runs = (first_0, end_0, first_1, end_1, first_2, end_2)
    for run in tl.static_range(RUNS):
        first, end = runs[2 * run], runs[2 * run + 1]
        total = _towards_queries(
            total, tile, grad, normaliser, sums, k, v, first, end, power, TOKEN, WIDTH, PADDED, BLOCK_K, PRECISION
        )
    into = head_of(grad_q, flat, HEADS, WIDTH)
    if OWN:
        k, v = head_of(own_k, own_batch, HEADS, WIDTH), head_of(own_v, own_batch, HEADS, WIDTH)
        total = _towards_queries(
            total, tile, grad, normaliser, sums, k, v, 0, own, power, TOKEN, WIDTH, PADDED, BLOCK_K, PRECISION
        )
        total = total * scale
    else:
        total = total * scale + load_tile(into, rows, queries, TOKEN, WIDTH, PADDED, tl.float32)
    store_tile(into, total, rows, queries, TOKEN, WIDTH, PADDED)


@triton.jit(do_not_specialize=["queries", "own"])
def backward_own(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, queries, own, q_batch, own_batch, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):
    """grad_k and grad_v of one tile of own keys of one head."""
    TOKEN: tl.constexpr = HEADS * WIDTH
    rows = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    keys = load_tile(head_of(k, own_batch, HEADS, WIDTH), rows, own, TOKEN, WIDTH, PADDED, COMPUTE)
    values = load_tile(head_of(v, own_batch, HEADS, WIDTH), rows, own, TOKEN, WIDTH, PADDED, COMPUTE)
    q, grad_out = head_of(q, q_batch, HEADS, WIDTH), head_of(grad_out, queries * TOKEN, HEADS, WIDTH)
    at = tl.program_id(1).to(tl.int64) * queries
    towards_k = tl.zeros([BLOCK_K, PADDED], tl.float32)
    towards_v = tl.zeros([BLOCK_K, PADDED], tl.float32)
    for first in range(0, queries, BLOCK_Q):
        seen = first + tl.arange(0, BLOCK_Q)
        tile = load_tile(q, seen, queries, TOKEN, WIDTH, PADDED, COMPUTE)
        grad = load_tile(grad_out, seen, queries, TOKEN, WIDTH, PADDED, COMPUTE)
        # Past the last query tile and grad are zero, so whatever weight such a row has, it adds nothing. Past the last
        # key a weight may overflow: it stays in its own row, which is not stored.
        normaliser = tl.load(lse + at + seen, mask=seen < queries, other=0.0) * LOG2_E
        sums = tl.load(delta + at + seen, mask=seen < queries, other=0.0)
        scores = tl.dot(keys, tl.trans(tile), input_precision=PRECISION) * (scale * LOG2_E)
        weights = tl.exp2(scores - normaliser[None, :])
        towards_v = tl.dot(weights.to(COMPUTE), grad, towards_v, input_precision=PRECISION)
        slopes = weights * (tl.dot(values, tl.trans(grad), input_precision=PRECISION) - sums[None, :])
        towards_k = tl.dot(slopes.to(COMPUTE), tile, towards_k, input_precision=PRECISION)
    flat = own * TOKEN
    store_tile(head_of(grad_k, flat, HEADS, WIDTH), towards_k * scale, rows, own, TOKEN, WIDTH, PADDED)
    store_tile(head_of(grad_v, flat, HEADS, WIDTH), towards_v, rows, own, TOKEN, WIDTH, PADDED)
