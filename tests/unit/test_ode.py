"""Causal ODE distillation: trajectories against a dense integration, and the regression against plain arithmetic."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mirai_dist.cycle.roles import causal
from mirai_dist.method.dmd import Conditioning
from mirai_dist.method.flow import clean_from_velocity, euler_grid, warped_steps
from mirai_dist.method.ode import (
    Integration,
    OdePairs,
    TrajectoryInputs,
    ode_loss,
    recorded_points,
    sample,
    trajectories,
)
from mirai_dist.method.rollout import Past
from mirai_dist.models.wan import Capture, Clean, History, KVCache, WanModel
from mirai_dist.models.wan.kv_cache import CacheShape
from tests.tiny_wan import SHAPE, TOKENS, latents, prompts, wan

STEPS, SHIFT, FRAMES = (1000, 750, 500, 250), 5.0, 6
WARPED = warped_steps(STEPS, SHIFT)


def settings(per_segment: int, points: int = 8, guidance: float = 6.0) -> Integration:
    return Integration(euler_grid(points, SHIFT), recorded_points(STEPS, points), per_segment, guidance)


def cache(batch: int, per_segment: int) -> KVCache:
    sizes = FRAMES - per_segment, per_segment, TOKENS, SHAPE.heads, SHAPE.dim // SHAPE.heads
    shape = CacheShape(SHAPE.blocks, batch, *sizes)
    return KVCache(shape, torch.device("cpu"), torch.float64)


def inputs(batch: int = 2) -> TrajectoryInputs:
    return TrajectoryInputs(
        latents(1, batch, FRAMES), latents(2, batch, FRAMES), Conditioning(prompts(3, batch), prompts(4, 1))
    )


# --- which states are kept -----------------------------------------------------------------------------------


def test_the_published_steps_lie_on_the_published_grid() -> None:
    """At shift 5: 1000, 937.5, 833.33, 625 are points 0, 12, 24, 36 of 48."""
    assert recorded_points(STEPS, 48) == (0, 12, 24, 36)
    grid = euler_grid(48, SHIFT)
    assert tuple(grid[i] for i in recorded_points(STEPS, 48)) == WARPED
    assert (len(grid), grid[0], grid[-1]) == (49, 1000.0, 0.0)


@pytest.mark.parametrize(
    ("steps", "points", "indices"), [((1000,), 1, (0,)), ((1000, 500), 2, (0, 1)), ((800, 200), 25, (5, 20))]
)
def test_other_lists_on_other_grids(steps: tuple[int, ...], points: int, indices: tuple[int, ...]) -> None:
    assert recorded_points(steps, points) == indices
    for shift in (1.0, 8.0):
        grid = euler_grid(points, shift)
        assert [grid[i] for i in indices] == pytest.approx(warped_steps(steps, shift), rel=1e-14)


@pytest.mark.parametrize(("steps", "points", "multiple"), [((1000, 800, 600), 48, 5), ((1000, 999), 48, 1000)])
def test_a_list_off_the_grid_is_refused_with_a_grid_that_fits(
    steps: tuple[int, ...], points: int, multiple: int
) -> None:
    with pytest.raises(ValueError, match=f"Euler grid of 48 points: use a multiple of {multiple}$"):
        recorded_points(steps, points)
    assert recorded_points(steps, multiple)


@pytest.mark.parametrize("steps", [(), (500, 750), (1000, 1000), (1000, 0), (1250, 1000)])
def test_a_list_that_does_not_descend_from_1000_to_1_is_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not descend"):
        recorded_points(steps, 1000)


# --- trajectories --------------------------------------------------------------------------------------------


def dense_states(network: WanModel, made: Integration, given: TrajectoryInputs) -> Tensor:
    """The whole video through the teacher-forced network at every step, each prompt in a call of its own."""
    noise, clean, (text, negative) = given
    x, kept = noise, []
    for i, (now, following) in enumerate(pairwise(made.grid)):
        if i in made.recorded:
            kept.append(x)
        at = torch.full(noise.shape[:2], now, dtype=torch.float64)
        v_pos, v_neg = (
            network(x, at, words, clean=Clean(clean), segment_frames=made.frames_per_segment).velocity
            for words in (text, negative.expand_as(text))
        )
        x = x - (now - following) / 1000 * (v_neg + made.guidance * (v_pos - v_neg))
    return torch.stack([*kept, x, clean], dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("per_segment", "guidance"), [(1, 6.0), (2, 6.0), (3, 1.0), (6, 6.0)])
def test_trajectories_are_those_of_a_dense_integration(per_segment: int, guidance: float) -> None:
    network, made, given = wan(), settings(per_segment, guidance=guidance), inputs()
    states = trajectories(causal(network), made, given, cache(4, per_segment))
    expected = dense_states(network, made, given)
    assert states.shape == (2, 6, FRAMES, SHAPE.channels, *given.noise.shape[-2:])
    torch.testing.assert_close(states, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(states[:, 0], given.noise) and torch.equal(states[:, -1], given.clean)
    assert (states[:, 1:-1] - states[:, :-2]).abs().mean(dim=(0, 2, 3, 4, 5)).min() > 1e-2  # the states do move


@torch.no_grad()
def test_the_published_grid_of_48_steps() -> None:
    network, made, given = wan(), settings(3, points=48), inputs(1)
    states = trajectories(causal(network), made, given, cache(2, 3))
    torch.testing.assert_close(states, dense_states(network, made, given), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_video_does_not_depend_on_its_batch_or_on_an_earlier_video() -> None:
    """Data made in other batches, or after a restart, is the same data."""
    network, made, given = wan(), settings(2), inputs()
    used = cache(2, 2)
    together = trajectories(causal(network), made, given, cache(4, 2))
    for i in (1, 0):
        prompt = Conditioning(given.prompts.text[i : i + 1], given.prompts.negative)
        one = TrajectoryInputs(given.noise[i : i + 1], given.clean[i : i + 1], prompt)
        torch.testing.assert_close(
            trajectories(causal(network), made, one, used)[0], together[i], rtol=1e-11, atol=1e-11
        )


@torch.no_grad()
def test_the_history_is_the_ground_truth_and_the_future_is_unseen() -> None:
    network, made, given = wan(), settings(2), inputs(1)
    before = trajectories(causal(network), made, given, cache(2, 2))[:, :-1]

    def moved(part: str, frame: int) -> list[bool]:
        changed = getattr(given, part).clone()
        changed[:, frame] += 1
        after = trajectories(causal(network), made, given._replace(**{part: changed}), cache(2, 2))[:, :-1]
        return [bool((before[:, -1, f] - after[:, -1, f]).abs().max() > 1e-9) for f in range(FRAMES)]

    assert moved("clean", 2) == [False] * 4 + [True] * 2
    assert moved("noise", 2) == [False] * 2 + [True] * 2 + [False] * 2


class Output(NamedTuple):
    velocity: Tensor
    hidden: None
    keys_values: None
    text_keys_values: Any


class Notes:
    """A network that notes what it is given; its velocity is `slope` times its input's text."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.calls: list[tuple[int, float, bool, int]] = []
        self.context: list[Tensor] = []

    def __call__(self, latent: Tensor, timesteps: Tensor, text: Tensor, past: Past, capture: int) -> Output:
        assert not torch.is_grad_enabled() and len(timesteps) == len(latent) == len(text) == 4
        (held,) = past.held
        seen = sum(held.past[1::2]) - sum(held.past[::2])
        self.calls.append((past.first_frame, timesteps[0].item(), past.text_keys_values is not None, seen))
        if timesteps[0] == 0:
            self.context.append(latent)
        assert [slot.shape for slot, _ in held.slots()] == [(4, latent.shape[1], 1, 1)]
        velocity = text.mean(dim=(1, 2)).view(4, 1, 1, 1, 1).expand_as(latent).to(self.dtype)
        return Output(velocity, None, None, ((text, text),))


