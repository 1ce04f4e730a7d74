"""What a certificate compares: attention by every backend, and every operator of the kernels, at given shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity

from mirai_dist.attention import sdpa
from mirai_dist.attention.patterns import BySegment as DenseCalls
from mirai_dist.attention.patterns import Pattern, Segments
from mirai_dist.attention.select import DENSE, FLEX, Candidate, Need
from mirai_dist.certify import exact
from mirai_dist.certify.compare import Function, Subject, drawn
from mirai_dist.certify.shapes import BySegment, Dense, Fusion, Head, Shapes, Tokens
from mirai_dist.models.wan.model import RmsNorm
from mirai_dist.models.wan.token_ops import EPS, PLAIN, Placement, TokenOps, load
from mirai_kernels.cosine_head import reference as cosine_reference

ATTENTION, SEGMENTS, TOKENS = "attention", "attention over segments", "token operator"  # what a run chooses by
COSINE, FUSION = "cosine head", "target fusion"  # and these
CHUNK, PREFIX, CACHE = "chunk attention", "segment prefix attention", "cache write"
NO_CUDA = "needs a CUDA device"
LIBRARIES = ("triton", "cudnn", "flash")  # by which our attention operators compute the parts that libraries can


def subjects(shapes: Shapes, device: torch.device) -> Iterator[Subject]:
    """All of them, one after the other: each holds its tensors only while it is judged.

    In the order in which a run misses them: fused kernels that have no certificate are not taken, attention is, with a
    warning. It also takes longest in float64, whole videos most of all, which come last.
    """
    widths = tuple(sorted({each.head_dim for each in shapes.dense}))
    need = Need(device.type, getattr(torch, shapes.dtype), widths)
    kernels = _Kernels(_unloaded(device), need.dtype)
    yield from (kernels.cache_write(tokens) for tokens in shapes.tokens if tokens.copies == 1)
    for tokens in shapes.tokens:
        yield from _over_tokens(tokens, device)
    yield from (_cosine_head(head, need.dtype, _unloaded(device)) for head in shapes.heads)
    yield from (_target_fusion(fusion, _unloaded(device)) for fusion in shapes.fusions)
    yield from (kernels.chunk_attention(call) for call in shapes.dense if call.past)
    yield from (kernels.prefix_attention(whole) for whole in shapes.segments)
    for call in shapes.dense:
        yield _dense(call, need)
    for whole in shapes.segments:
        yield from _segments(whole, need)


# --- attention ---------------------------------------------------------------------------------------------------


def poisoned(x: Tensor, unused: int) -> Tensor:
    """x [B, tokens, ...] in front of so many tokens that are NaN, as an unused part of a cache may be."""
    store = x.new_full((x.shape[0], x.shape[1] + unused, *x.shape[2:]), float("nan"))
    store[:, : x.shape[1]] = x
    return store


def _in_runs(x: Tensor, parts: tuple[int, ...], unused: int) -> Tensor:
    """x [B, tokens, ...] in parts of so many tokens, each `poisoned`."""
    return torch.cat([poisoned(each, unused) for each in x.split(parts, dim=1)], dim=1)


def _ends(parts: tuple[int, ...], unused: int) -> tuple[int, ...]:
    """First and end of the tokens of each part in `_in_runs`."""
    firsts = [sum(parts[:index]) + index * unused for index in range(len(parts))]
    return tuple(end for first, part in zip(firsts, parts, strict=True) for end in (first, first + part))


def _inputs(batch: int, tokens: tuple[int, ...], heads: int, head_dim: int) -> Callable[[torch.device], list[Tensor]]:
    return lambda device: [drawn(device, seed, batch, count, heads, head_dim) for seed, count in enumerate(tokens)]


def _dense(call: Dense, need: Need) -> Subject:
    """Every backend. Keys of which some are cached lie in a longer tensor, whose rest is NaN."""

    def by(attend: Pattern) -> Function:
        if not call.past:
            return lambda q, k, v: [attend(q, k, v)]
        return lambda q, *kv: [attend(q, *(poisoned(each, call.queries)[:, : call.keys] for each in kv))]

    variants = {each.name: _variant(each, need, by) for each in DENSE}
    inputs = _inputs(call.batch, (call.queries, call.keys, call.keys), call.heads, call.head_dim)
    work = 2.0 * call.batch * call.queries * call.keys * call.heads * call.head_dim
    exactly = lambda *qkv: [exact.attention(*qkv)]
    return Subject(ATTENTION, str(call), inputs, exactly, by(sdpa.dense), variants, work=work)


def _variant(candidate: Candidate, need: Need, by: Callable[[Any], Function]) -> Function | str:
    """What a backend computes with, or why it cannot here."""
    unfit = candidate.unfit(need)
    if unfit:
        return unfit
    try:
        return by(candidate.load())
    except ImportError as error:
        return f"cannot be loaded: {error}"


def _rule(whole: BySegment, segments: Segments) -> Pattern:
    return segments.teacher_forced(whole.segment) if whole.doubled else segments.causal(whole.segment)


def _segments(whole: BySegment, need: Need) -> Iterator[Subject]:
    """FlexAttention; dense calls by segment are among the dense ones."""

    def by(segments: Segments) -> Function:
        rule = _rule(whole, segments)
        return lambda q, k, v: [rule(q, k, v)]

    yield replace(_over_segments(whole), op=SEGMENTS, variants={FLEX.name: _variant(FLEX, need, by)})


def _over_segments(whole: BySegment) -> Subject:
    count = whole.tokens * (1 + whole.doubled)
    exactly, plainly = (_rule(whole, DenseCalls(each)) for each in (exact.attention, sdpa.dense))
    return Subject(
        PREFIX,
        str(whole),
        _inputs(whole.batch, (count,) * 3, whole.heads, whole.head_dim),
        lambda *qkv: [exactly(*qkv)],
        lambda *qkv: [plainly(*qkv)],
        {},
        work=2.0 * whole.batch * count * whole.tokens * whole.heads * whole.head_dim,
    )


# --- between attention and products ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Norm:
    """A norm whose weights are given, so that they have gradients here."""

    kind: Callable[[int], nn.Module]
    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        weights = {name: each for name, each in (("weight", self.weight), ("bias", self.bias)) if each is not None}
        with torch.device("meta"):
            module = self.kind(x.shape[-1])
        return functional_call(module, weights, (x,))


@dataclass(frozen=True)
class _Layer:
    """An attention layer without its products."""

    heads: int
    norm_q: _Norm
    norm_k: _Norm
    q = k = v = staticmethod(lambda x: x)


Made = Callable[[TokenOps], Function]


def token_operators(shape: Tokens) -> dict[str, tuple[str, Made]]:
    """Name -> (inputs, function). Inputs: x tokens, v a vector a frame, w one weight a channel."""
    place = Placement(shape.grid, shape.first_frame, shape.copies)

    def placed(ops: TokenOps) -> Function:
        def function(x: Tensor, of_q: Tensor, of_k: Tensor) -> list[Tensor]:
            layer = _Layer(shape.heads, _Norm(RmsNorm, of_q), _Norm(RmsNorm, of_k))
            return list(ops.placed(layer, x, ops.place(place, shape.dim // shape.heads, x))[:2])  # type: ignore[arg-type]

        return function

    def queries(ops: TokenOps) -> Function:
        layer = lambda weight: _Layer(shape.heads, _Norm(RmsNorm, weight), _Norm(RmsNorm, weight))
        return lambda x, weight: [ops.queries(layer(weight), x)]  # type: ignore[arg-type]

    def normed(ops: TokenOps) -> Function:
        norm = lambda weight, bias: _Norm(partial(nn.LayerNorm, eps=EPS), weight, bias)
        return lambda x, y, gate, weight, bias: ops.added_normed(x, y, gate, norm(weight, bias))  # type: ignore[arg-type]

    return {
        "placed": ("xww", placed),
        "queries": ("xw", queries),
        "added and normed": ("xxvww", normed),
        "added and modulated": ("xxvv", lambda ops: ops.added_modulated),
        "gated and modulated": ("xxvvv", lambda ops: ops.added_modulated),
        "modulated": ("xvv", lambda ops: lambda *inputs: [ops.modulated(*inputs)]),
        "added": ("xxv", lambda ops: lambda *inputs: [ops.added(*inputs)]),
    }


def _over_tokens(shape: Tokens, device: torch.device) -> Iterator[Subject]:
    missing = _unloaded(device)
    for name, (kinds, made) in token_operators(shape).items():
        variants: Mapping[str, Function | str] = {"fused": missing or made(load())}
        plain = made(PLAIN)
        yield Subject(f"{TOKENS}: {name}", str(shape), partial(token_inputs, shape, kinds), plain, plain, variants)


def token_inputs(shape: Tokens, kinds: str, device: torch.device) -> list[Tensor]:
    rows = {"x": shape.count, "v": shape.vectors}
    sizes = {kind: (shape.batch, count, shape.dim) for kind, count in rows.items()} | {"w": (shape.dim,)}
    return [drawn(device, seed, *sizes[kind]) + (kind == "w") for seed, kind in enumerate(kinds)]


def _unloaded(device: torch.device) -> str:
    """Why the kernels cannot be had here; empty: they can."""
    if device.type != "cuda":
        return NO_CUDA
    try:
        load()
    except ModuleNotFoundError as error:
        return f"package {error.name} is not installed"
    return ""


# --- the foresight head ------------------------------------------------------------------------------------------


def _cosine_head(head: Head, dtype: torch.dtype, missing: str) -> Subject:
    """The target is a constant. missing: why the kernels cannot be had here."""
    target = lambda x: drawn(x.device, 9, head.tokens, head.target_dim).to(dtype).to(x)

    def exactly(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        return [cosine_reference.cosine_head(hidden, weight, target(hidden))]

    def plain(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        return [cosine_similarity((hidden @ weight.T).float(), target(hidden).float(), dim=-1).mean()]

    def fused(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        from mirai_kernels.cosine_head.op import cosine_head

        return [cosine_head(hidden, weight, target(hidden))]

    sizes = (head.tokens, head.dim), (head.target_dim, head.dim)
    inputs = lambda device: [drawn(device, seed, *size) for seed, size in enumerate(sizes)]
    work = float(head.tokens * head.dim * head.target_dim)
    return Subject(COSINE, str(head), inputs, exactly, plain, {"fused": missing or fused}, work=work)


def _target_fusion(fusion: Fusion, missing: str) -> Subject:
    """The reference rounds once, where it stores: so do the kernels."""

    def plain(features: Tensor) -> list[Tensor]:
        return [cosine_reference.fuse_targets(features, fusion.segments, fusion.offsets)]

    def fused(features: Tensor) -> list[Tensor]:
        from mirai_kernels.cosine_head.op import fuse_targets

        return [fuse_targets(features, fusion.segments, fusion.offsets)]

    size = fusion.batch, fusion.segments * fusion.segment_tokens, fusion.dim
    inputs = lambda device: [drawn(device, 0, *size)]
    return Subject(FUSION, str(fusion), inputs, plain, plain, {"fused": missing or fused}, gradient=False)


# --- what joins attention's parts and writes a cache -------------------------------------------------------------


@dataclass(frozen=True)
class _Kernels:
    """missing: why they cannot be had here. dtype: what constants are rounded to."""

    missing: str
    dtype: torch.dtype

    def _by(self, made: Callable[[str], Function], names: tuple[str, ...] = ()) -> dict[str, Function | str]:
        return {name: self.missing or made(name) for name in names or LIBRARIES}

    def chunk_attention(self, call: Dense) -> Subject:
        """Cached keys are constants, in runs of a cache that is NaN after each: of the sink, then of the ring."""
        own = call.keys - call.past
        size = call.batch, call.past, call.heads, call.head_dim
        parts = (call.sink, call.past - call.sink) if call.sink else (call.past,)

        def cached(x: Tensor) -> list[Tensor]:
            return [drawn(x.device, seed, *size).to(self.dtype).to(x) for seed in (7, 8)]

        def joined(attend: Pattern) -> Function:
            return lambda q, k, v: [
                attend(q, *(torch.cat((past, each), 1) for past, each in zip(cached(q), (k, v), strict=True)))
            ]

        def made(by: str) -> Function:
            from mirai_kernels.chunk_attention.launch import Cached
            from mirai_kernels.chunk_attention.op import chunk_attention

            def function(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
                keys, values = (_in_runs(each, parts, own) for each in cached(q))
                return [chunk_attention(q, (k, v), Cached(keys, values, _ends(parts, own)), by)[0]]

            return function

        inputs = _inputs(call.batch, (call.queries, own, own), call.heads, call.head_dim)
        work = 2.0 * call.batch * call.queries * call.keys * call.heads * call.head_dim
        exactly, plainly = joined(exact.attention), joined(sdpa.dense)
        return Subject(CHUNK, str(call), inputs, exactly, plainly, self._by(made), work=work)

    def prefix_attention(self, whole: BySegment) -> Subject:
        def made(by: str) -> Function:
            from mirai_kernels.segment_prefix_attention.op import segment_prefix_attention

            return lambda q, k, v: [segment_prefix_attention(q, k, v, whole.segment, whole.doubled, by)]

        return replace(_over_segments(whole), variants=self._by(made))

    def cache_write(self, shape: Tokens) -> Subject:
        """Queries, key slot, value slot, and whether the cache around the slots is as it was: NaN."""
        place = Placement(shape.grid, shape.first_frame)

        def plain(q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor) -> list[Tensor]:
            places = PLAIN.place(place, shape.dim // shape.heads, q)
            pair = [
                PLAIN.placed(_Layer(shape.heads, _Norm(RmsNorm, w), _Norm(RmsNorm, w)), x, places)[0]  # type: ignore[arg-type]
                for x, w in ((q, of_q), (k, of_k))
            ]
            return [*pair, v.unflatten(-1, (shape.heads, -1)), torch.ones((), device=q.device)]

        def made(by: str) -> Function:
            return partial(_written, shape)

        inputs = partial(token_inputs, shape, "xxxww")
        return Subject(CACHE, str(shape), inputs, plain, plain, self._by(made, ("triton",)), gradient=False)


def _written(shape: Tokens, q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor) -> list[Tensor]:
    """The cache-writing operator, on slots in the middle of caches that are NaN."""
    from mirai_kernels.qk_norm_rope_cache.op import qk_norm_rope_cache
    from mirai_kernels.qk_norm_rope_cache.reference import Placement as KernelPlacement

    rows = shape.grid[1] * shape.grid[2]
    heads = (shape.heads, shape.dim // shape.heads)
    caches = [q.new_full((shape.batch, shape.count + 2 * rows, *heads), float("nan")) for _ in range(2)]
    keys, values = (cache[:, rows:-rows] for cache in caches)
    queries = qk_norm_rope_cache(
        (q, k, v), (of_q, of_k), (keys, values), KernelPlacement(shape.grid, shape.first_frame)
    )
    around = [part for cache in caches for part in (cache[:, :rows], cache[:, -rows:])]
    untouched = torch.stack([part.isnan().all() for part in around]).all()
    return [queries, keys, values, untouched.float()]
