"""Attention of which a library computes parts, and our kernels what no library does (mirai_kernels).

`Behind`: a segment's queries to runs of a cache and to its own keys. Backward reads the cache where it lies, and
computes no gradient towards it: it is a constant. `Prefix`: rules over segments as dense calls over prefixes, joined by
log-sum-exp, where segment by segment each noisy one would copy the keys before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from mirai_dist.attention.patterns import Pattern, Seen

# Who computes the parts, by device and by the name of the backend for dense attention: the same kernels of torch,
# called so that they give their log-sum-exp.
LIBRARIES = {
    ("cuda", "cudnn"): "cudnn",
    ("cuda", "sdpa-flash"): "flash",
    ("cpu", "sdpa"): "cpu",
    ("cpu", "sdpa-flash"): "cpu",
}


@dataclass(frozen=True)
class Behind:
    """attend, cached: `chunk_attention` and its `Cached`. by: the library's name there; dense: the same library, which
    is all that a pass without gradient needs."""

    dense: Pattern
    by: str
    attend: Callable[..., tuple[Tensor, Tensor]]
    cached: Callable[..., Any]

    def __call__(self, q: Tensor, own: tuple[Tensor, Tensor] | None, seen: Seen) -> Tensor:
        if own is None:
            return self.dense(q, *seen.together(None))
        cached = self.cached(seen.keys, seen.values, seen.past) if seen.past else None
        return self.attend(q, own, cached, self.by)[0]


@dataclass(frozen=True)
class Prefix:
    """attend: `segment_prefix_attention`. by: the library's name there."""

    by: str
    attend: Callable[..., Tensor]

    def causal(self, segment_tokens: int) -> Pattern:
        return partial(self.attend, segment_tokens=segment_tokens, doubled=False, by=self.by)

    def teacher_forced(self, segment_tokens: int) -> Pattern:
        return partial(self.attend, segment_tokens=segment_tokens, doubled=True, by=self.by)


def load_behind(dense: Pattern, by: str) -> Behind:
    """Raises ImportError without triton."""
    from mirai_kernels.chunk_attention.launch import Cached
    from mirai_kernels.chunk_attention.op import chunk_attention

    return Behind(dense, by, chunk_attention, Cached)


def load_prefix(by: str) -> Prefix:
    """Raises ImportError without triton."""
    from mirai_kernels.segment_prefix_attention.op import segment_prefix_attention

    return Prefix(by, segment_prefix_attention)
