"""Parameter names of Wan2.1: the official layout, which `WanModel` has, and that of diffusers' transformer.

Both layouts hold the same tensors in the same shapes, so only names change and no weight is permuted. The one
trap is `norm3`: the affine norm before cross-attention, which diffusers calls `norm2` (spec 1.8).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

PATCH = (1, 2, 2)  # frames, rows and columns of latents a token

# (official, diffusers) modules that hold a weight and a bias, outside the blocks and after `blocks.<i>.`
_OUTER = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
)
_INNER = (("norm3", "norm2"), ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"))
_ATTENTION = (("self_attn", "attn1"), ("cross_attn", "attn2"))
_PROJECTIONS = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))


def _outer() -> Iterator[tuple[str, str]]:
    yield "head.modulation", "scale_shift_table"
    for ours, theirs in _OUTER:
        for leaf in ("weight", "bias"):
            yield f"{ours}.{leaf}", f"{theirs}.{leaf}"


def _inner() -> Iterator[tuple[str, str]]:
    yield "modulation", "scale_shift_table"
    projections = [(f"{our}.{q}", f"{their}.{to_q}") for our, their in _ATTENTION for q, to_q in _PROJECTIONS]
    for ours, theirs in (*_INNER, *projections):
        for leaf in ("weight", "bias"):
            yield f"{ours}.{leaf}", f"{theirs}.{leaf}"
    for ours, theirs in _ATTENTION:
        for norm in ("norm_q.weight", "norm_k.weight"):
            yield f"{ours}.{norm}", f"{theirs}.{norm}"


_TO_DIFFUSERS = dict(_outer()), dict(_inner())
_FROM_DIFFUSERS = tuple({theirs: ours for ours, theirs in names.items()} for names in _TO_DIFFUSERS)


def to_diffusers(name: str) -> str:
    """diffusers' name of an official parameter name. KeyError when Wan2.1 (text to video) has no such parameter."""
    return _translate(name, *_TO_DIFFUSERS)


def from_diffusers(name: str) -> str:
    """Official name of a parameter of diffusers' WanTransformer3DModel. KeyError when it has no counterpart."""
    return _translate(name, *_FROM_DIFFUSERS)


def _translate(name: str, outer: dict[str, str], inner: dict[str, str]) -> str:
    if name in outer:
        return outer[name]
    first, _, after = name.partition(".")
    index, _, within = after.partition(".")
    if first == "blocks" and index.isdecimal() and within in inner:
        return f"blocks.{index}.{inner[within]}"
    raise KeyError(f"{name} is no parameter of Wan2.1's text-to-video transformer")


class WanShape(NamedTuple):
    """Sizes that fix every parameter of the network, name and shape. heads is 0 where a file does not tell."""

    dim: int
    ffn_dim: int
    heads: int
    blocks: int
    text_dim: int = 4096
    channels: int = 16
    freq_dim: int = 256


# heads of the published networks; a file without a configuration does not say
PUBLISHED_HEADS = {(1536, 8960, 30): 12, (5120, 13824, 40): 40}


def shapes_of(sizes: WanShape) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every parameter, in the order of the network."""
    dim, ffn_dim, _, blocks, text_dim, channels, freq_dim = sizes
    matrices = {
        "text_embedding.0": (dim, text_dim),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, freq_dim),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "head.head": (math.prod(PATCH) * channels, dim),
        "ffn.0": (ffn_dim, dim),
        "ffn.2": (dim, ffn_dim),
        "patch_embedding": (dim, channels, *PATCH),
        "norm3": (dim,),
    }

    def shape(name: str, vectors: int) -> tuple[int, ...]:
        module, _, leaf = name.rpartition(".")
        if leaf == "modulation":
            return 1, vectors, dim
        whole = matrices.get(module, (dim,) if ".norm_" in name else (dim, dim))
        return whole if leaf == "weight" else whole[:1]

    shapes = {name: shape(name, 2) for name, _ in _outer()}
    for index in range(blocks):
        shapes |= {f"blocks.{index}.{name}": shape(name, 6) for name, _ in _inner()}
    return shapes