def noted(network: Notes, given: TrajectoryInputs, per_segment: int) -> Tensor:
    held = KVCache(CacheShape(1, 4, FRAMES, per_segment, 1, 1, 1), torch.device("cpu"), torch.float64)
    return trajectories(network, settings(per_segment, points=4), given, held)


@pytest.mark.parametrize("per_segment", [2, 3])
def test_passes_of_a_trajectory(per_segment: int) -> None:
    network, given = Notes(), inputs()
    noted(network, given, per_segment)
    expected = []
    for first in range(0, FRAMES, per_segment):
        expected += [(first, now, first > 0 or i > 0, first) for i, now in enumerate(euler_grid(4, SHIFT)[:-1])]
        if first + per_segment < FRAMES:
            expected.append((first, 0.0, True, first))
    assert network.calls == expected
    contexts = torch.cat(network.context, dim=1)  # clean, without noise, for both prompts
    assert torch.equal(contexts, given.clean[:, : FRAMES - per_segment].repeat(2, 1, 1, 1, 1))


def test_guided_states_by_hand() -> None:
    """A velocity that is constant along the way: x(t) = noise - (1 - sigma) v, v = v_neg + 6 (v_pos - v_neg)."""
    text, negative = torch.full((2, 1, 1), 0.5).double(), torch.full((1, 1, 1), 0.25).double()
    given = inputs()._replace(prompts=Conditioning(text, negative))
    states = noted(Notes(), given, 2)
    for j, t in enumerate((*WARPED, 0.0)):
        expected = given.noise - (1 - t / 1000) * (0.25 + 6 * 0.25)
        torch.testing.assert_close(states[:, j], expected, rtol=0, atol=1e-13)


def test_latents_are_integrated_in_float32() -> None:
    noise, clean, words = inputs()
    given = TrajectoryInputs(noise.bfloat16(), clean.bfloat16(), words)
    low, high = noted(Notes(torch.bfloat16), given, 2), noted(Notes(), given, 2)
    assert low.dtype == torch.float32
    assert (low - high).abs().max() < 0.02 * high.abs().max()
    assert not torch.equal(low[:, 1], low[:, 1].bfloat16().float())


