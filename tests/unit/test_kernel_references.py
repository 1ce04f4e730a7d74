"""Fused operators are held to what the networks compute: their references against the models, in float64."""

from __future__ import annotations

import pytest
import torch

from mirai_dist.method import foresight
from mirai_dist.models.wan.kv_cache import turned
from mirai_dist.models.wan.model import RmsNorm
from mirai_dist.models.wan.rope import axis_widths, rotary_table, rotate
from mirai_dist.models.wan.token_ops import layer_norm, modulate, per_frame
from mirai_kernels.cosine_head.reference import fuse_targets
from mirai_kernels.qk_norm_rope_cache import reference
from mirai_kernels.qk_norm_rope_cache.reference import Placement
from mirai_kernels.residual_modulate.reference import residual_modulate
from tests.kernel_cases import drawn

GRID = (3, 4, 5)


@pytest.mark.parametrize("head_dim", [12, 20, 128])
@pytest.mark.parametrize("first_frame", [0, 9])
def test_norm_rope_is_the_normalisation_and_rotation_of_the_network(head_dim: int, first_frame: int) -> None:
    heads = 2
    assert reference.axis_widths(head_dim) == axis_widths(head_dim)
    x = drawn(0, 2, 60, heads * head_dim, dtype=torch.float64)
    norm = RmsNorm(heads * head_dim).double()
    torch.nn.init.normal_(norm.weight)
    table = rotary_table(GRID, first_frame, head_dim, x.device, torch.float64)
    expected = rotate(norm(x).unflatten(-1, (heads, -1)), table)
    found = reference.norm_rope(x, norm.weight, heads, Placement(GRID, first_frame))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_keys_read_at_another_frame_are_the_keys_that_the_cache_turns() -> None:
    keys = drawn(1, 1, 60, 2 * 24, dtype=torch.float64)
    written = reference.norm_rope(keys, None, 2, Placement(GRID, 0))
    read_later = reference.norm_rope(keys, None, 2, Placement(GRID, 7))
    torch.testing.assert_close(read_later, turned(written, 7), rtol=0, atol=1e-13)


@pytest.mark.parametrize("frames", [1, 3])
def test_residual_modulate_is_gate_residual_norm_and_modulation_of_the_network(frames: int) -> None:
    x, y = (drawn(seed, 2, 15, 24, dtype=torch.float64) for seed in (0, 1))
    gate, scale, shift = drawn(2, 2, frames, 3, 24, dtype=torch.float64).unbind(dim=2)
    residual, modulated = residual_modulate(x, y, gate, scale, shift)
    expected = x + per_frame(y, gate)
    torch.testing.assert_close(residual, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(modulated, modulate(layer_norm(expected), shift, scale), rtol=0, atol=1e-13)


@pytest.mark.parametrize("offsets", [(0, 1), (1,), (2, 0, 5)])
def test_fused_targets_point_where_those_of_foresight_point(offsets: tuple[int, ...]) -> None:
    features = drawn(0, 2, 4 * 3, 7, dtype=torch.float64)
    expected = foresight.fuse_targets(features, 4, offsets, foresight.PRESETS["paper"])
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(fuse_targets(features, 4, offsets), expected, rtol=0, atol=1e-14)
