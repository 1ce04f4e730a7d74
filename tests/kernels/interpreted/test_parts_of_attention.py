"""Attention joined of parts by the kernels, as runs choose it, and a rollout that writes and reads its cache so."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mirai_dist.attention import sdpa, split
from mirai_dist.attention.patterns import TORCH, Backends
from mirai_dist.attention.probe import Need, probe_behind, probe_segments
from mirai_dist.cycle.roles import causal
from mirai_dist.method.rollout import RolloutInputs, RolloutSettings, rollout
from mirai_dist.models.wan import KVCache, WanModel
from mirai_dist.models.wan.kv_cache import CacheShape
from mirai_dist.models.wan.token_ops import PLAIN, TokenOps, load
from mirai_dist.parallel.recompute import recompute
from tests import tiny_wan

CPU = torch.device("cpu")
NEED = Need("cpu", torch.float32, (20,))
SHAPE = tiny_wan.SHAPE._replace(blocks=1)
FRAMES, LENGTH = 3, 1
BOUND = 3e-6  # relative, against float64


def test_parts_are_exact() -> None:
    assert probe_behind(split.load_behind(sdpa.dense, "cpu"), NEED) == ""
    assert probe_segments(split.load_prefix("cpu"), NEED) == ""


def rolled(backends: Backends, ops: TokenOps, dtype: torch.dtype) -> list[Tensor]:
    """Latents, states, what the cache holds, and gradients of a rollout of three segments."""
    network = WanModel(SHAPE, backends, ops)
    tiny_wan.fill(network, 0)
    network.to(dtype)
    recompute(network, [f"blocks.{i}" for i in range(SHAPE.blocks)])
    noise = torch.stack([tiny_wan.latents(10 + i, 1, FRAMES, dtype) for i in range(3)])
    inputs = RolloutInputs(noise, tiny_wan.prompts(2, 1, dtype), exit_step=1, capture=1)
    shape = CacheShape(SHAPE.blocks, 1, FRAMES - LENGTH, LENGTH, tiny_wan.TOKENS, 2, 20, sink=1, window=1)
    cache = KVCache(shape, CPU, dtype)
    cache._store.fill_(float("nan"))
    video, states = rollout(causal(network), RolloutSettings((1000.0, 625.0), LENGTH, 50.0), inputs, cache)
    towards = tiny_wan.latents(5, 1, FRAMES, dtype)
    found = torch.autograd.grad((video * towards).sum(), tuple(network.parameters()), materialize_grads=True)
    kept = [part for view in cache.view() for part in view.together(None)]
    return [video.detach(), *(state.detach() for state in states), *kept, *found]


def test_a_rollout_by_the_kernels_is_the_plain_one() -> None:
    """A window of one past frame, which is a sink: the second segment sees it as it is, the third turned."""
    by_kernels = replace(TORCH, behind=split.load_behind(sdpa.dense, "cpu"))
    exact = rolled(TORCH, PLAIN, torch.float64)
    found = rolled(by_kernels, load(), torch.float32)
    for mine, other in zip(found, exact, strict=True):
        assert (mine.double() - other).norm() <= BOUND * other.norm().clamp_min(1e-2 * other.numel() ** 0.5)