def test_a_ragged_video_is_refused() -> None:
    with pytest.raises(ValueError, match="6 frames are not whole segments of 4"):
        noted(Notes(), inputs(), 4)


# --- the regression ------------------------------------------------------------------------------------------


def pairs(dtype: torch.dtype = torch.float64) -> OdePairs:
    return OdePairs(torch.stack([latents(20 + i, 3, FRAMES) for i in range(6)], dim=1).to(dtype), WARPED)


def test_loss_by_hand() -> None:
    given, text, index = pairs(), prompts(3, 3), torch.tensor([3, 0, 2])
    seen: list[Tensor] = []

    def network(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        seen.extend((latent, timesteps, clean))
        return latent.sin() + clean, latent.flatten(2)

    loss, hidden = ode_loss(network, given, index, text)
    errors = []
    for b, j in enumerate(index.tolist()):
        state, final, truth = given.states[b, j], given.states[b, 4], given.states[b, 5]
        errors.append((state - WARPED[j] / 1000 * (state.sin() + truth) - final).square().mean().item())
        assert torch.equal(seen[0][b], state) and torch.equal(seen[2][b], truth)
        assert seen[1][b].tolist() == [WARPED[j]] * FRAMES
    assert loss.item() == pytest.approx(sum(errors) / 3, abs=1e-13)
    assert hidden is not None and torch.equal(hidden, seen[0].flatten(2))


def test_zero_for_a_network_that_knows_the_end() -> None:
    given, index = pairs(), torch.tensor([0, 1, 3])

    def network(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> tuple[Tensor, None]:
        return (latent - given.states[:, -2]) / (timesteps / 1000)[..., None, None, None], None

    loss, hidden = ode_loss(network, given, index, prompts(3, 3))
    assert loss.item() < 1e-25 and hidden is None


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_stored_states_give_a_float32_loss(stored: torch.dtype) -> None:
    given, index = pairs(stored), torch.tensor([0, 1, 2])

    def network(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> tuple[Tensor, None]:
        return latent.sin(), None

    loss, _ = ode_loss(network, given, index, prompts(3, 3))
    exact, _ = ode_loss(network, given._replace(states=given.states.double()), index, prompts(3, 3))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_a_layout_without_ground_truth_is_refused() -> None:
    def network(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> tuple[Tensor, None]:
        return latent, None

    given = OdePairs(pairs().states[:, :5], WARPED)
    with pytest.raises(ValueError, match="5 entries a sample; 4 states, a final sample and the ground truth are 6"):
        ode_loss(network, given, torch.zeros(3, dtype=torch.long), prompts(3, 3))


@torch.no_grad()
@pytest.mark.parametrize("per_segment", [1, 2])
def test_the_loss_is_that_of_the_cached_generator(per_segment: int) -> None:
    """Segment by segment with the ground truth in the cache, as the generator will run: same loss, same states."""
    network, given, text, index = wan(), pairs(), prompts(3, 3), torch.tensor([3, 0, 2])

    def forced(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        output = network(latent, timesteps, text, clean=Clean(clean), segment_frames=per_segment, capture=Capture(2))
        return output.velocity, output.hidden

    loss, hidden = ode_loss(forced, given, index, text)
    held, estimates, states = cache(3, per_segment), [], []
    noisy, at = given.states[torch.arange(3), index], torch.tensor(WARPED, dtype=torch.float64)[index]
    for first in range(0, FRAMES, per_segment):
        own, views = slice(first, first + per_segment), held.view(room=per_segment)
        past = History(views, None, first)
        output = network(noisy[:, own], at, text, history=past, capture=Capture(2))
        estimates.append(clean_from_velocity(noisy[:, own], output.velocity, at))
        states.append(output.hidden)
        if first + per_segment < FRAMES:
            network(given.states[:, -1, own], torch.zeros(3), text, history=past)
            held.keep(views)
    expected = (torch.cat(estimates, dim=1) - given.states[:, -2]).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(hidden, torch.cat(states, dim=1), rtol=0, atol=1e-11)


def test_gradient_reaches_the_whole_network() -> None:
    network, given = wan(), pairs()

    def forced(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> tuple[Tensor, None]:
        return network(latent, timesteps, text, clean=Clean(clean), segment_frames=2).velocity, None

    ode_loss(forced, given, torch.tensor([3, 0, 2]), prompts(3, 3))[0].backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@torch.no_grad()
@pytest.mark.parametrize("per_segment", [1, 2, 3])
def test_the_ar_teachers_own_video_is_the_trajectory_given_itself(per_segment: int) -> None:
    """Sampling is integrating with the sample so far as history: its own result as ground truth changes nothing."""
    network, made, given = wan(), settings(per_segment), inputs()
    video = sample(causal(network), made, given.noise, given.prompts, cache(4, per_segment))
    itself = dense_states(network, made, given._replace(clean=video))
    torch.testing.assert_close(video, itself[:, -2], rtol=1e-10, atol=1e-10)
    assert (video - trajectories(causal(network), made, given, cache(4, per_segment))[:, -2]).abs().max() > 1e-3
