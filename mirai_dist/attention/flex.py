"""Rules over segments in one call, by torch's FlexAttention.

A rule is stated once, as arithmetic on segment numbers. FlexAttention applies it to single tokens at the edges of
segments; which 128 x 128 blocks it must look at is counted here from the same arithmetic, exactly, on tensors of
blocks and segments: torch's own create_block_mask would lay out tokens x tokens first, 4.3 GB at the 65,520 tokens
of teacher forcing at 480p.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mirai_dist.attention.patterns import Pattern

BLOCK = 128  # tokens; FlexAttention's own default

Rule = Callable[[Tensor, Tensor, int], Tensor]
"""(segment of the query, segment of the key, segments in all) -> whether the query sees the key; broadcasts."""


def causal(query: Tensor, key: Tensor, segments: int) -> Tensor:
    """Its own segment and all earlier ones."""
    return key <= query


def teacher_forced(query: Tensor, key: Tensor, segments: int) -> Tensor:
    """[clean | noisy], half of the segments each: clean is causal, noisy sees clean before it, and itself."""
    clean = segments // 2
    return torch.where(query < clean, key <= query, (key < query - clean) | (key == query))


def block_mask(rule: Rule, segment_tokens: int, tokens: int, device: torch.device) -> BlockMask:
    """Which blocks of `tokens` queries x `tokens` keys a rule touches, wholly or in part.

    Visible pairs in a block are (queries of the block in each segment) x rule x (keys of the block in each segment):
    a product of [blocks, segments] matrices, in float64 and so exact. The last block counts as cut when tokens end
    inside it, as create_block_mask does. ValueError if the tokens are not whole segments.
    """
    if tokens % segment_tokens:
        raise ValueError(f"{tokens} tokens are not whole segments of {segment_tokens}")
    segments = tokens // segment_tokens
    numbers = torch.arange(segments, device="cpu")
    starts = torch.arange(0, tokens, BLOCK, device="cpu")[:, None]
    first, last = numbers * segment_tokens, (numbers + 1) * segment_tokens
    held = (torch.minimum(starts + BLOCK, last) - torch.maximum(starts, first)).clamp(min=0).double()
    pairs = held @ rule(numbers[:, None], numbers[None, :], segments).double() @ held.T
    whole = pairs == BLOCK**2

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule(query // segment_tokens, key // segment_tokens, segments)

    return BlockMask.from_kv_blocks(
        *_listed((pairs > 0) & ~whole, device),
        *_listed(whole, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(tokens, tokens),
    )


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """[rows, columns] of bools as the counts [1, 1, rows] and, first in each row, the columns that are true."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    found = blocks.sum(dim=-1), order
    return tuple(each.to(device, torch.int32)[None, None] for each in found)  # type: ignore[return-value]


class FlexSegments:
    """Rules over segments by FlexAttention. `attend` is torch's flex_attention, as it is or compiled.

    Uncompiled it makes a tensor of all scores. Block masks are made once for each length.
    """

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        self._attend = attend
        self._masks: dict[tuple[Rule, int, int, torch.device], BlockMask] = {}

    def causal(self, segment_tokens: int) -> Pattern:
        return partial(self._call, causal, segment_tokens)

    def teacher_forced(self, segment_tokens: int) -> Pattern:
        return partial(self._call, teacher_forced, segment_tokens)

    def _call(self, rule: Rule, segment_tokens: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = rule, segment_tokens, q.shape[1], q.device
        if key not in self._masks:
            self._masks[key] = block_mask(*key)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return self._attend(q, k, v, block_mask=self._masks[key]).transpose(1, 2)


def load() -> FlexSegments:
    """FlexAttention, compiled at its first call. fullgraph: more shapes than torch will compile are an error, where
    it would otherwise go on uncompiled, with all scores in memory."""
    return FlexSegments(torch.compile(flex_attention, fullgraph=True))
