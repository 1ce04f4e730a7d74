"""Attention in float64 with its gradients, a head and a block of queries at a time: lengths of a video fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SCORES = 1 << 27  # held at a time: 1 GB


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v of float64 [B, tokens, heads, head_dim]; differentiable."""
    return _Exact.apply(q, k, v)  # type: ignore[no-any-return]


class _Exact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        out = torch.empty_like(q)
        for rows, head in _blocks(q, k):
            out[rows] = _weights(q[rows], k[head]) @ v[head]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        by_q, by_k, by_v = (torch.zeros_like(each) for each in (q, k, v))
        for rows, head in _blocks(q, k):
            weights = _weights(q[rows], k[head])
            by_v[head] += weights.T @ grad[rows]
            by_weights = grad[rows] @ v[head].T
            by_scores = weights * (by_weights - (weights * by_weights).sum(1, keepdim=True)) * q.shape[-1] ** -0.5
            by_q[rows] = by_scores @ k[head]
            by_k[head] += by_scores.T @ q[rows]
        return by_q, by_k, by_v


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.T * q.shape[-1] ** -0.5).softmax(dim=1)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[tuple[int, slice, int], tuple[int, slice, int]]]:
    """(sample, block of queries, head) and (sample, all keys, head)."""
    size = max(1, SCORES // k.shape[1])
    for sample in range(q.shape[0]):
        for head in range(q.shape[2]):
            for first in range(0, q.shape[1], size):
                yield (sample, slice(first, first + size), head), (sample, slice(None), head)
