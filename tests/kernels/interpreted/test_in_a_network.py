"""A network whose norms, positions and gates are the fused kernels equals the plain one, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mirai_dist.attention.patterns import TORCH
from mirai_dist.cycle.fusing import largest_error
from mirai_dist.models.wan import Clean, History, WanModel
from mirai_dist.models.wan.token_ops import PLAIN, TokenOps, load
from mirai_dist.parallel.recompute import recompute
from tests import tiny_wan
from tests.kernel_cases import BOUNDS, drawn

SHAPE = tiny_wan.SHAPE._replace(blocks=1)
BOUND = 3e-6  # relative, against float64: a block of float32 matrix products and attention by itself comes to 1e-6


def outputs_and_gradients(ops: TokenOps, kind: str, dtype: torch.dtype) -> list[Tensor]:
    network = WanModel(SHAPE, TORCH, ops)
    tiny_wan.fill(network, 0)
    network.to(dtype)
    frames = 2 if kind == "bidirectional" else 1
    latent, text = tiny_wan.latents(1, 1, frames, dtype), tiny_wan.prompts(2, 1, dtype)
    time = torch.full((1, frames), 500.0, dtype=dtype)
    size = (1, tiny_wan.TOKENS, SHAPE.heads, SHAPE.dim // SHAPE.heads)
    past = drawn(3, *size, dtype=dtype), drawn(4, *size, dtype=dtype)
    options = {
        "bidirectional": {},
        "teacher forced": {"clean": Clean(tiny_wan.latents(5, 1, frames, dtype)), "segment_frames": 1},
        "with a history": {"history": History(tiny_wan.held((past,)), first_frame=9)},
    }[kind]
    if kind == "with a history":
        recompute(network, ["blocks.0"])
    found = network(latent, time, text, **options)
    assert found.velocity is not None
    given = [found.velocity, *(found.keys_values[0] if found.keys_values else ())]
    loss = sum((each * torch.linspace(-1, 1, each.numel(), dtype=dtype).view_as(each)).sum() for each in given)
    assert isinstance(loss, Tensor)
    return [*given, *torch.autograd.grad(loss, tuple(network.parameters()), materialize_grads=True)]


@pytest.mark.parametrize("kind", ["bidirectional", "teacher forced", "with a history"])
def test_a_network_of_fused_kernels_is_the_plain_one(kind: str) -> None:
    exact = outputs_and_gradients(PLAIN, kind, torch.float64)
    found = outputs_and_gradients(load(), kind, torch.float32)
    for mine, other in zip(found, exact, strict=True):
        assert (mine.double() - other).norm() <= BOUND * other.norm().clamp_min(1e-2 * other.numel() ** 0.5)


def test_what_a_run_measures_before_it_uses_the_kernels() -> None:
    fused = load()
    assert largest_error(fused, 40, 2, torch.device("cpu"), torch.float32) <= BOUNDS[torch.float32]
    wrong = replace(fused, residual_modulate=lambda x, *rest: fused.residual_modulate(x + 0.1, *rest))
    assert largest_error(wrong, 40, 2, torch.device("cpu"), torch.float32) > 1e-2
