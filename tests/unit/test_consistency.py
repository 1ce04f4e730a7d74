"""Causal consistency distillation: one step by hand, guidance, the boundary, and who gets gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mirai_dist.method.consistency import ConsistencyNetworks, Neighbours, consistency_loss
from mirai_dist.method.dmd import Conditioning
from mirai_dist.method.flow import euler_grid
from mirai_dist.method.teacher_forcing import StateNetwork, TeacherForcedNetwork

SHAPE = (2, 3, 4, 2, 2)
PROMPTS = Conditioning(
    torch.full((2, 5, 6), 2.0, dtype=torch.float64), torch.full((1, 5, 6), -1.0, dtype=torch.float64)
)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def neighbours(first: tuple[float, float], second: tuple[float, float]) -> Neighbours:
    """Timesteps of two samples, equal over their frames."""
    return Neighbours(*(torch.tensor(t, dtype=torch.float64)[:, None].expand(2, SHAPE[1]) for t in (first, second)))


def level(timesteps: Tensor) -> Tensor:
    return timesteps[:, :, None, None, None] / 1000


def analytic(scale: Tensor | float) -> TeacherForcedNetwork:
    """A velocity that depends on everything a network is given."""

    def velocity(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> Tensor:
        prompt = text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)
        return scale * (latent.sin() + prompt * level(timesteps) + clean.square())

    return velocity


def with_states(network: TeacherForcedNetwork) -> StateNetwork:
    return lambda latent, timesteps, text, clean: (network(latent, timesteps, text, clean), 2 * latent)


def networks(
    student: float | Tensor = 0.3, target: float | Tensor = 0.5, teacher: float | Tensor = 0.7
) -> ConsistencyNetworks:
    return ConsistencyNetworks(with_states(analytic(student)), analytic(target), analytic(teacher))


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_one_step_by_hand(guidance: float) -> None:
    clean, noise = normal(1), normal(2)
    at = neighbours((937.5, 625.0), (930.0, 500.0))
    sigma, following = level(at.timesteps), level(at.next_timesteps)
    noisy = (1 - sigma) * clean + sigma * noise

    def velocity(scale: float, x: Tensor, s: Tensor, prompt: float) -> Tensor:
        return scale * (x.sin() + prompt * s + clean.square())

    conditional, unconditional = velocity(0.7, noisy, sigma, 2.0), velocity(0.7, noisy, sigma, -1.0)
    guided = unconditional + guidance * (conditional - unconditional)
    nearer = noisy - (sigma - following) * guided
    goal = nearer - following * velocity(0.5, nearer, following, 2.0)
    estimate = noisy - sigma * velocity(0.3, noisy, sigma, 2.0)
    expected = (estimate - goal).square().mean().item()
    loss, states = consistency_loss(networks(), clean, noise, at, PROMPTS, guidance)
    assert loss.item() == pytest.approx(expected, abs=1e-13)
    assert states is not None and torch.equal(states, 2 * noisy)  # the student's, at its own timestep


def test_at_the_boundary_the_goal_is_the_teachers_last_step() -> None:
    """At t = 0, x0 is the input, whatever the target network says."""
    clean, noise = normal(1), normal(2)
    at = neighbours((100.0, 20.0), (0.0, 0.0))
    losses = {consistency_loss(networks(target=scale), clean, noise, at, PROMPTS, 3.0)[0].item() for scale in (0.5, 9)}
    assert len(losses) == 1


def test_zero_for_exact_networks_of_a_known_video() -> None:
    """Where the video is known, every point of a trajectory has the same x0."""
    clean, noise = normal(1), normal(2)

    def exact(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> Tensor:
        return (latent - clean) / level(timesteps)

    grid = euler_grid(48, 5.0)
    for i in (0, 20, 46):
        at = neighbours((grid[i], grid[i]), (grid[i + 1], grid[i + 1]))
        known = ConsistencyNetworks(with_states(exact), exact, exact)
        loss, _ = consistency_loss(known, clean, noise, at, PROMPTS, 3.0)
        assert loss.item() < 1e-25


def test_gradient_reaches_the_student_alone() -> None:
    scales = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.3, 0.5, 0.7)]
    at = neighbours((937.5, 625.0), (930.0, 500.0))
    consistency_loss(networks(*scales), normal(1), normal(2), at, PROMPTS, 3.0)[0].backward()
    assert scales[0].grad is not None and scales[0].grad != 0
    assert scales[1].grad is None and scales[2].grad is None


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_teacher_runs_both_prompts_in_one_call(guidance: float) -> None:
    calls: list[tuple[int, ...]] = []

    def teacher(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> Tensor:
        calls.append((len(latent), len(timesteps), len(clean)))
        assert (text[:2] == 2).all() and (text[2:] == -1).all()
        return latent.sin()

    at = neighbours((937.5, 625.0), (930.0, 500.0))
    consistency_loss(networks()._replace(teacher=teacher), normal(1), normal(2), at, PROMPTS, guidance)
    assert calls == [(4, 4, 4)]


def test_stored_bf16_latents_move_in_float32() -> None:
    """Neighbours near t = 1000 differ by less than bf16 resolves: rounded, the target would not move at all."""
    clean, noise = normal(1).bfloat16(), normal(2).bfloat16()
    grid = euler_grid(48, 5.0)
    at = neighbours((grid[0], grid[1]), (grid[1], grid[2]))
    loss, _ = consistency_loss(networks(), clean, noise, at, PROMPTS, 3.0)
    exact, _ = consistency_loss(networks(), clean.double(), noise.double(), at, PROMPTS, 3.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
