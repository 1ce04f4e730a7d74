"""Tile sizes of the kernels, and their launches: tensors in, tensors out, nothing else decided here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from mirai_kernels.chunk_attention.triton_backward import backward_own, backward_queries
from mirai_kernels.chunk_attention.triton_forward import RUN_ENDS, forward
from mirai_kernels.dense_attention.library import LIBRARIES, Attended, Gradients, Library
from mirai_kernels.launch import Launch, padded, programs

TRITON = "triton"
WIDEST = 128  # numbers a head
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def check_tensors(tensors: Sequence[Tensor], by: str) -> None:
    """Raise ValueError for inputs [B, N, H, D] that the kernels cannot take; `by`: "triton" or a library."""
    if by not in (TRITON, *LIBRARIES):
        raise ValueError(f"attention by {by!r}; known are {', '.join((TRITON, *LIBRARIES))}")
    first = tensors[0]
    if any(each.dtype != first.dtype for each in tensors) or first.dtype not in TYPES:
        raise ValueError(f"dtypes {[each.dtype for each in tensors]}; all are float32, float16 or bfloat16, the same")
    shapes = [tuple(each.shape) for each in tensors]
    if any((samples, *head) != (first.shape[0], *first.shape[2:]) for samples, _, *head in shapes):
        raise ValueError(f"shapes {shapes}; only the numbers of tokens may differ")
    if first.shape[3] > WIDEST:
        raise ValueError(f"heads of {first.shape[3]}; at most {WIDEST}")
    if any(each[0].numel() >= 2**31 for each in tensors):
        raise ValueError(f"shapes {shapes}; a sample holds fewer than 2^31 numbers")


class Segment(NamedTuple):
    """q [B, Q, H, D] and the segment's own k and v [B, K, H, D]; tokens of a sample lie densely."""

    q: Tensor
    k: Tensor
    v: Tensor


class Cached(NamedTuple):
    """keys and values [B, capacity, H, D], tokens of a sample densely; runs: first, end of tokens, a pair a run. A sink
    and a ring in two pieces make three runs, and there are no more. Nothing outside them is read."""

    keys: Tensor
    values: Tensor
    runs: tuple[int, ...]


@dataclass(frozen=True)
class Tiles:
    """Queries and keys a tile; warps; stages of the pipeline that loads what a loop walks over."""

    queries: int
    keys: int
    warps: int
    stages: int


# By bytes of a number: two are as large as heads of 128 allow without spilling registers on Hopper. Float32 is for
# checks, by plain multiply-adds, which are unrolled: larger tiles spill kilobytes and take the compiler many seconds.
FORWARD = {2: Tiles(128, 64, 8, 3), 4: Tiles(32, 32, 8, 1)}
BACKWARD_QUERIES = {2: Tiles(128, 64, 8, 2), 4: Tiles(32, 32, 8, 1)}
BACKWARD_OWN = {2: Tiles(64, 64, 8, 2), 4: Tiles(32, 32, 8, 1)}


