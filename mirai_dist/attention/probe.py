"""Whether a backend computes what it should, forward and backward, on this device: compared with float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mirai_dist.attention.patterns import Behind, Pattern, Segments
from mirai_kernels.chunk_attention.reference import chunk_attention
from mirai_kernels.segment_prefix_attention.reference import (
    masked_attention,
    segment_causal_mask,
    teacher_forced_mask,
)

# Largest |ours - exact| / |exact| of the output or a gradient. Roundings of a sound backend stay several times below;
# tensor cores that round float32 to 10 bits do not.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Need:
    """What a run asks of attention. `head_dims`: every width of a head that its networks have."""

    device: str  # "cpu" or "cuda": this process's current device of the type
    dtype: torch.dtype
    head_dims: tuple[int, ...]
    trained: bool = True
    failed: frozenset[str] = frozenset()  # backends that a certificate of this machine found wrong
    # why nothing may be computed in parts that our kernels join; empty: it may
    no_kernels: str = "needs the fused kernels, which this run does not use"
    cached_gradient: bool = False  # whether keys in a cache may carry a gradient

    @property
    def capability(self) -> int:
        """Major compute capability of a CUDA device (Ampere 8, Hopper 9, Blackwell 10 and 12); 0: it is none."""
        return torch.cuda.get_device_capability()[0] if self.device == "cuda" else 0


def probe_dense(attend: Pattern, need: Need) -> str:
    """Why a backend's dense attention is not exact enough, or not differentiable; empty if it is.

    Odd numbers of queries and keys; keys a slice of a longer tensor, as those of earlier segments are.
    """
    for head_dim in need.head_dims:
        q, keys, values = (_drawn(need, tokens, head_dim, seed) for seed, tokens in enumerate((37, 151, 151)))
        inputs = q, keys[:, :107], values[:, :107]
        reason = _difference(attend, lambda q, k, v: chunk_attention(q, (k, v))[0], inputs, need)
        if reason:
            return f"{reason} at heads of {head_dim}"
    return ""


def probe_segments(segments: Segments, need: Need) -> str:
    """The same of rules over segments, of 50 tokens: no edge of theirs is one of a power of two."""
    length, tokens = 50, 200
    for head_dim in need.head_dims:
        for rule, mask, doubled in (
            (segments.causal, segment_causal_mask, 1),
            (segments.teacher_forced, teacher_forced_mask, 2),
        ):
            inputs = tuple(_drawn(need, doubled * tokens, head_dim, seed) for seed in range(3))
            exact = partial(_under_mask, mask(tokens, length, torch.device(need.device)))
            reason = _difference(rule(length), exact, inputs, need)
            if reason:
                return f"{rule.__name__}: {reason} at heads of {head_dim}"
    return ""


def probe_behind(behind: Behind, need: Need) -> str:
    """The same of a segment behind two runs of a cache that is NaN elsewhere, with keys and values beside it; and, of
    its output alone, with these in the cache too."""
    for head_dim in need.head_dims:
        q, k, v, *cache = (_drawn(need, tokens, head_dim, seed) for seed, tokens in enumerate((37, 37, 37, 190, 190)))
        for each in cache:
            each[:, 40:70] = each[:, 121:] = float("nan")
        seen = _Cache(cache[0], cache[1])
        past = seen.together(None)

        def exact(q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] = past) -> Tensor:
            return chunk_attention(q, (k, v), tuple(each.to(q.dtype) for each in past))[0]  # type: ignore[arg-type]

        reason = _difference(lambda q, k, v, seen=seen: behind(q, (k, v), seen), exact, (q, k, v), need)
        if reason:
            return f"{reason} at heads of {head_dim}"
        for each, own in zip(cache, (k, v), strict=True):
            each[:, 150:187] = own
        inside = seen._replace(room=(150, 187))
        only_output = replace(need, trained=False)
        reason = _difference(lambda q, k, v, seen=inside: behind(q, None, seen), exact, (q, k, v), only_output)
        if reason:
            return f"{reason} at heads of {head_dim}, where all is in the cache"
    return ""


class _Cache(NamedTuple):
    """`Seen`, as a cache of two runs shows itself."""

    keys: Tensor
    values: Tensor
    past: tuple[int, ...] = (0, 40, 70, 121)
    room: tuple[int, ...] = ()

    def together(self, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        ends = self.past + self.room
        runs = zip(ends[::2], ends[1::2], strict=True)
        pieces = [(self.keys[:, a:b], self.values[:, a:b]) for a, b in runs] + ([own] if own else [])
        keys, values = zip(*pieces, strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)


def _under_mask(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked_attention(q, k, v, mask)


def _drawn(need: Need, tokens: int, head_dim: int, seed: int) -> Tensor:
    """[2, tokens, 3, head_dim] of normal numbers, the same on every rank."""
    draws = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(2, tokens, 3, head_dim, generator=draws, device="cpu").to(need.device, need.dtype)


def _difference(attend: Pattern, exact: Pattern, inputs: tuple[Tensor, ...], need: Need) -> str:
    """Which of output and gradients differs too much from the exact one's, if any does."""
    ours = _results(attend, inputs, need.trained)
    theirs = _results(exact, tuple(each.double() for each in inputs), need.trained)
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    for name, mine, expected in zip(names, ours, theirs, strict=False):
        error = ((mine.double() - expected).norm() / expected.norm()).item()
        if not error <= BOUNDS[need.dtype]:
            return f"its {name} is off by {error:.1e} in {word(need.dtype)}"
    return ""


def _results(attend: Pattern, inputs: tuple[Tensor, ...], trained: bool) -> tuple[Tensor, ...]:
    """The output alone, or with the gradients of a fixed functional of it."""
    with torch.set_grad_enabled(trained):
        leaves = tuple(each.detach().requires_grad_(trained) for each in inputs)
        output = attend(*leaves)
        if not trained:
            return (output,)
        towards = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
        return output, *torch.autograd.grad((output * towards).sum(), leaves)


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
