"""The cache of finished segments: a ring with sinks shows exactly the frames it should, and writes are its owner's."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirai_dist.models.wan import KVCache
from mirai_dist.models.wan.kv_cache import CacheShape, KeysValues
from mirai_kernels.chunk_attention.reference import chunk_attention

BLOCKS, TOKENS, HEADS, WIDTH = 2, 2, 2, 3
CPU = torch.device("cpu")


def cache(frames: int, sink: int = 0, window: int = 0) -> KVCache:
    return KVCache(CacheShape(BLOCKS, 1, frames, TOKENS, HEADS, WIDTH, sink, window), CPU, torch.float64)


def frame(index: int) -> KeysValues:
    """Keys and values of one frame, recognisable by the frame's index."""
    draws = torch.Generator().manual_seed(index)
    size = (2 * BLOCKS, 1, TOKENS, HEADS, WIDTH)
    flat = [index + 0.1 * torch.randn(size[1:], generator=draws, dtype=torch.float64) for _ in range(size[0])]
    return tuple((flat[2 * block], flat[2 * block + 1]) for block in range(BLOCKS))


def joined(frames: list[int]) -> KeysValues:
    parts = [frame(index) for index in frames]
    empty = torch.zeros(1, 0, HEADS, WIDTH, dtype=torch.float64)
    return tuple(
        (torch.cat([empty, *(p[block][0] for p in parts)], 1), torch.cat([empty, *(p[block][1] for p in parts)], 1))
        for block in range(BLOCKS)
    )


def shown(held: KVCache) -> list[int]:
    """Frame indices in the order the cache shows them; every token and block must agree on them."""
    seen = []
    for keys, values in held.view():
        for part in (keys, values):
            indices = part.mean(dim=(0, 2, 3)).round().to(torch.int64).view(-1, TOKENS)
            assert (indices == indices[:, :1]).all()
            seen.append(indices[:, 0].tolist())
    assert all(each == seen[0] for each in seen)
    return seen[0]


@dataclass(frozen=True)
class Plan:
    """A rollout: segments of `length` frames; a window of past frames (0: all), of which the first are sinks."""

    length: int
    segments: int
    window: int
    sink: int
    streaming: bool

    @property
    def frames(self) -> int:
        past = (self.segments - 1) * self.length
        return max(min(self.window, past) if self.window and self.streaming else past, self.length)

    def visible(self, first: int) -> list[int]:
        """What the segment that starts at frame `first` may see: the sinks, and the newest frames of the window."""
        if not self.window:
            return list(range(first))
        oldest = max(self.sink, first - (self.window - self.sink))
        return [*range(min(self.sink, first)), *range(oldest, first)]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    length, segments = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    window = draw(st.integers(0, 4)) * length
    sink = draw(st.integers(0, window // length)) * length
    return Plan(length, segments, window, sink, draw(st.booleans()))


@settings(max_examples=150, deadline=None)
@given(plan=plans())
def test_a_segment_sees_the_frames_of_its_window(plan: Plan) -> None:
    held = cache(plan.frames, plan.sink, plan.window)
    for first in range(0, plan.length * plan.segments, plan.length):
        assert sorted(shown(held)) == plan.visible(first)
        for (keys, values), (all_keys, all_values) in zip(held.view(), joined(plan.visible(first)), strict=True):
            q, own = torch.ones(1, 1, HEADS, WIDTH, dtype=torch.float64), frame(first)[0]
            attended = chunk_attention(q, own, (keys, values))
            expected = chunk_attention(q, own, (all_keys, all_values))
            torch.testing.assert_close(attended, expected, rtol=0, atol=1e-12)
        if first + plan.length < plan.length * plan.segments:
            held.write(joined(list(range(first, first + plan.length))))
            assert held.frames_written == first + plan.length


def test_keys_are_shown_without_a_copy_while_a_ring_fills_and_when_it_is_full() -> None:
    held = cache(4, sink=1, window=4)
    start, size = held._store.data_ptr(), held._store.nbytes
    for index, expected in enumerate([[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5], [0, 4, 5, 6]]):
        held.write(frame(index))
        assert sorted(shown(held)) == expected
        assert all(start <= part.data_ptr() < start + size for pair in held.view() for part in pair)


def test_reset_forgets() -> None:
    held = cache(3)
    held.write(joined([5, 6, 7]))
    held.reset()
    assert held.frames_written == 0 and shown(held) == []
    held.write(frame(1))
    assert shown(held) == [1]


def test_nothing_is_visible_before_the_first_write_although_the_memory_is_raw() -> None:
    held = cache(3)
    held._store.fill_(float("nan"))
    assert all(part.shape == (1, 0, HEADS, WIDTH) for pair in held.view() for part in pair)
    held.write(frame(2))
    assert all(part.isfinite().all() for pair in held.view() for part in pair)


def test_a_segment_longer_than_the_ring_is_refused() -> None:
    held = cache(4, sink=2, window=4)
    held.write(joined([0, 1, 2]))  # two of them are sinks
    assert shown(held) == [0, 1, 2]
    with pytest.raises(ValueError, match="a segment of 3 frames does not fit a cache of 4 frames of which 2 are sinks"):
        held.write(joined([3, 4, 5]))


def test_writes_keep_values_without_their_graph() -> None:
    held = cache(2)
    pairs = tuple((keys.clone().requires_grad_(), values.clone().requires_grad_()) for keys, values in frame(1))
    held.write(pairs)
    assert not any(part.requires_grad for pair in held.view() for part in pair)
    with torch.no_grad():
        for keys, _ in pairs:
            keys.zero_()
    assert shown(held) == [1]  # a copy, not the caller's memory
