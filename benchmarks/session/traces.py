"""Traces of torch's profiler: recorded part by part, and read back as a table of where the time of a part went."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import profile, record_function

from mirai_dist.cycle.profiling import activities

KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "mirai_kernels"
ATTENTION, PRODUCTS, COPIES = "attention", "products", "copies and collectives"
OURS, OTHERS, GAPS = "our kernels", "elementwise", "nothing runs"
# By what stands in the lower-case name of a kernel or, where there is no GPU, of an operator; the first that fits.
# cuDNN's attention is sdpa with helpers of its own, nvjet and xmma are cuBLAS, pytorch's own flash comes from CUTLASS.
KINDS = {
    ATTENTION: r"flash|fmha|sdpa|attention|attn|dot_do_o|convert_dq",
    COPIES: r"memcpy|memset|nccl|all_gather|reduce_scatter|split_with_sizes|chunk_cat|catarray|aten::cat\b",
    PRODUCTS: r"gemm|gemv|cutlass|nvjet|xmma|splitk|aten::(mm|addmm|bmm|baddbmm|_scaled_mm)\b",
}
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = re.compile(r"(cuda|cu)(Launch|GraphLaunch)")


class Span(NamedTuple):
    """Something that ran: its name, thread or stream, begin and length in microseconds."""

    name: str
    where: tuple[Any, Any]
    begin: float
    length: float

    @property
    def end(self) -> float:
        return self.begin + self.length


@dataclass(frozen=True)
class Breakdown:
    """A part of a trace. wall, kinds, names: milliseconds, of the part, by kind and by name, as many times as counted
    in `calls`. What runs at the same time on two streams is in both; gaps are when nothing runs on any. launches: calls
    of the driver that start something; 0 where no GPU is."""

    wall: float
    kinds: dict[str, float]
    names: dict[str, float]
    calls: dict[str, int]
    launches: int


def recorded(path: Path, parts: Mapping[str, Callable[[], object]]) -> None:
    """A compressed Chrome trace, to a `path` that ends in .gz: each part under its name, until the device is done."""
    with profile(activities=activities()) as recording:
        for name, part in parts.items():
            with record_function(name):
                part()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
    recording.export_chrome_trace(str(path))


def breakdown(path: Path, part: str) -> Breakdown:
    """Where the time of a part went: by kernels, or by operators less those inside them where there is no GPU.

    ValueError for a part that is not in the trace.
    """
    with gzip.open(path, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    marked = [each for each in _spans(events, ("user_annotation",)) if each.name == part]
    if not marked:
        raise ValueError(f"{path} has no part {part!r}")
    window = marked[0]
    inside = lambda categories: [
        each for each in _spans(events, categories) if window.begin <= each.begin <= window.end
    ]
    on_device = any(event.get("cat") == "kernel" for event in events)
    ran = inside(ON_DEVICE) if on_device else list(_without_inner(inside(("cpu_op",))))
    kinds, names, calls = dict[str, float](), dict[str, float](), dict[str, int]()
    for each in ran:
        kind = kind_of(each.name)
        for found, key in ((kinds, kind), (names, each.name)):
            found[key] = found.get(key, 0.0) + each.length / 1e3
        for key in (kind, each.name):
            calls[key] = calls.get(key, 0) + 1
    kinds[GAPS] = max(0.0, window.length - _covered(inside(ON_DEVICE if on_device else ("cpu_op",)))) / 1e3
    launched = sum(bool(LAUNCHES.match(each.name)) for each in inside(("cuda_runtime", "cuda_driver")))
    return Breakdown(window.length / 1e3, kinds, names, calls, launched)


def _spans(events: Sequence[dict[str, Any]], categories: Sequence[str]) -> Iterator[Span]:
    for event in events:
        if event.get("cat") in categories:
            yield Span(event["name"], (event["pid"], event["tid"]), float(event["ts"]), float(event["dur"]))


def _without_inner(spans: Sequence[Span]) -> Iterator[Span]:
    """Spans of each thread without the time of those that they contain."""
    open_spans: dict[tuple[Any, Any], list[tuple[Span, float]]] = {}

    def closed(stack: list[tuple[Span, float]]) -> Span:
        span, own = stack.pop()
        return span._replace(length=own)

    for span in sorted(spans, key=lambda each: (each.begin, -each.length)):
        stack = open_spans.setdefault(span.where, [])
        while stack and stack[-1][0].end <= span.begin:
            yield closed(stack)
        if stack:
            outer, own = stack[-1]
            stack[-1] = outer, own - span.length
        stack.append((span, span.length))
    for stack in open_spans.values():
        while stack:
            yield closed(stack)


def _covered(spans: Sequence[Span]) -> float:
    """Microseconds in which at least one of them runs."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda each: each.begin):
        total += max(0.0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return total


def kind_of(name: str) -> str:
    """The kind of work that a kernel or an operator does, by its name."""
    if name in own_kernels():
        return OURS
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), OTHERS)


@lru_cache
def own_kernels() -> frozenset[str]:
    """Names of the Triton kernels of this repository, which are those of their functions."""
    texts = (path.read_text() for path in KERNELS.rglob("triton_*.py"))
    return frozenset(name for text in texts for name in re.findall(r"@triton\.jit[^\n]*\ndef (\w+)\(", text))
