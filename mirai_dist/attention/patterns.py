"""Which tokens see which, as dense calls over segments: no mask is ever built.

Every pattern here is a union of (queries of one segment) x (a prefix of keys), so each is exact with any
backend that computes dense attention, and each is differentiable wherever that backend is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mirai_dist.attention.sdpa import dense


class Pattern(Protocol):
    """Attention of queries, keys and values [B, tokens, heads, head_dim] under one visibility rule."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Full:
    """Every query sees every key: bidirectional networks, and a segment with its past."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(q, k, v)


@dataclass(frozen=True)
class SegmentCausal:
    """A token sees its own segment and all earlier ones (diffusion forcing)."""

    segment_tokens: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends = range(self.segment_tokens, q.shape[1] + 1, self.segment_tokens)
        parts = [dense(q[:, end - self.segment_tokens : end], k[:, :end], v[:, :end]) for end in ends]
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class TeacherForced:
    """Doubled sequence [clean | noisy]: a noisy segment sees the clean segments before it and itself.

    Clean segments see clean segments up to their own and never anything noisy (spec 1.9, teacher forcing).
    """

    segment_tokens: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = q.shape[1] // 2
        clean = SegmentCausal(self.segment_tokens)(q[:, :half], k[:, :half], v[:, :half])
        noisy = []
        for start in range(0, half, self.segment_tokens):
            own = slice(half + start, half + start + self.segment_tokens)
            keys = torch.cat((k[:, :start], k[:, own]), dim=1)
            values = torch.cat((v[:, :start], v[:, own]), dim=1)
            noisy.append(dense(q[:, own], keys, values))
        return torch.cat((clean, *noisy), dim=1)
