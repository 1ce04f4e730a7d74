"""The predictor, its head and its replay by fused kernels and our attention, against plain torch in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirai_dist.attention.patterns import TORCH, by_dense
from mirai_dist.config import load as load_recipe
from mirai_dist.cycle import comparing
from mirai_dist.cycle.fusing import BOUNDS
from mirai_dist.method.foresight import PRESETS, Comparison, foresight_loss, plain
from mirai_dist.method.replay import ReplayCache, ReplayStep
from mirai_dist.models.predictor import Predictor
from mirai_dist.models.wan.token_ops import PLAIN, TokenOps, load
from mirai_dist.plan import memory
from mirai_dist.plan.shapes import frame_tokens
from mirai_kernels.chunk_attention.op import chunk_attention
from mirai_kernels.cosine_head import op
from tests.kernel_cases import assert_close, drawn
from tests.procs import tiny
from tests.tiny_wan import fill

PAPER = PRESETS["paper"]
BOUND = 3e-6  # relative: blocks of float32 products and attention
HEAD_BOUND = 1e-6
DIM, WIDTH, SEGMENTS, TOKENS = 32, 24, 3, 3


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return chunk_attention(q, (k, v))[0]


def predictor(gated: bool = False, answers: int = 1, blocks: int = 2, ops: TokenOps = PLAIN) -> Predictor:
    """In float64 if it is the plain one, else in float32 and with our attention."""
    backends = TORCH if ops is PLAIN else by_dense(attend)
    network = Predictor(DIM, answers * WIDTH, heads=2, blocks=blocks, gated=gated, backends=backends, ops=ops)
    fill(network, 1)
    return network.double() if ops is PLAIN else network


def states_and_targets(answers: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Of two samples; each answer but the first has a target for one segment less."""
    targets = [drawn(2 + k, 2, SEGMENTS - k, TOKENS, WIDTH) for k in range(answers)]
    return drawn(1, 2, SEGMENTS, TOKENS, DIM), targets


def results(network: Predictor, comparison: Comparison, states: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
    """Loss, and its gradients by the states, by the blocks and by the projection."""
    wide = network.projection.weight.dtype
    leaf = states.to(wide).requires_grad_()
    loss, _ = foresight_loss(network, leaf, [each.to(wide) for each in targets], comparison)
    by_states, *rest = torch.autograd.grad(loss, [leaf, *network.parameters()])
    by_projection = rest.pop()
    blocks = [torch.cat([each.flatten() for each in rest])] if rest else []
    return [loss.detach(), by_states, by_projection, *blocks]


@pytest.mark.parametrize(("gated", "answers"), [(False, 2), (True, 1)])
def test_a_predictor_of_fused_kernels_is_the_plain_one(gated: bool, answers: int) -> None:
    given = states_and_targets(answers)
    exact = results(predictor(gated, answers), plain(PAPER), *given)
    fused = predictor(gated, answers, ops=load())
    assert_close(results(fused, comparing.load(PAPER), *given), exact, BOUND)


@pytest.mark.parametrize("answers", [1, 3])
def test_a_head_alone_is_exact(answers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "CHUNK", 5)  # answers are projected in several pieces, the last one smaller
    given = states_and_targets(answers)
    exact = results(predictor(answers=answers, blocks=0), plain(PAPER), *given)
    fused = predictor(answers=answers, blocks=0, ops=load())
    assert_close(results(fused, comparing.load(PAPER), *given), exact, HEAD_BOUND)


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(each.alias_info for each in func._schema.returns)
        made = [] if is_view else [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        self.elements = max([self.elements, *(each.numel() for each in made)])
        return out


def test_predictions_of_all_tokens_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward; plain torch holds them."""
    monkeypatch.setattr(op, "CHUNK", 4)
    states = drawn(1, 2, SEGMENTS, 50, 8)
    targets = [drawn(2, 2, SEGMENTS, 50, WIDTH)]
    network = Predictor(8, WIDTH, heads=2, blocks=0, gated=False)
    found = {}
    for name, comparison in (("plain", plain(PAPER)), ("fused", comparing.load(PAPER))):
        with Largest() as largest:
            results(network, comparison, states, targets)
        found[name] = largest.elements
    rows = 2 * SEGMENTS * 50
    assert found == {"plain": rows * WIDTH, "fused": rows * 8}  # what it reads


def test_targets_are_unit_vectors_in_the_features_dtype() -> None:
    features = drawn(1, 2, SEGMENTS * TOKENS, WIDTH, dtype=torch.bfloat16)
    exact = plain(PAPER).fuse(features.double(), SEGMENTS, [0, 1])
    found = comparing.load(PAPER).fuse(features, SEGMENTS, [0, 1])
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    assert_close([found], [exact / exact.norm(dim=-1, keepdim=True)], 8e-3)


def test_the_planner_knows_what_the_replay_cache_holds() -> None:
    recipe = load_recipe(tiny.RECIPE, ("parallel.compute_dtype=bfloat16",)).recipe
    video, dtype = recipe.video, torch.bfloat16
    segments, tokens = video.latent_frames // video.frames_per_segment, video.frames_per_segment * frame_tokens(recipe)
    features = drawn(1, 1, segments * tokens, recipe.teacher.dim, dtype=dtype)
    for kernels, comparison in (("reference", plain(PAPER)), ("fused", comparing.load(PAPER))):
        cache = ReplayCache(torch.device("cpu"))
        states = drawn(2, 1, segments, tokens, recipe.generator.dim, dtype=dtype)
        cache.store([0], states, comparison.fuse(features, segments, recipe.foresight.offsets))
        planned = replace(recipe, parallel=replace(recipe.parallel, kernels=kernels))
        assert cache.states[0].nbytes + cache.targets[0].nbytes == memory.replay_pair(planned)


def test_what_a_run_measures_before_it_uses_the_head() -> None:
    cpu, exact = torch.device("cpu"), comparing.load(PAPER)
    for dtype in (torch.float32, torch.bfloat16):
        assert comparing.largest_error(exact, (32, 48), cpu, dtype) <= BOUNDS[dtype]
    wrong = [
        Comparison(PAPER, lambda x, segments, offsets: exact.fuse(x, segments, [0]), exact.cosine),
        Comparison(PAPER, exact.fuse, lambda h, w, t: exact.cosine(h, w, t + 0.1)),
        Comparison(PAPER, exact.fuse, lambda h, w, t: exact.cosine(h.detach() + 0 * h, w, t)),
    ]
    for each in wrong:
        assert not comparing.largest_error(each, (32, 48), cpu, torch.float32) <= 1e-2


def test_a_replay_step_of_the_predictors_forward() -> None:
    states, (targets,) = states_and_targets()
    network = predictor(blocks=3)
    expected = results(network, plain(PAPER), states, [targets])
    fused, comparison = predictor(blocks=3, ops=load()), comparing.load(PAPER)
    step = ReplayStep(
        lambda states, targets: fused(states, [targets], comparison.cosine), list(fused.parameters()), states, targets
    )
    step()
    *blocks, projection = step.gradients
    found = [1 - step.cosine, projection, torch.cat([each.flatten() for each in blocks])]
    assert_close(found, [expected[0], *expected[2:]], BOUND)
