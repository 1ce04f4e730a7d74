"""The fused kernels on a real card, at real widths: no less exact than plain torch in bfloat16, and they repeat.

    python -m pytest -m gpu tests/gpu/test_kernels.py -s        one GPU; a few GB of its memory
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mirai_dist.cycle.fusing import BOUNDS, largest_error
from mirai_dist.models.wan import token_ops
from mirai_dist.models.wan.model import RmsNorm
from mirai_dist.models.wan.rope import rotate
from mirai_dist.models.wan.token_ops import PLAIN, load
from mirai_kernels.cosine_head import reference as cosine_reference
from mirai_kernels.qk_norm_rope_cache import reference
from mirai_kernels.qk_norm_rope_cache.reference import Placement
from mirai_kernels.residual_modulate import reference as residual_reference
from tests.kernel_cases import assert_same_bits, drawn, relative, with_gradients

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
OWN_ERROR = 1.2  # a kernel may be this much less exact than the same in plain torch
WIDTHS = [(1536, 12), (5120, 40)]
GRID = (3, 30, 52)  # a chunk at 480p
TOKENS = GRID[0] * GRID[1] * GRID[2]
Function = Callable[..., Sequence[Tensor]]


def normal(seed: int, *shape: int) -> Tensor:
    return drawn(seed, *shape, dtype=torch.bfloat16, device=DEVICE)


def assert_no_worse(
    fused: Function, plain: Function, exact: Function, inputs: Sequence[Tensor], good_enough: float = 0.0
) -> None:
    """Outputs and gradients, each against float64; and a second run gives the same bits."""
    found = with_gradients(fused, inputs)
    right = with_gradients(exact, inputs, torch.float64)
    mine = [relative(each, other) for each, other in zip(found, right, strict=True)]
    others = [relative(each, other) for each, other in zip(with_gradients(plain, inputs), right, strict=True)]
    print([f"{each:.1e}" for each in mine], "plain", [f"{each:.1e}" for each in others])
    assert all(one <= max(OWN_ERROR * other, good_enough) for one, other in zip(mine, others, strict=True))
    assert_same_bits(found, with_gradients(fused, inputs))


@pytest.mark.parametrize(("dim", "heads"), WIDTHS)
def test_norms_and_positions(dim: int, heads: int) -> None:
    from mirai_kernels.qk_norm_rope_cache.op import qk_norm_rope, qk_norm_rope_cache

    placement = Placement(GRID, 18)
    q, k, v = (normal(seed, 2, TOKENS, dim) for seed in (1, 2, 3))
    weights = 1 + 0.2 * normal(4, dim), 1 + 0.2 * normal(5, dim)
    norm = RmsNorm(dim)

    def plain(q: Tensor, k: Tensor, *weights: Tensor) -> list[Tensor]:
        places = PLAIN.place(token_ops.Placement(GRID, 18), dim // heads, q)
        normed = [
            torch.func.functional_call(norm, {"weight": weight}, (x,)).unflatten(-1, (heads, -1))
            for x, weight in zip((q, k), weights, strict=True)
        ]
        return [rotate(each, places) for each in normed]

    assert_no_worse(
        lambda q, k, *w: qk_norm_rope(q, k, (w[0], w[1]), heads, placement),
        plain,
        lambda *each: [reference.norm_rope(x, w, heads, placement) for x, w in zip(each[:2], each[2:], strict=True)],
        (q, k, *weights),
    )
    store = torch.full((2, 2, 3 * TOKENS, heads, dim // heads), float("nan"), dtype=q.dtype, device=DEVICE)
    slots = store[0, :, TOKENS : 2 * TOKENS], store[1, :, TOKENS : 2 * TOKENS]
    queries = qk_norm_rope_cache((q, k, v), weights, slots, placement)
    assert_same_bits((queries, slots[0]), qk_norm_rope(q, k, weights, heads, placement))
    assert torch.equal(slots[1].flatten(2), v)
    assert store[:, :, :TOKENS].isnan().all() and store[:, :, 2 * TOKENS :].isnan().all()


@pytest.mark.parametrize(("dim", "heads"), WIDTHS)
def test_residuals_and_modulation(dim: int, heads: int) -> None:
    from mirai_kernels.residual_modulate.op import residual_modulate, residual_modulate_e4m3

    x, y = normal(1, 2, TOKENS, dim), normal(2, 2, TOKENS, dim)
    gate, scale, shift = (0.3 * normal(3, 2, GRID[0], 3, dim)).unbind(dim=2)

    def plain(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
        x = PLAIN.added(x, y, gate)
        return [x, PLAIN.modulated(x, scale, shift)]

    inputs = (x, y, gate, scale, shift)
    assert_no_worse(residual_modulate, plain, residual_reference.residual_modulate, inputs)
    _, exact = residual_reference.residual_modulate(*(each.double() for each in inputs))
    _, out, row_scale = residual_modulate_e4m3(*inputs)
    best, best_scale = residual_reference.row_scaled(exact)
    assert relative(out.float() * row_scale, exact) <= OWN_ERROR * relative(best.double() * best_scale, exact)


def test_the_head_and_its_targets() -> None:
    from mirai_kernels.cosine_head.op import cosine_head, fuse_targets

    features = normal(1, 2, 2 * TOKENS, 5120)
    exact = cosine_reference.fuse_targets(features.double(), 2, (0, 1))
    target = fuse_targets(features, 2, (0, 1))
    rounded = cosine_reference.fuse_targets(features, 2, (0, 1))
    assert relative(target, exact) <= OWN_ERROR * relative(rounded, exact)
    target = target[:, 0]
    weight = 0.02 * normal(2, 5120, 1536)
    hidden = normal(3, 2, TOKENS, 1536) + 0.5 * target @ weight

    def plain(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        projected = functional.linear(hidden, weight).float()
        return [functional.cosine_similarity(projected, target.float(), dim=-1).mean()]

    assert_no_worse(
        lambda h, w: [cosine_head(h, w, target)],
        plain,
        lambda h, w: [cosine_reference.cosine_head(h, w, target.double())],
        (hidden, weight),
        good_enough=1e-4,  # the mean of thousands of cosines, whose roundings cancel by chance
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with_gradients(lambda h, w: [cosine_head(h, w, target)], (hidden, weight))
    peak = torch.cuda.max_memory_allocated() - before
    print(f"peak {peak / 1e6:.0f} MB")
    assert peak < 2 * TOKENS * 5120 * 4  # of one float32 tensor of all projected features


@pytest.mark.parametrize(("dim", "heads"), WIDTHS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_run_would_take_the_kernels(dim: int, heads: int, dtype: torch.dtype) -> None:
    assert largest_error(load(), dim, heads, torch.device(DEVICE), dtype) <= BOUNDS[dtype]
