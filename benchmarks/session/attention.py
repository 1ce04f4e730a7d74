"""Attention: every backend that serves, forward and backward; and the backward of a chunk, whole against split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.session.measure import NO_CUDA, Case, Desk, Work
from mirai_dist.attention import sdpa
from mirai_dist.attention.patterns import BySegment, Pattern
from mirai_dist.attention.select import DENSE, FLEX, Need, first_that_serves, probe_dense, probe_segments

WIDTH = 128


@dataclass(frozen=True)
class Sizes:
    """chunk: tokens of a segment. segments: of a video. heads: of the two models."""

    chunk: int
    segments: int
    heads: tuple[int, int]

    @property
    def seen(self) -> list[int]:
        """How many segments the first, the middle and the last one see."""
        return sorted({1, (self.segments + 1) // 2, self.segments})


def sizes(desk: Desk) -> Sizes:
    return Sizes(12, 3, (1, 2)) if desk.rehearsal else Sizes(4680, 7, (12, 40))


def backends(desk: Desk) -> None:
    """Whole videos, chunks with a past, and teacher forcing; each backend that serves, the others with the reason."""
    size = sizes(desk)
    whole = size.chunk * size.segments
    need = Need(desk.device.type, desk.dtype, (WIDTH,))
    serving: dict[str, Pattern] = {}
    for candidate in DENSE:
        found = first_that_serves([candidate], need, probe_dense)
        if found.backend is None:
            desk.skip(Case("attention", candidate.name, "any"), dict(found.refused)[candidate.name])
        else:
            serving[candidate.name] = found.backend
    lengths = [(whole, whole, heads) for heads in size.heads]
    lengths += [(size.chunk, size.chunk * seen, size.heads[0]) for seen in size.seen]
    for queries, keys, heads in lengths:
        qkv = [desk.drawn(1, tokens, heads, WIDTH) for tokens in (queries, keys, keys)]
        for name, attend in serving.items():
            _both(desk, name, f"{queries} to {keys}, {heads} heads", 4.0 * queries * keys * heads * WIDTH, attend, qkv)
    _teacher_forcing(desk, size, need, serving)


def _both(desk: Desk, name: str, shape: str, flops: float, attend: Pattern, qkv: list[Tensor]) -> None:
    """Forward, and forward with backward."""
    forward = Work(f"attention {name}", flops)
    backward = Work(f"attention {name} backward", 2.5 * flops)
    with torch.no_grad():
        desk.time(Case("attention forward", name, shape, (forward,)), lambda: attend(*qkv))
    desk.time(Case("attention forward and backward", name, shape, (forward, backward)), differentiated(attend, qkv))


def differentiated(function: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward, and backward by all inputs; the function gives a tensor or several."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    towards: list[Tensor] = []

    def run() -> object:
        found = function(*leaves)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        if not towards:
            towards.extend(map(torch.randn_like, outputs))
        return torch.autograd.grad(outputs, leaves, towards)

    return run


def _teacher_forcing(desk: Desk, size: Sizes, need: Need, serving: dict[str, Pattern]) -> None:
    """The doubled sequence: FlexAttention, dense calls by segment, and our calls joined by log-sum-exp."""
    tokens, heads = size.chunk * size.segments, size.heads[0]
    qkv = [desk.drawn(1, 2 * tokens, heads, WIDTH) for _ in range(3)]
    pairs = size.chunk**2 * size.segments * (size.segments + 1)
    shape, flops = f"2 x {tokens} by {size.chunk}, {heads} heads", 4.0 * pairs * heads * WIDTH
    flex = first_that_serves([FLEX], need, probe_segments)
    if flex.backend is None:
        desk.skip(Case("teacher forcing", FLEX.name, shape), dict(flex.refused)[FLEX.name])
    else:
        _both(desk, FLEX.name, f"teacher forcing, {shape}", flops, flex.backend.teacher_forced(size.chunk), qkv)
    best = "cudnn" if "cudnn" in serving else "sdpa"
    by_segment = BySegment(serving[best]).teacher_forced(size.chunk)
    _both(desk, best, f"teacher forcing by segment, {shape}", flops, by_segment, qkv)
    if not desk.cuda:
        desk.skip(Case("teacher forcing", "segment prefix attention", shape), NO_CUDA)
        return
    from mirai_kernels.segment_prefix_attention.op import segment_prefix_attention

    for by in ("cudnn", "triton"):
        joined = lambda q, k, v, by=by: segment_prefix_attention(q, k, v, size.chunk, True, by)
        _both(desk, by, f"teacher forcing by prefix, {shape}", flops, joined, qkv)


# --- backward of a chunk -----------------------------------------------------------------------------------------


def chunk_backward(desk: Desk) -> None:
    """Backward alone: over all keys as a library does it, and for the chunk's own keys and values alone (split)."""
    size = sizes(desk)
    heads = size.heads[0]
    for segments in size.seen:
        past = size.chunk * (segments - 1)
        own = [desk.drawn(1, size.chunk, heads, WIDTH) for _ in range(3)]
        held = [desk.drawn(1, past + size.chunk, heads, WIDTH) for _ in range(2)]
        shape = f"{size.chunk} to {size.chunk * segments}, {heads} heads"
        pairs = 2.0 * size.chunk * heads * WIDTH  # one product with one key
        for name, attend in _whole(desk):
            work = (Work(f"attention {name} backward", 5 * pairs * (past + size.chunk)),)
            inputs = [own[0], *(torch.cat((each[:, :past], mine), 1) for each, mine in zip(held, own[1:], strict=True))]
            desk.time(Case("chunk backward", f"{name}, all keys", shape, work), _backward(attend, inputs))
        for by, attend in _split(desk, held, past, shape):
            cached = (Work("attention triton backward", 3 * pairs * past),) if past else ()
            work = (Work(f"attention {by} backward", (7 if by == "triton" else 5) * pairs * size.chunk), *cached)
            desk.time(Case("chunk backward", f"{by}, own keys", shape, work), _backward(attend, own))


def _whole(desk: Desk) -> Iterator[tuple[str, Pattern]]:
    yield from (("cudnn", sdpa.CUDNN), ("sdpa-flash", sdpa.FLASH)) if desk.cuda else (("sdpa", sdpa.dense),)


def _split(desk: Desk, held: list[Tensor], past: int, shape: str) -> Iterator[tuple[str, Pattern]]:
    if not desk.cuda:
        desk.skip(Case("chunk backward", "own keys", shape), NO_CUDA)
        return
    from mirai_kernels.chunk_attention.launch import Cached
    from mirai_kernels.chunk_attention.op import chunk_attention

    cached = Cached(held[0], held[1], (0, past)) if past else None
    for by in ("cudnn", "flash", "triton"):
        yield by, lambda q, k, v, by=by: chunk_attention(q, (k, v), cached, by)[0]


def _backward(attend: Pattern, inputs: list[Tensor]) -> Callable[[], object]:
    """Backward of one forward, again and again. What fails in the forward fails when it is timed."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    kept: list[Tensor] = []

    def function() -> object:
        if not kept:
            kept.append(attend(*leaves))
        return torch.autograd.grad(kept[0], leaves, leaves[0].detach(), retain_graph=True)

    return function