def _constants(q: Tensor, tiles: Tiles) -> dict[str, Any]:
    """Sizes, and the dtype that tiles are multiplied in. Float32 is multiplied as such, never rounded first; the
    interpreter, whose bfloat16 products are wrong, multiplies that in float32 too."""
    widened = knobs.runtime.interpret and q.dtype == torch.bfloat16
    return {
        "HEADS": q.shape[2],
        "WIDTH": q.shape[3],
        "PADDED": max(16, padded(q.shape[3])),
        "BLOCK_Q": tiles.queries,
        "BLOCK_K": tiles.keys,
        "COMPUTE": tl.float32 if widened else TYPES[q.dtype],
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def _inputs(segment: Segment, cached: Cached | None) -> dict[str, Any]:
    q, k, v = segment
    keys, values, runs = cached or Cached(k, v, ())
    return {
        "q": q,
        "own_k": k,
        "own_v": v,
        "cached_k": keys,
        "cached_v": values,
        **dict(zip_longest(RUN_ENDS, runs, fillvalue=0)),
        "queries": q.shape[1],
        "own": k.shape[1],
        "q_batch": q.stride(0),
        "own_batch": k.stride(0),
        "cached_batch": keys.stride(0),
        "scale": q.shape[3] ** -0.5,
    }


def forward_launch(segment: Segment, cached: Cached | None = None) -> tuple[Launch, Attended]:
    """The segment's queries to the cached runs and to its own keys, in one launch."""
    q = segment.q
    samples, queries, heads, _ = q.shape
    attended = Attended(
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty((samples, heads, queries), dtype=torch.float32, device=q.device),
    )
    tiles = FORWARD[q.element_size()]
    arguments = _inputs(segment, cached) | {"out": attended.out, "lse": attended.lse}
    constants = _constants(q, tiles) | {"RUNS": len(cached.runs) // 2 if cached else 0}
    grid = (programs(queries, tiles.queries), samples * heads)
    return Launch(forward, grid, arguments, constants, tiles.warps, tiles.stages), attended


def queries_launch(
    segment: Segment, cached: Cached | None, attended: Attended, grad_out: Tensor, own_part: Tensor | None = None
) -> tuple[Launch, Tensor, Tensor]:
    """(launch, gradient of q, sums of grad_out x out [B, H, Q]) over the cached runs and the own keys.

    own_part: what the own keys contribute, if it is known; it is overwritten with the gradient. `attended` is over all
    keys; it and grad_out are contiguous.
    """
    q = segment.q
    samples, queries, heads, _ = q.shape
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device) if own_part is None else own_part
    delta = torch.empty_like(attended.lse)
    tiles = BACKWARD_QUERIES[q.element_size()]
    arguments = _inputs(segment, cached)
    arguments |= {"out": attended.out, "lse": attended.lse, "grad_out": grad_out, "delta": delta, "grad_q": grad_q}
    constants = _constants(q, tiles) | {"RUNS": len(cached.runs) // 2 if cached else 0, "OWN": own_part is None}
    grid = (programs(queries, tiles.queries), samples * heads)
    return Launch(backward_queries, grid, arguments, constants, tiles.warps, tiles.stages), grad_q, delta


def own_launch(segment: Segment, lse: Tensor, grad_out: Tensor, delta: Tensor) -> tuple[Launch, Tensor, Tensor]:
    """(launch, gradients of own keys and values); lse and delta [B, H, Q] over all keys, as `queries_launch` takes and
    gives them."""
    q, k, v = segment
    samples, own, heads, _ = k.shape
    grad_k, grad_v = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    tiles = BACKWARD_OWN[q.element_size()]
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "grad_out": grad_out,
        "lse": lse,
        "delta": delta,
        "grad_k": grad_k,
        "grad_v": grad_v,
        "queries": q.shape[1],
        "own": own,
        "q_batch": q.stride(0),
        "own_batch": k.stride(0),
        "scale": q.shape[3] ** -0.5,
    }
    grid = (programs(own, tiles.keys), samples * heads)
    return Launch(backward_own, grid, arguments, _constants(q, tiles), tiles.warps, tiles.stages), grad_k, grad_v


def attend(segment: Segment, cached: Cached | None = None) -> Attended:
    launch, attended = forward_launch(segment, cached)
    launch.run()
    return attended


def gradients(segment: Segment, cached: Cached | None, attended: Attended, grad_out: Tensor) -> Gradients:
    """Of q, towards all keys, and of the segment's own keys and values."""
    launch, grad_q, delta = queries_launch(segment, cached, attended, grad_out)
    launch.run()
    launch, grad_k, grad_v = own_launch(segment, attended.lse, grad_out, delta)
    launch.run()
    return Gradients(grad_q, grad_k, grad_v)


def add_query_gradient(
    grad_q: Tensor, segment: Segment, cached: Cached, attended: Attended, grad_out: Tensor
) -> None:
    """Add to the gradient of q towards its own keys, in place, that towards cached ones."""
    queries_launch(segment, cached, attended, grad_out, own_part=grad_q)[0].run()


def _dense_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended) -> Gradients:
    return gradients(Segment(q, k, v), None, attended, grad_out)


def _dense_forward(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    return attend(Segment(q, k, v))


DENSE = {TRITON: Library(_dense_forward, _dense_backward)} | LIBRARIES
"""Dense attention by name: by these kernels alone, and by torch's."""
