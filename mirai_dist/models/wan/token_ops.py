"""What a block does to each token by itself, between its matrix products and attention: norms, positions, gates.

Two implementations: plain torch, which is the specification of the networks' arithmetic and runs everywhere, and
fused kernels (mirai_kernels), which move each tensor once. What they compute differs by roundings alone: plain torch
rounds each step to the activations' dtype, the kernels round once, where they store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from mirai_dist.models.wan.rope import rotary_table, rotate

EPS = 1e-6


class Placement(NamedTuple):
    """Where tokens stand: their grid (frames, rows, columns), frame-major, the absolute frame that it starts at, and
    how many copies of it follow one another (2 under teacher forcing)."""

    grid: tuple[int, int, int]
    first_frame: int = 0
    copies: int = 1


class Projections(Protocol):
    """The parts of an attention layer that feed it: three linear maps of its input, and norms [dim] of two of them."""

    heads: int
    q: Any
    k: Any
    v: Any
    norm_q: Any
    norm_k: Any


Slots = Sequence[tuple[Tensor, Tensor]]
"""Memory for keys and values [B, tokens, heads, head_dim] of whole frames, one run of tokens after another."""


class TokenOps(Protocol):
    """x and y are tokens [B, N, dim]; a gate, scale or shift is [1 or B, 1 or frames, dim], a vector a frame.

    A network without them gives None: for a gate, which then counts as 1, and for scale and shift together, which then
    count as 0.
    """

    def place(self, placement: Placement, head_dim: int, like: Tensor) -> Any:
        """What the other calls take as `places`: made once a pass, for tokens of this device and dtype."""
        ...

    def modulated(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        """LayerNorm(x) (1 + scale) + shift."""
        ...

    def added(self, x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
        """x + gate y."""
        ...

    def added_normed(self, x: Tensor, y: Tensor, gate: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """(x + gate y, its LayerNorm with the layer's weight and bias)."""
        ...

    def added_modulated(
        self, x: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x + gate y, its LayerNorm modulated)."""
        ...

    def queries(self, layer: Projections, x: Tensor) -> Tensor:
        """Normalised queries [B, N, heads, head_dim] at no position."""
        ...

    def keys_values(self, layer: Projections, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised keys at no position, and values; each [B, N, heads, head_dim]."""
        ...

    def placed(self, layer: Projections, x: Tensor, places: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and rotated to their places, and values; each [B, N, heads, head_dim]."""
        ...

    def queries_into(self, layer: Projections, x: Tensor, places: Any, slots: Slots) -> Tensor:
        """The queries of `placed`, with keys and values written into slots; without gradient."""
        ...


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without affine parameters."""
    return functional.layer_norm(x, (x.shape[-1],), eps=EPS)


def per_frame(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply tokens [B, N, dim] by a factor [B, frames, dim] of the frame they belong to."""
    return (x.unflatten(1, (factor.shape[1], -1)) * factor.unsqueeze(2)).flatten(1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with one shift and scale [B, frames, dim] a frame."""
    framed = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift.unsqueeze(2), framed, 1 + scale.unsqueeze(2)).flatten(1, 2)


def fill(slots: Slots, keys_values: Sequence[Tensor]) -> None:
    """Write keys and values [B, tokens, heads, head_dim] into slots that have as many tokens together."""
    lengths = [keys.shape[1] for keys, _ in slots]
    for memory, tensor in zip(zip(*slots, strict=True), keys_values, strict=True):
        for slot, tokens in zip(memory, tensor.split(lengths, dim=1), strict=True):
            slot.copy_(tokens)


def _by_head(layer: Projections, x: Tensor) -> Tensor:
    return x.unflatten(-1, (layer.heads, -1))


class Plain:
    """In plain torch, on any device and in any dtype."""

    def place(self, placement: Placement, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(like.dtype, torch.float32)
        cos, sin = rotary_table(placement.grid, placement.first_frame, head_dim, like.device, wide)
        if placement.copies == 1:
            return cos, sin
        return cos.repeat(placement.copies, 1), sin.repeat(placement.copies, 1)

    def modulated(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        normed = layer_norm(x)
        return normed if scale is None or shift is None else modulate(normed, shift, scale)

    def added(self, x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
        return x + (y if gate is None else per_frame(y, gate))

    def added_normed(self, x: Tensor, y: Tensor, gate: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        x = self.added(x, y, gate)
        return x, norm(x)

    def added_modulated(
        self, x: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self.added(x, y, gate)
        return x, self.modulated(x, scale, shift)

    def queries(self, layer: Projections, x: Tensor) -> Tensor:
        return _by_head(layer, layer.norm_q(layer.q(x)))

    def keys_values(self, layer: Projections, x: Tensor) -> tuple[Tensor, Tensor]:
        return _by_head(layer, layer.norm_k(layer.k(x))), _by_head(layer, layer.v(x))

    def placed(self, layer: Projections, x: Tensor, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self.keys_values(layer, x)
        return rotate(self.queries(layer, x), places), rotate(keys, places), values

    def queries_into(self, layer: Projections, x: Tensor, places: tuple[Tensor, Tensor], slots: Slots) -> Tensor:
        queries, *own = self.placed(layer, x, places)
        fill(slots, own)
        return queries


PLAIN = Plain()


@dataclass(frozen=True)
class Fused:
    """By the kernels of `mirai_kernels`, which compute in float32; `load` gives it."""

    norm_rope: Callable[..., Tensor]
    qk_norm_rope: Callable[..., tuple[Tensor, Tensor]]
    qk_norm_rope_cache: Callable[..., Tensor]
    residual_modulate: Callable[..., tuple[Tensor, Tensor]]
    placement: Callable[..., Any]

    def place(self, placement: Placement, head_dim: int, like: Tensor) -> Placement:
        return placement

    def modulated(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        return self.residual_modulate(x, None, None, *_vectors(x, scale, shift))[1]

    def added(self, x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            return x + y
        frames = gate.shape[1], -1
        return torch.addcmul(x.unflatten(1, frames), y.unflatten(1, frames), gate.unsqueeze(2)).flatten(1, 2)

    def added_normed(self, x: Tensor, y: Tensor, gate: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        scale, shift = (each.view(1, 1, -1) for each in (norm.weight.float() - 1, norm.bias))
        return self.residual_modulate(x, y, gate, scale, shift)

    def added_modulated(
        self, x: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.residual_modulate(x, y, gate, *_vectors(x, scale, shift))

    def queries(self, layer: Projections, x: Tensor) -> Tensor:
        return self.norm_rope(layer.q(x), layer.norm_q.weight, layer.heads, None)

    def keys_values(self, layer: Projections, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_rope(layer.k(x), layer.norm_k.weight, layer.heads, None), _by_head(layer, layer.v(x))

    def placed(self, layer: Projections, x: Tensor, places: Placement) -> tuple[Tensor, Tensor, Tensor]:
        copies = places.copies, -1
        q, k = (each.unflatten(1, copies).flatten(0, 1) for each in (layer.q(x), layer.k(x)))
        weights = layer.norm_q.weight, layer.norm_k.weight
        rotated = self.qk_norm_rope(q, k, weights, layer.heads, self.placement(places.grid, places.first_frame))
        queries, keys = (each.unflatten(0, (-1, places.copies)).flatten(1, 2) for each in rotated)
        return queries, keys, _by_head(layer, layer.v(x))

    def queries_into(self, layer: Projections, x: Tensor, places: Placement, slots: Slots) -> Tensor:
        qkv, weights = (layer.q(x), layer.k(x), layer.v(x)), (layer.norm_q.weight, layer.norm_k.weight)
        (_, rows, columns), first = places.grid, places.first_frame
        queries, done = [], 0
        for slot in slots:
            tokens = slot[0].shape[1]
            frames = tokens // (rows * columns)
            here = self.placement((frames, rows, columns), first + done // (rows * columns))
            part = tuple(each[:, done : done + tokens] for each in qkv)
            queries.append(self.qk_norm_rope_cache(part, weights, slot, here))
            done += tokens
        return queries[0] if len(queries) == 1 else torch.cat(queries, dim=1)


def _vectors(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and shift as the kernels want them; a LayerNorm alone is one with zeros."""
    if scale is None or shift is None:
        zeros = x.new_zeros(1, 1, x.shape[-1])
        return zeros, zeros
    return scale, shift


def load() -> Fused:
    """The fused operators. Raises ImportError without triton, which they are written in."""
    from mirai_kernels.qk_norm_rope_cache.op import norm_rope, qk_norm_rope, qk_norm_rope_cache
    from mirai_kernels.qk_norm_rope_cache.reference import Placement as KernelPlacement
    from mirai_kernels.residual_modulate.op import residual_modulate

    return Fused(norm_rope, qk_norm_rope, qk_norm_rope_cache, residual_modulate, KernelPlacement)
