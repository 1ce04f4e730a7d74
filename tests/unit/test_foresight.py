"""Foresight: fused targets by hand, which networks the gradient reaches, and both published arithmetics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mirai_dist.cycle.roles import causal, features_of
from mirai_dist.method.dmd import dmd_loss
from mirai_dist.method.foresight import (
    PRESETS,
    captured_blocks,
    cosine,
    foresight_loss,
    fuse_targets,
    plain,
    supervised_segments,
)
from mirai_dist.method.rollout import RolloutInputs, RolloutSettings, rollout
from mirai_dist.models.predictor import Predictor
from mirai_dist.models.wan import KVCache, WanModel
from mirai_dist.models.wan.kv_cache import CacheShape
from tests.tiny_wan import (
    SHAPE,
    TOKENS,
    fill,
    generator,
    gradients,
    latents,
    linear_predictor,
    predicted,
    prompts,
    wan,
)

PAPER, RELEASE = PRESETS["paper"], PRESETS["release"]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


# --- targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offsets", "averaged"),
    [
        ((0,), [[0], [1], [2], [3]]),
        ((1,), [[1], [2], [3]]),
        ((0, 1), [[0, 1], [1, 2], [2, 3], [3]]),
        ((0, 1, 2), [[0, 1, 2], [1, 2, 3], [2, 3], [3]]),
        ((2, 0), [[0, 2], [1, 3], [2], [3]]),
        ((1, 3), [[1, 3], [2], [3]]),
    ],
)
@pytest.mark.parametrize("frames_per_segment", [1, 3])
def test_targets_by_hand(offsets: tuple[int, ...], averaged: list[list[int]], frames_per_segment: int) -> None:
    """Token s of a segment is averaged with the tokens at the same frame in the segment and the same place."""
    tokens = frames_per_segment * TOKENS
    features = normal(1, 2, 4 * tokens, 5)
    targets = fuse_targets(features, 4, offsets, PAPER)
    assert targets.shape == (2, len(averaged), tokens, 5)
    assert supervised_segments(4, offsets) == list(range(len(averaged)))
    for i, segments in enumerate(averaged):
        for s in (0, 1, tokens - 1):
            expected = sum(features[:, j * tokens + s] for j in segments) / len(segments)
            torch.testing.assert_close(targets[:, i, s], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("offsets", "terms", "pairs"), [((0, 1), 7, 13), ((1,), 6, 6), ((0, 1, 2), 7, 18)])
def test_terms_of_the_real_rollout(offsets: tuple[int, ...], terms: int, pairs: int) -> None:
    supervised = supervised_segments(7, offsets)
    assert len(supervised) == terms
    assert sum(i + k < 7 for i in supervised for k in offsets) == pairs
    features = normal(1, 1, 7 * 2, 5)
    targets = fuse_targets(features, 7, offsets, PAPER)
    assert targets.shape[1] == terms
    if 0 in offsets:
        assert torch.equal(targets[:, -1], features[:, -2:])  # the last segment has its own features alone


def test_a_one_segment_rollout_has_no_later_target() -> None:
    assert supervised_segments(1, (1,)) == []
    assert torch.equal(fuse_targets(normal(1, 1, 4, 5), 1, (0, 1), PAPER)[:, 0], normal(1, 1, 4, 5))


def test_targets_have_no_graph() -> None:
    assert not fuse_targets(normal(1, 1, 4, 5).requires_grad_(), 2, (0, 1), PAPER).requires_grad


# --- the loss ------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_segments_of_token_cosines() -> None:
    states, targets, matrix = normal(1, 2, 3, 4, 6), normal(2, 2, 3, 4, 5), normal(3, 6, 5)
    predictor = linear_predictor(matrix)
    loss, similarity = foresight_loss(predictor, states, [targets], plain(PAPER))
    a_segment = [cosine_similarity(states[:, i] @ matrix, targets[:, i], dim=-1).mean() for i in range(3)]
    expected = sum(a_segment) / 3
    assert similarity.item() == pytest.approx(float(expected), abs=1e-14)
    assert loss.item() == pytest.approx(1 - float(expected), abs=1e-14)
    assert foresight_loss(predictor, states, [targets], plain(RELEASE))[0].item() == pytest.approx(-float(expected))


def test_lengths_do_not_matter_and_perfect_prediction_costs_nothing() -> None:
    targets = normal(2, 2, 3, 4, 5)
    sevenfold = linear_predictor(7 * torch.eye(5, dtype=torch.float64))
    loss, similarity = foresight_loss(sevenfold, targets, [0.01 * targets], plain(PAPER))
    assert (loss.item(), similarity.item()) == (pytest.approx(0, abs=1e-14), pytest.approx(1, abs=1e-14))


def test_precision_of_the_two_arithmetics() -> None:
    features = normal(1, 1, 8, 5, dtype=torch.bfloat16)
    wide, narrow = (fuse_targets(features, 2, (0, 1), each) for each in (PAPER, RELEASE))
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    exact = (features[:, :4].double() + features[:, 4:].double()) / 2
    torch.testing.assert_close(wide[:, 0].double(), exact, rtol=1e-6, atol=0)
    assert not torch.equal(narrow[:, 0].double(), exact)
    assert cosine(features, features, PAPER).dtype == torch.float32
    assert cosine(features, features.float(), RELEASE).dtype == torch.bfloat16


# --- the predictor's view ------------------------------------------------------------------------------------


def test_a_prediction_does_not_see_other_segments() -> None:
    predictor = Predictor(8, 6, heads=2, blocks=2, gated=False)
    fill(predictor, 1)
    states = normal(2, 2, 3, 4, 8, dtype=torch.float32)
    changed = states.clone()
    changed[0, 1] += 1
    before, after = (predicted(predictor, each).detach() for each in (states, changed))
    same = [[torch.equal(before[b, i], after[b, i]) for i in range(3)] for b in range(2)]
    assert same == [[True, False, True], [True, True, True]]
    # inside a segment every token is seen
    assert (before[0, 1] != after[0, 1]).any(dim=-1).all()


# --- presets -------------------------------------------------------------------------------------------------


def test_presets_are_those_of_the_paper_and_of_the_release() -> None:
    assert [captured_blocks(blocks, 0.5, PAPER) for blocks in (30, 40)] == [15, 20]
    assert [captured_blocks(blocks, 0.5, RELEASE) for blocks in (30, 40)] == [16, 21]
    assert (PAPER.constant, RELEASE.constant) == (1.0, 0.0)
    assert (PAPER.gated_predictor, RELEASE.gated_predictor) == (False, True)
    assert (PAPER.bf16_predictor, RELEASE.bf16_predictor) == (False, True)
    assert (PAPER.replay_after_generator, RELEASE.replay_after_generator) == (True, False)


@pytest.mark.parametrize(("depth", "blocks"), [(1.0, 4), (0.25, 1), (0.05, 1)])
def test_captured_blocks_stay_inside_the_network(depth: float, blocks: int) -> None:
    assert captured_blocks(4, depth, PAPER) == blocks
    assert captured_blocks(4, 1.0, RELEASE) == 4


# --- with the networks ---------------------------------------------------------------------------------------


class Step(nn.Module):
    """One generator step of a tiny world: rollout, a DMD loss with a given gradient, foresight."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.encoder = wan(1), wan(2, shape=SHAPE._replace(dim=80))
        self.predictor = Predictor(SHAPE.dim, 80, SHAPE.heads, 2, gated=False).double()
        fill(self.predictor, 3)

    def rollout(self) -> tuple[Tensor, list[Tensor]]:
        noise = torch.stack([latents(10 + i, 1, 6) for i in range(3)])
        shape = CacheShape(SHAPE.blocks, 1, 4, 2, TOKENS, SHAPE.heads, SHAPE.dim // SHAPE.heads)
        cache = KVCache(shape, torch.device("cpu"), torch.float64)
        settings = RolloutSettings((1000.0, 625.0), 2)
        return rollout(causal(self.generator), settings, RolloutInputs(noise, prompts(2, 1), 1, capture=2), cache)

    def dmd(self, video: Tensor) -> Tensor:
        return dmd_loss(video, normal(7, *video.shape))

    def foresight(self, video: Tensor, states: list[Tensor]) -> Tensor:
        features = features_of(self.encoder, 2, 0)(video.detach(), prompts(2, 1))
        targets = fuse_targets(features, 3, (0, 1), PAPER)
        return foresight_loss(self.predictor, torch.stack(states, dim=1), [targets], plain(PAPER))[0]


def test_gradient_reaches_the_first_blocks_the_predictor_and_nothing_else() -> None:
    step = Step()
    video, states = step.rollout()
    assert len(states) == 3 and states[0].shape == (1, 2 * TOKENS, SHAPE.dim)
    step.foresight(video, states).backward()
    reached = {name for name, gradient in gradients(step.generator).items() if gradient.any()}
    untouched = {name for name, _ in step.generator.named_parameters()} - reached
    assert untouched == {name for name, _ in step.generator.named_parameters() if name.startswith(("blocks.2", "head"))}
    assert all(gradient.any() for name, gradient in gradients(step.predictor).items() if not name.endswith(".k.bias"))
    assert all(parameter.grad is None for parameter in step.encoder.parameters())


def test_weight_zero_changes_no_bit_of_the_gradient() -> None:
    alone, both = Step(), Step()
    alone.dmd(alone.rollout()[0]).backward()
    video, states = both.rollout()
    (both.dmd(video) + 0.0 * both.foresight(video, states)).backward()
    expected, found = gradients(alone.generator), gradients(both.generator)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(gradient.any() for gradient in expected.values())


@pytest.mark.parametrize("segment_frames", [0, 2])
def test_the_encoder_sees_the_future_unless_it_is_the_causal_control(segment_frames: int) -> None:
    encoder: WanModel = wan(2)
    encode = features_of(encoder, 2, segment_frames)
    video = latents(1, 1, 6)
    changed = video.clone()
    changed[:, 4:] += 1
    before, after = (encode(each, prompts(2, 1)).unflatten(1, (6, -1)) for each in (video, changed))
    assert torch.equal(before[:, :4], after[:, :4]) == bool(segment_frames)
    assert (before[:, 4:] - after[:, 4:]).abs().amax(dim=(0, 2, 3)).min() > 1e-4


@torch.no_grad()
def test_the_encoder_reads_at_timestep_zero_and_stops_early() -> None:
    encoder = wan(2)
    ran: list[str] = []
    for name in ("blocks.1", "blocks.2", "head"):
        encoder.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    video, text = latents(1, 1, 2), prompts(2, 1)
    seen: list[Tensor] = []
    encoder.time_embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    features = features_of(encoder, 2, 0)(video, text)
    assert features.shape == (1, 2 * TOKENS, SHAPE.dim)
    assert ran == ["blocks.1"]
    half = SHAPE.freq_dim // 2
    assert (seen[0][..., :half] == 1).all() and (seen[0][..., half:] == 0).all()


def test_presets_differ_in_nothing_a_gradient_would_show() -> None:
    """-cos and 1 - cos have the same gradient."""
    states, targets, predictor = normal(1, 2, 3, 4, 6), normal(2, 2, 3, 4, 5), linear_predictor(normal(3, 6, 5))
    found = []
    for arithmetic in (PAPER, replace(PAPER, constant=0.0)):
        loss, _ = foresight_loss(predictor, states, [targets], plain(arithmetic))
        found.append(torch.autograd.grad(loss, predictor.projection.weight)[0])
    assert torch.equal(*found)
