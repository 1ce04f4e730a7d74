"""Which tokens see which: dense attention, two rules over segments, and one segment behind what a cache holds, by
whatever backend the run has chosen.

A rule over segments is a union of (queries of one segment) x (runs of keys), so it is exact as dense calls over
segments with any backend of dense attention, and differentiable wherever that backend is: no mask is ever built.
A backend that computes a whole rule in one call stands in the same place (`Segments`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mirai_dist.attention import sdpa


class Pattern(Protocol):
    """Attention of queries, keys and values [B, tokens, heads, head_dim] under one visibility rule.

    Under the rule of dense attention every query sees every key, and keys may outnumber queries.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Segments(Protocol):
    """Attention over tokens that stand segment after segment, whole segments of `segment_tokens` tokens."""

    def causal(self, segment_tokens: int) -> Pattern:
        """A token sees its own segment and all earlier ones (diffusion forcing)."""
        ...

    def teacher_forced(self, segment_tokens: int) -> Pattern:
        """Doubled sequence [clean | noisy]: a noisy segment sees the clean segments before it and itself.

        Clean segments see clean segments up to their own and never anything noisy (spec 1.9, teacher forcing).
        """
        ...


class Seen(Protocol):
    """Keys and values of earlier segments where they lie (mirai_dist.models.wan.kv_cache.Held).

    keys, values: [B, capacity, heads, head_dim]. past: runs of tokens that are seen, first, end, a pair a run.
    together: all that is seen, the segment's own among it where that lies there too, else `own` behind it.
    """

    @property
    def keys(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...
    @property
    def past(self) -> tuple[int, ...]: ...
    def together(self, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]: ...


class Behind(Protocol):
    """Attention of a segment's queries to what is seen of earlier ones and to its own keys and values, which lie beside
    it, or (own None) there too."""

    def __call__(self, q: Tensor, own: tuple[Tensor, Tensor] | None, seen: Seen) -> Tensor: ...


@dataclass(frozen=True)
class Together:
    """One dense call: on a view where all keys lie in one piece, else on a copy. Gradient reaches whatever has one."""

    dense: Pattern = sdpa.dense

    def __call__(self, q: Tensor, own: tuple[Tensor, Tensor] | None, seen: Seen) -> Tensor:
        return self.dense(q, *seen.together(own))


@dataclass(frozen=True)
class SegmentCausal:
    """A token sees its own segment and all earlier ones: a dense call a segment."""

    segment_tokens: int
    dense: Pattern = sdpa.dense

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends = range(self.segment_tokens, q.shape[1] + 1, self.segment_tokens)
        parts = [self.dense(q[:, end - self.segment_tokens : end], k[:, :end], v[:, :end]) for end in ends]
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class TeacherForced:
    """Doubled sequence [clean | noisy]: a dense call a segment; a noisy one copies the keys before it."""

    segment_tokens: int
    dense: Pattern = sdpa.dense

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = q.shape[1] // 2
        clean = SegmentCausal(self.segment_tokens, self.dense)(q[:, :half], k[:, :half], v[:, :half])
        noisy = []
        for start in range(0, half, self.segment_tokens):
            own = slice(half + start, half + start + self.segment_tokens)
            keys = torch.cat((k[:, :start], k[:, own]), dim=1)
            values = torch.cat((v[:, :start], v[:, own]), dim=1)
            noisy.append(self.dense(q[:, own], keys, values))
        return torch.cat((clean, *noisy), dim=1)


@dataclass(frozen=True)
class BySegment:
    """The rules over segments as dense calls: complete with any backend of those."""

    dense: Pattern = sdpa.dense

    def causal(self, segment_tokens: int) -> Pattern:
        return SegmentCausal(segment_tokens, self.dense)

    def teacher_forced(self, segment_tokens: int) -> Pattern:
        return TeacherForced(segment_tokens, self.dense)


@dataclass(frozen=True)
class Backends:
    """What a network attends with: dense calls, rules over segments, and a segment behind others in a cache."""

    dense: Pattern
    segments: Segments
    behind: Behind


def by_dense(dense: Pattern) -> Backends:
    """Everything by calls of one backend of dense attention."""
    return Backends(dense, BySegment(dense), Together(dense))


TORCH = by_dense(sdpa.dense)  # works everywhere
