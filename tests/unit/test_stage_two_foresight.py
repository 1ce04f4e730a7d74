"""Foresight on the ground-truth future: every fusion against a plain loop over segments, offsets, frames and places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mirai_dist.cycle.roles import features_of
from mirai_dist.method.foresight import PRESETS, foresight_loss, fuse_targets, plain
from mirai_dist.method.ode import OdePairs, ode_loss
from mirai_dist.method.stage_two_foresight import (
    FUSIONS,
    Clip,
    ground_truth_targets,
    outputs_of_predictor,
    segment_states,
)
from mirai_dist.models.predictor import Predictor
from mirai_dist.models.wan import Capture, Clean
from tests.tiny_wan import SHAPE, fill, generator, gradients, latents, linear_predictor, prompts, wan

PAPER, RELEASE = plain(PRESETS["paper"]), plain(PRESETS["release"])
CLIP, PLACES, BATCH, DIM, WIDTH = Clip(segments=4, frames=3), 5, 2, 6, 7
OFFSETS = [(0, 1), (1,), (0, 2), (2, 0, 1), (0, 5)]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def video(seed: int, width: int, clip: Clip = CLIP) -> Tensor:
    """Tokens of a video, [BATCH, segments, frames, PLACES, width]."""
    return normal(seed, BATCH, clip.segments, clip.frames, PLACES, width)


def cosine_of(one: Tensor, other: Tensor) -> float:
    return (one @ other / (one.norm() * other.norm())).item()


def by_loops(features: Tensor, states: Tensor, matrix: Tensor, offsets: tuple[int, ...], fusion: str) -> float:
    """Mean cosine by loops; matrix [DIM, answers * WIDTH] is the predictor."""
    terms = []
    segments, frames = features.shape[1:3]

    def answer(state: Tensor, which: int) -> Tensor:
        return (state @ matrix)[which * WIDTH : (which + 1) * WIDTH]

    for i in range(segments):
        ahead = [(which, k) for which, k in enumerate(offsets) if i + k < segments]
        asked = ahead[:1] if fusion == "offsets" else ahead
        for which, k in asked:
            pair = []
            for b in range(BATCH):
                for place in range(PLACES):
                    if fusion == "frames":
                        state = mean([states[b, i, f, place] for f in range(frames)])
                        target = mean([features[b, i + k, f, place] for f in range(frames)])
                        pair.append(cosine_of(answer(state, which), target))
                        continue
                    for f in range(frames):
                        target = features[b, i + k, f, place]
                        if fusion == "offsets":
                            target = mean([features[b, i + other, f, place] for _, other in ahead])
                        pair.append(
                            cosine_of(answer(states[b, i, f, place], 0 if fusion == "offsets" else which), target)
                        )
            terms.append(sum(pair) / len(pair))
    return sum(terms) / len(terms)


def mean(each: list[Tensor]) -> Tensor:
    return torch.stack(each).mean(0)


def flat(tokens: Tensor) -> Tensor:
    return tokens.flatten(1, 3)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("clip", [CLIP, Clip(3, 1)])
def test_fusions_against_a_plain_loop(fusion: str, offsets: tuple[int, ...], clip: Clip) -> None:
    features, states = video(1, WIDTH, clip), video(2, DIM, clip)
    matrix = normal(3, DIM, outputs_of_predictor(fusion, offsets) * WIDTH)
    targets = ground_truth_targets(flat(features), clip, offsets, fusion, PAPER)
    read = segment_states(flat(states), clip, offsets, fusion)
    loss, similarity = foresight_loss(linear_predictor(matrix), read, targets, PAPER)
    assert similarity.item() == pytest.approx(by_loops(features, states, matrix, offsets, fusion), abs=1e-12)
    assert loss.item() == pytest.approx(1 - similarity.item(), abs=1e-14)
    released = foresight_loss(linear_predictor(matrix), read, targets, RELEASE)[0]
    assert released.item() == pytest.approx(-similarity.item())


def test_shapes_of_each_fusion() -> None:
    features, states = flat(video(1, WIDTH)), flat(video(2, DIM))

    def shapes(fusion: str, offsets: tuple[int, ...]) -> list[tuple[int, ...]]:
        targets = ground_truth_targets(features, CLIP, offsets, fusion, PAPER)
        assert len(targets) == outputs_of_predictor(fusion, offsets)
        return [tuple(each.shape[1:3]) for each in (segment_states(states, CLIP, offsets, fusion), *targets)]

    assert shapes("none", (0, 1)) == [(4, 15), (4, 15), (3, 15)]
    assert shapes("frames", (1, 2)) == [(3, 5), (3, 5), (2, 5)]
    assert shapes("offsets", (1, 2)) == [(3, 15), (3, 15)]


def test_fusing_offsets_is_the_foresight_of_dmd() -> None:
    features = flat(video(1, WIDTH))
    (targets,) = ground_truth_targets(features, CLIP, (0, 1), "offsets", PAPER)
    assert torch.equal(targets, fuse_targets(features, CLIP.segments, (0, 1), PAPER.arithmetic))


def test_one_frame_a_segment_has_nothing_to_average() -> None:
    clip, matrix = Clip(3, 1), normal(3, DIM, 2 * WIDTH)
    features, states = flat(video(1, WIDTH, clip)), flat(video(2, DIM, clip))
    losses = [
        foresight_loss(
            linear_predictor(matrix),
            segment_states(states, clip, (0, 1), fusion),
            ground_truth_targets(features, clip, (0, 1), fusion, PAPER),
            PAPER,
        )[0].item()
        for fusion in ("none", "frames")
    ]
    assert losses[0] == losses[1]


def test_targets_have_no_graph_and_the_dtype_of_the_arithmetic() -> None:
    for fusion in FUSIONS:
        targets = ground_truth_targets(flat(video(1, WIDTH)).requires_grad_(), CLIP, (0, 1), fusion, PAPER)
        assert not any(each.requires_grad for each in targets)
        stored = flat(video(1, WIDTH)).bfloat16()
        assert ground_truth_targets(stored, CLIP, (0, 1), fusion, PAPER)[0].dtype == torch.float32
        assert ground_truth_targets(stored, CLIP, (0, 1), fusion, RELEASE)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("fusion", ["per_frame", ""])
def test_unknown_fusions_are_refused(fusion: str) -> None:
    with pytest.raises(ValueError, match="none of none, frames, offsets"):
        ground_truth_targets(flat(video(1, WIDTH)), CLIP, (0, 1), fusion, PAPER)
    with pytest.raises(ValueError, match="none of none, frames, offsets"):
        segment_states(flat(video(1, WIDTH)), CLIP, (0, 1), fusion)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_pass_of_the_student_serves_both_losses(fusion: str) -> None:
    """With the networks: gradient of foresight reaches the first blocks and the predictor, never the encoder, and the
    target of a segment is the future of the ground truth."""
    student, encoder, clip, offsets = wan(1), wan(2, shape=SHAPE._replace(dim=80)), Clip(3, 2), (1,)
    predictor = Predictor(SHAPE.dim, 80 * outputs_of_predictor(fusion, offsets), SHAPE.heads, 1, gated=False).double()
    fill(predictor, 3)
    states = torch.stack([latents(20 + i, 1, 6) for i in range(4)], dim=1)

    def forced(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        output = student(latent, timesteps, text, clean=Clean(clean), segment_frames=clip.frames, capture=Capture(2))
        return output.velocity, output.hidden

    _, hidden = ode_loss(forced, OdePairs(states, (1000.0, 833.0)), torch.tensor([1]), prompts(2, 1))
    assert hidden is not None
    features = features_of(encoder, 2, 0)(states[:, -1], prompts(2, 1))
    targets = ground_truth_targets(features, clip, offsets, fusion, PAPER)
    loss, _ = foresight_loss(predictor, segment_states(hidden, clip, offsets, fusion), targets, PAPER)
    loss.backward()
    reached = {name for name, gradient in gradients(student).items() if gradient.any()}
    untouched = {name for name, _ in student.named_parameters()} - reached
    assert untouched == {name for name, _ in student.named_parameters() if name.startswith(("blocks.2", "head"))}
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert predictor.projection.weight.grad is not None and predictor.projection.weight.grad.any()
