"""Chunk attention as an operator of torch: queries of one segment to [cached runs | own] keys and values.

Selective recomputation and torch.compile see one operator, `torch.ops.mirai.chunk_attention`. Runs of a cache are
pairs of Python ints, so nothing waits for the device, and our kernels read them where they lie; a library's forward
gets one copy of them with the own keys, which nothing keeps. The cache is a constant: there is no gradient of it, and
none is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirai_kernels.chunk_attention import launch
from mirai_kernels.chunk_attention.launch import TRITON, Cached, Segment, check_tensors
from mirai_kernels.chunk_attention.triton_forward import RUN_ENDS
from mirai_kernels.dense_attention.library import LIBRARIES, Attended


def chunk_attention(
    q: Tensor, own: tuple[Tensor, Tensor], cached: Cached | None = None, by: str = TRITON
) -> tuple[Tensor, Tensor]:
    """(attended [B, Q, H, D], log-sum-exp [B, H, Q] of the scaled scores in float32), as `reference.chunk_attention`.

    q [B, Q, H, D] and own (keys, values) [B, K, H, D] carry gradient, K >= 1; the log-sum-exp does not.
    by: "triton", or the library of `LIBRARIES` that computes everything but the queries' gradient towards the cache.
    Until backward the cached runs must hold what they held; other tokens of the cache may be written.
    ValueError for what the kernels do not do.
    """
    k, v = (each.contiguous() for each in own)
    if k.shape != v.shape or not k.shape[1]:
        raise ValueError(f"own keys {tuple(k.shape)} and values {tuple(v.shape)}; they are as many, and not none")
    check_tensors((q, k, v, *(cached[:2] if cached else ())), by)
    if cached:
        _check_cached(cached)
    keys, values, runs = cached or (None, None, ())
    return _forward(q.contiguous(), k, v, keys, values, runs, by)


def _check_cached(cached: Cached) -> None:
    keys, values, runs = cached
    dense = (keys.shape[2] * keys.shape[3], keys.shape[3], 1)
    if keys.shape != values.shape or keys.stride() != values.stride() or keys.stride()[1:] != dense:
        raise ValueError("cached keys and values lie alike, and tokens of a sample one after another; no copy is made")
    if len(runs) > len(RUN_ENDS):
        raise ValueError(f"runs {runs}: at most {len(RUN_ENDS) // 2}")
    inside = all(0 <= first < end <= keys.shape[1] for first, end in zip(runs[::2], runs[1::2], strict=True))
    if not inside:
        raise ValueError(f"runs {runs} are no pairs (first, end) of the {keys.shape[1]} tokens cached")
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        raise ValueError("cached keys carry gradient, which this operator does not compute; detach them")


@torch.library.custom_op("mirai::chunk_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, runs: Sequence[int], by: str
) -> tuple[Tensor, Tensor]:
    cached = _cached(keys, values, runs)
    if by == TRITON:
        return tuple(launch.attend(Segment(q, k, v), cached))  # type: ignore[return-value]
    parts = [*_parts(cached), (k, v)]
    # One call, for which keys are copied together: of parts by themselves the outputs would come rounded, each.
    k, v = parts[0] if len(parts) == 1 else (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return tuple(LIBRARIES[by].forward(q, k, v))  # type: ignore[return-value]


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, runs: Sequence[int], by: str
) -> tuple[Tensor, Tensor]:
    samples, queries, heads, _ = q.shape
    return torch.empty_like(q), q.new_empty((samples, heads, queries), dtype=torch.float32)


@torch.library.custom_op("mirai::chunk_attention_backward", mutates_args=())
def _backward(grad_out: Tensor, tensors: Sequence[Tensor], runs: Sequence[int], by: str) -> list[Tensor]:
    """Gradients of q, k, v; tensors: q, k, v, out, lse, and cached keys and values where there are any."""
    q, k, v, out, lse, *cache = tensors
    cached = _cached(*cache, runs=runs) if cache else None
    segment, attended = Segment(q, k, v), Attended(out, lse)
    if by == TRITON:
        return list(launch.gradients(segment, cached, attended, grad_out))
    grad_q, grad_k, grad_v = LIBRARIES[by].backward(grad_out, q, k, v, attended)
    if cached:
        launch.add_query_gradient(grad_q, segment, cached, attended, grad_out)
    return [grad_q, grad_k, grad_v]


@_backward.register_fake
def _(grad_out: Tensor, tensors: Sequence[Tensor], runs: Sequence[int], by: str) -> list[Tensor]:
    return [torch.empty_like(each) for each in tensors[:3]]


def _cached(keys: Tensor | None, values: Tensor | None, runs: Sequence[int]) -> Cached | None:
    return Cached(keys, values, tuple(runs)) if keys is not None and values is not None and runs else None


def _parts(cached: Cached | None) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each run, as views."""
    if cached is None:
        return []
    runs = zip(cached.runs[::2], cached.runs[1::2], strict=True)
    return [(cached.keys[:, first:end], cached.values[:, first:end]) for first, end in runs]


def _setup(ctx, inputs, output) -> None:
    q, k, v, keys, values, ctx.runs, ctx.by = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    # `data` is the same memory without the count of writes: the cache is written elsewhere before backward comes.
    cache = () if keys is None else (keys.data, values.data)
    ctx.save_for_backward(q, k, v, out, lse, *cache)


def _gradients(ctx, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_q, grad_k, grad_v = _backward(grad_out.contiguous(), ctx.saved_tensors, ctx.runs, ctx.by)
    return grad_q, grad_k, grad_v, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
