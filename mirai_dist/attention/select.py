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

from mirai_dist.attention import flash, flex, sdpa, split, xformers
from mirai_dist.attention.patterns import Backends, by_dense
from mirai_dist.attention.probe import Need as Need
from mirai_dist.attention.probe import probe_behind, probe_dense, probe_segments, word

AUTO = "auto"
BY_SEGMENT = "dense"  # rules over segments as calls of the backend for dense attention
PREFIX = "prefix"  # the same as dense calls over prefixes, joined (attention/split.py)
TOGETHER, SPLIT = "dense", "split"  # a segment behind a cache: by dense calls; with its backward in parts



@dataclass(frozen=True)
class Candidate:
    """A backend that may serve.

    load: gives it, or raises ImportError. least, most: major compute capabilities it is made for; least 0: CPUs too.
    hindrance: why it cannot serve beside other choices.
    """

    name: str
    load: Callable[[], Any]
    least: int = 0
    most: int = 99
    half_only: bool = False
    cpu_backward: bool = True
    hindrance: str = ""

    def unfit(self, need: Need) -> str:
        """Why it cannot serve, as far as that is known without trying; empty: try."""
        if self.hindrance:
            return self.hindrance
        halves = (torch.float16, torch.bfloat16)
        if self.name in need.failed:
            return "failed at the recipe's shapes, as its certificate says"
        if self.least and not need.capability:
            return "needs a CUDA device"
        if not self.least <= need.capability <= self.most:
            return f"is not for compute capability {need.capability}"
        if self.half_only and need.dtype not in halves:
            return f"computes in bfloat16 and float16, not in {word(need.dtype)}"
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
    behind: str = TOGETHER

    def told(self) -> dict[str, Any]:
        """For people: names, and a line a reason."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.refused:
            reasons.setdefault(reason, []).append(name)
        refused = {", ".join(names): reason for reason, names in reasons.items()}
        return {
            "dense": self.dense,
            "segments": _TOLD.get(self.segments, self.segments),
            "behind": "no gradient towards a cache" if self.behind == SPLIT else "dense calls",
            "refused": refused,
        }


_TOLD = {BY_SEGMENT: "dense calls, segment by segment", PREFIX: "dense calls, prefix by prefix"}


@lru_cache
def select(dense: str, segments: str, need: Need) -> Choice:
    """The backends for dense attention and for rules over segments, each named as in a recipe, or "auto".

    Raises Unavailable where nothing that was asked for serves. Probed once a process.
    """
    asked = [each for name in _names(dense, need) for each in DENSE if each.name == name]
    found = first_that_serves(asked, need, probe_dense)
    if found.backend is None:
        raise Unavailable("attention", _refusal(dense, found, _serving(DENSE, need)))
    choice = Choice(by_dense(found.backend), found.name, BY_SEGMENT, found.refused)
    return _behind(_over_segments(choice, segments, need), need)


def _over_segments(choice: Choice, asked: str, need: Need) -> Choice:
    """The choice with a backend for rules over segments. Raises Unavailable where the one asked for cannot serve."""
    refused = choice.refused
    for candidate in _segments(choice, asked, need):
        found = first_that_serves([candidate], need, probe_segments)
        refused = (*refused, *found.refused)
        if found.backend is not None:
            return replace(choice, backends=replace(choice.backends, segments=found.backend), segments=found.name,
                           refused=refused)  # fmt: skip
        if asked != AUTO:
            raise Unavailable("segment_attention", _refusal(asked, found, [BY_SEGMENT]))
    return replace(choice, refused=refused)


def _segments(choice: Choice, asked: str, need: Need) -> list[Candidate]:
    """Who to try for rules over segments, best first, before dense calls segment by segment."""
    prefix = _of_parts(PREFIX, choice, need, split.load_prefix)
    if asked != AUTO:
        return [each for each in (prefix, FLEX) if each.name == asked]
    flex = need.device != "cpu" and choice.dense not in _FASTER_THAN_FLEX
    return ([] if prefix.hindrance else [prefix]) + ([FLEX] if flex else [])


def _behind(choice: Choice, need: Need) -> Choice:
    """The choice with what serves a segment behind a cache: a dense call always does."""
    if need.no_kernels:
        return choice
    split_of = _of_parts(SPLIT, choice, need, partial(split.load_behind, choice.backends.dense))
    found = first_that_serves([split_of], need, probe_behind)
    if found.backend is None:
        return replace(choice, refused=(*choice.refused, *found.refused))
    return replace(choice, backends=replace(choice.backends, behind=found.backend), behind=SPLIT)


def _of_parts(name: str, choice: Choice, need: Need, load: Callable[[str], Any]) -> Candidate:
    """A candidate that joins what a library computes in parts, with what stands in its way."""
    by = split.LIBRARIES.get((need.device, choice.dense), "")
    hindrance = need.no_kernels
    if not hindrance and not by:
        hindrance = f"joins parts of cudnn or sdpa-flash, and attention is by {choice.dense}"
    if not hindrance and name == SPLIT and need.cached_gradient:
        hindrance = "computes no gradient towards a cache, which rollout.kv_grad leaky asks for"
    return Candidate(name, partial(load, by), hindrance=hindrance)


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
