"""Which backend a run attends with: by the device's capability, and only what was seen to compute correctly here.

Every candidate computes a small attention, forward and, where the run trains, backward, on the run's device, in its
dtype and at its widths of a head; the result is compared with exact attention (mirai_kernels) in float64. Whoever
fails is refused, with the reason. Nothing falls back: a backend asked for by name serves or ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from mirai_dist.attention import flash, flex, sdpa, xformers
from mirai_dist.attention.patterns import Backends, Pattern, Segments, by_dense
from mirai_kernels.chunk_attention.reference import chunk_attention
from mirai_kernels.segment_prefix_attention.reference import (
    masked_attention,
    segment_causal_mask,
    teacher_forced_mask,
)

AUTO = "auto"
BY_SEGMENT = "dense"  # rules over segments as calls of the backend for dense attention

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

    @property
    def capability(self) -> int:
        """Major compute capability of a CUDA device (Ampere 8, Hopper 9, Blackwell 10 and 12); 0: it is none."""
        return torch.cuda.get_device_capability()[0] if self.device == "cuda" else 0


@dataclass(frozen=True)
class Candidate:
    """A backend that may serve.

    load: gives it, or raises ImportError. least, most: major compute capabilities it is made for; least 0: CPUs too.
    """

    name: str
    load: Callable[[], Any]
    least: int = 0
    most: int = 99
    half_only: bool = False
    cpu_backward: bool = True

    def unfit(self, need: Need) -> str:
        """Why it cannot serve, as far as that is known without trying; empty: try."""
        halves = (torch.float16, torch.bfloat16)
        if self.name in need.failed:
            return "failed at the recipe's shapes, as its certificate says"
        if self.least and not need.capability:
            return "needs a CUDA device"
        if not self.least <= need.capability <= self.most:
            return f"is not for compute capability {need.capability}"
        if self.half_only and need.dtype not in halves:
            return f"computes in bfloat16 and float16, not in {_word(need.dtype)}"
        if need.trained and need.device == "cpu" and not self.cpu_backward:
            return "has no backward on CPU"
        return ""


DENSE = (
    Candidate("flash-4", partial(flash.load, 4), least=9, half_only=True),
    Candidate("flash-3", partial(flash.load, 3), least=9, most=9, half_only=True),
    Candidate("flash-2", partial(flash.load, 2), least=8, half_only=True),
    Candidate("cudnn", lambda: sdpa.CUDNN, least=8, half_only=True),
    Candidate("xformers", xformers.load, least=7),
    Candidate("sdpa-flash", lambda: sdpa.FLASH),
    Candidate("sdpa-efficient", lambda: sdpa.EFFICIENT, least=5),
    Candidate("sdpa", lambda: sdpa.dense),
)
FLEX = Candidate("flex", flex.load, cpu_backward=False)

# Fastest first, by published rates at heads of 128. On Hopper torch's own choice is FlashAttention-2, which reaches
# about half of cuDNN's rate there; before Hopper cuDNN is no faster. `sdpa` is torch's own choice.
_ORDER = {
    10: ("flash-4", "cudnn", "flash-2", "xformers", "sdpa"),
    9: ("flash-3", "cudnn", "flash-4", "flash-2", "xformers", "sdpa"),
    0: ("flash-2", "xformers", "sdpa"),
}
_FASTER_THAN_FLEX = ("flash-4", "flash-3", "cudnn")


class Unavailable(RuntimeError):
    """No backend that was asked for serves; the message says why, and what would. `key`: of the recipe's section."""

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        super().__init__(message)


@dataclass(frozen=True)
class Choice:
    """What a run attends with, by name too, and who was refused, with the reasons."""

    backends: Backends
    dense: str
    segments: str
    refused: tuple[tuple[str, str], ...]

    def told(self) -> dict[str, Any]:
        """For people: names, and a line a reason."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.refused:
            reasons.setdefault(reason, []).append(name)
        refused = {", ".join(names): reason for reason, names in reasons.items()}
        segments = "dense calls, segment by segment" if self.segments == BY_SEGMENT else self.segments
        return {"dense": self.dense, "segments": segments, "refused": refused}


@lru_cache
def select(dense: str, segments: str, need: Need) -> Choice:
    """The backends for dense attention and for rules over segments, each named as in a recipe, or "auto".

    Raises Unavailable where nothing that was asked for serves. Probed once a process.
    """
    asked = [each for name in _names(dense, need) for each in DENSE if each.name == name]
    found = first_that_serves(asked, need, probe_dense)
    if found.backend is None:
        raise Unavailable("attention", _refusal(dense, found, _serving(DENSE, need)))
    wanted = segments
    if segments == AUTO:
        wanted = BY_SEGMENT if need.device == "cpu" or found.name in _FASTER_THAN_FLEX else FLEX.name
    if wanted == BY_SEGMENT:
        return Choice(by_dense(found.backend), found.name, BY_SEGMENT, found.refused)
    whole = first_that_serves([FLEX], need, probe_segments)
    refused = (*found.refused, *whole.refused)
    if whole.backend is not None:
        return Choice(replace(by_dense(found.backend), segments=whole.backend), found.name, whole.name, refused)
    if segments == AUTO:
        return Choice(by_dense(found.backend), found.name, BY_SEGMENT, refused)
    raise Unavailable("segment_attention", _refusal(segments, whole, [BY_SEGMENT]))


def _names(asked: str, need: Need) -> Sequence[str]:
    """Candidates for a word of the recipe, best first; `flash` is whichever generation serves."""
    order = next(names for least, names in _ORDER.items() if need.capability >= least)
    if asked == "flash":
        return [name for name in order if name.startswith("flash-")]
    return order if asked == AUTO else [asked]


def _refusal(asked: str, found: Found, serving: Sequence[str]) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in found.refused)
    return f"{asked} cannot be used here ({reasons}); choose {' or '.join((AUTO, *serving))}"


# --- probing -------------------------------------------------------------------------------------------------

Probe = Callable[[Any, Need], str]


@dataclass(frozen=True)
class Found:
    """The first backend that serves (None: none does), and the candidates before it, with why they do not."""

    name: str
    backend: Any
    refused: tuple[tuple[str, str], ...]


def first_that_serves(candidates: Iterable[Candidate], need: Need, probe: Probe) -> Found:
    """Try candidates in their order."""
    refused = []
    for candidate in candidates:
        backend, reason = _tried(candidate, need, probe)
        if not reason:
            return Found(candidate.name, backend, tuple(refused))
        refused.append((candidate.name, reason))
    return Found("", None, tuple(refused))


def _serving(candidates: Iterable[Candidate], need: Need) -> list[str]:
    return [each.name for each in candidates if not _tried(each, need, probe_dense)[1]]


def _tried(candidate: Candidate, need: Need, probe: Probe) -> tuple[Any, str]:
    """A backend and why it cannot serve, empty if it does."""
    unfit = candidate.unfit(need)
    if unfit:
        return None, unfit
    try:
        backend = candidate.load()
        return backend, probe(backend, need)
    except ModuleNotFoundError as error:
        return None, f"package {error.name} is not installed"
    except Exception as error:  # noqa: BLE001  packages fail in ways of their own; whatever it was is the reason
        return None, f"fails with {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


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
            return f"its {name} is off by {error:.1e} in {_word(need.dtype)}"
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


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
