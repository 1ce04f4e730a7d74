"""The critic's loss is plain flow matching on rollouts that it cannot move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mirai_dist.method.critic import critic_loss

SHAPE = (2, 3, 4, 2, 2)
TIMESTEPS = torch.tensor([300.0, 937.5], dtype=torch.float64)
TEXT = torch.ones(2, 5, 6, dtype=torch.float64)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_plain_flow_matching_by_hand() -> None:
    latents, noise = normal(1), normal(2)
    sigma = TIMESTEPS.view(-1, 1, 1, 1, 1) / 1000

    def network(latent: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        torch.testing.assert_close(latent, (1 - sigma) * latents + sigma * noise, rtol=0, atol=1e-15)
        assert timesteps is TIMESTEPS and text is TEXT
        return latent.sin()

    velocity = ((1 - sigma) * latents + sigma * noise).sin()
    expected = (velocity - (noise - latents)).square().mean().item()
    assert critic_loss(network, latents, noise, TIMESTEPS, TEXT).item() == pytest.approx(expected, abs=1e-14)


def test_zero_for_the_exact_network_of_a_known_video() -> None:
    """When every rollout is the same video, the velocity is known: (x_t - video) / sigma."""
    video, noise = normal(1)[:1].expand(SHAPE), normal(2)

    def exact(latent: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return (latent - video) / (timesteps.view(-1, 1, 1, 1, 1) / 1000)

    assert critic_loss(exact, video, noise, TIMESTEPS, TEXT).item() < 1e-28


def test_gradient_reaches_the_critic_and_not_the_rollout() -> None:
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    latents = normal(1).requires_grad_()

    def network(latent: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return weight * latent

    critic_loss(network, latents, normal(2), TIMESTEPS, TEXT).backward()
    assert latents.grad is None
    assert weight.grad is not None and weight.grad != 0
