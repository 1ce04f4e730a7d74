"""What computes a network's norms, positions and gates, and the foresight head, on this machine: plain torch, or the
fused kernels. One choice for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mirai_dist.config import RecipeError, schema
from mirai_dist.cycle import comparing
from mirai_dist.cycle.certified import MAKE, lacking_kernels
from mirai_dist.method.foresight import PRESETS, Comparison, plain
from mirai_dist.models.wan.model import RmsNorm
from mirai_dist.models.wan.token_ops import EPS, PLAIN, Placement, TokenOps, load

# Largest |fused - exact| / |exact| of an output or a gradient. Roundings stay several times below.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Fusing:
    """The choice: `name` as in a recipe, and why the kernels were not taken, if they were not."""

    ops: TokenOps
    name: str
    reason: str = ""

    def told(self) -> str:
        return f"{self.name}: the kernels {self.reason}" if self.reason else self.name


def fusing_of(recipe: schema.Recipe, device: torch.device) -> Fusing:
    """The choice for all networks of a recipe. Raises RecipeError where `parallel.kernels` names what cannot serve.

    A CPU runs the kernels in Triton's interpreter alone, and only where they are named: it is for checks, and slow.
    """
    asked = recipe.parallel.kernels
    if asked == "reference":
        return Fusing(PLAIN, asked)
    networks = (recipe.teacher, recipe.generator, recipe.critic)
    shapes = tuple(sorted({(network.dim, network.heads) for network in networks}))
    head = recipe.generator.dim, recipe.teacher.dim
    if device.type == "cpu" and not (asked == "fused" and _interpreted()):
        found = Fusing(PLAIN, "reference", "run on GPUs")
    else:
        found = _fused(device.type, getattr(torch, recipe.parallel.compute_dtype), shapes, head)
    uncertified = "" if found.reason else lacking_kernels(recipe, device)
    if uncertified:
        found = Fusing(PLAIN, "reference", f"{uncertified}; {MAKE}")
    if uncertified and recipe.parallel.certificates == "require":
        raise RecipeError("parallel.certificates", f"require, and the fused kernels {found.reason}")
    if asked == "fused" and found.reason:
        raise RecipeError("parallel.kernels", f"the fused kernels {found.reason}; use auto or reference")
    return found


def ops_of(recipe: schema.Recipe, device: torch.device) -> TokenOps:
    """What `fusing_of` chose, for a network's constructor."""
    return fusing_of(recipe, device).ops


def comparison_of(recipe: schema.Recipe, device: torch.device) -> Comparison:
    """What compares predictions with targets, by the same choice."""
    arithmetic = PRESETS[recipe.foresight.preset]
    # The release compares in the features' own dtype, rounding at every step; the kernels know float32 alone.
    if fusing_of(recipe, device).name == "fused" and arithmetic.wide_fusion:
        return comparing.load(arithmetic)
    return plain(arithmetic)


def _interpreted() -> bool:
    """Whether this process interprets Triton's kernels (TRITON_INTERPRET=1 when triton was imported)."""
    try:
        from triton import knobs
    except ModuleNotFoundError:
        return False
    return knobs.runtime.interpret


@lru_cache
def _fused(device: str, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...], head: tuple[int, int]) -> Fusing:
    """The fused kernels if they are exact here, else plain torch and why. Probed once a process.

    shapes: width and heads of every network. head: widths that the predictor maps from and to.
    """
    try:
        ops, comparison = load(), comparing.load(PRESETS["paper"])
    except ModuleNotFoundError as error:
        return Fusing(PLAIN, "reference", f"need the package {error.name}")
    with torch.device("cpu"):  # whoever asks may be building a network on the meta device
        for dim, heads in shapes:
            error = largest_error(ops, dim, heads, torch.device(device), dtype)
            if not error <= BOUNDS[dtype]:
                return Fusing(PLAIN, "reference", f"are {error:.1e} from exact at {dim} channels, {heads} heads")
        error = comparing.largest_error(comparison, head, torch.device(device), dtype)
    if not error <= BOUNDS[dtype]:
        return Fusing(PLAIN, "reference", f"are {error:.1e} from exact in a head of {head[0]} to {head[1]} channels")
    return Fusing(ops, "fused")


@dataclass
class _Layer:
    """An attention layer whose linear maps do nothing: only what the operators do is compared."""

    heads: int
    norm_q: nn.Module
    norm_k: nn.Module
    q = k = v = staticmethod(torch.clone)


@torch.enable_grad()
def largest_error(ops: TokenOps, dim: int, heads: int, device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of an output or a gradient, nan if there is one, against plain torch in float64."""
    norms = RmsNorm(dim), RmsNorm(dim), nn.LayerNorm(dim, eps=EPS)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (parameter for norm in norms for parameter in norm.parameters()):
            parameter.normal_(1.0, 0.2, generator=draws)
    inputs = [torch.randn(1, 12, dim, generator=draws) for _ in range(2)]
    inputs += [torch.randn(1, 2, dim, generator=draws) for _ in range(3)]
    rounded = [each.to(dtype) for each in inputs]
    for norm in norms:
        norm.to(dtype).to(device)
    found = _results(ops, heads, norms, [each.to(device) for each in rounded])
    for norm in norms:
        norm.double()
    exact = _results(PLAIN, heads, norms, [each.to(device).double() for each in rounded])
    errors = [(mine.double() - other).norm() / other.norm() for mine, other in zip(found, exact, strict=True)]
    return torch.stack(errors).max().item()


def _results(
    ops: TokenOps, heads: int, norms: tuple[RmsNorm, RmsNorm, nn.LayerNorm], inputs: list[Tensor]
) -> Sequence[Tensor]:
    """All that the operators give, and the gradients of its weighted sum by inputs and weights; what they write has
    none."""
    x, y, gate, scale, shift = leaves = [each.requires_grad_() for each in inputs]
    layer = _Layer(heads, *norms[:2])
    places = ops.place(Placement((1, 2, 3), first_frame=5, copies=2), x.shape[-1] // heads, x)
    keys, values = ops.keys_values(layer, y)
    outputs = [
        *ops.placed(layer, x, places),
        ops.queries(layer, y),
        keys,
        values,
        *ops.added_normed(x, y, gate, norms[2]),
        *ops.added_modulated(x, y, scale, shift),
        *ops.added_modulated(x, y, scale, shift, gate),
        *ops.added_modulated(x, y, None, None),
        ops.modulated(x, scale, shift),
        ops.added(x, y, gate),
    ]
    with torch.no_grad():
        written = _written(ops, layer, x, ops.place(Placement((2, 2, 3), first_frame=5), x.shape[-1] // heads, x))
    draws = torch.Generator().manual_seed(1)
    towards = [torch.randn(each.shape, generator=draws).to(each) for each in outputs]
    weights = [parameter for norm in norms for parameter in norm.parameters()]
    return [*written, *outputs, *torch.autograd.grad(outputs, [*leaves, *weights], towards)]


def _written(ops: TokenOps, layer: _Layer, x: Tensor, places: Any) -> list[Tensor]:
    """Queries, and a cache of keys and values with a frame of `x` in front of what is zero, and one behind it."""
    heads = layer.heads, x.shape[-1] // layer.heads
    keys, values = (x.new_zeros(x.shape[0], 3 * x.shape[1] // 2, *heads) for _ in range(2))
    half = x.shape[1] // 2
    slots = [(keys[:, a : a + half], values[:, a : a + half]) for a in (0, 2 * half)]
    return [ops.queries_into(layer, x, places, slots), keys, values]
