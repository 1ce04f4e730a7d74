"""Flow matching of the two teachers: what the networks are given, and how frames are weighted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mirai_dist.method.flow import training_weight
from mirai_dist.method.teacher_forcing import (
    Levels,
    bidirectional_loss,
    context_timestep,
    diffusion_forcing_loss,
    guided_velocity,
    noised_context_loss,
    teacher_forcing_loss,
)
from mirai_dist.models.wan import Clean
from tests.tiny_wan import latents, prompts, wan

SHAPE = (2, 4, 3, 2, 2)
TEXT = torch.ones(2, 5, 6, dtype=torch.float64)
# two segments of two frames a sample, each at its own timestep
TIMESTEPS = torch.tensor([[100.0, 100.0, 800.0, 800.0], [937.5, 937.5, 500.0, 500.0]], dtype=torch.float64)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_teacher_forcing_by_hand() -> None:
    video, noise = normal(1), normal(2)
    sigma = TIMESTEPS.view(2, 4, 1, 1, 1) / 1000
    noisy = (1 - sigma) * video + sigma * noise

    def network(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> Tensor:
        torch.testing.assert_close(latent, noisy, rtol=0, atol=1e-15)
        assert timesteps is TIMESTEPS and text is TEXT
        assert clean is video  # the clean half is not noised
        return latent.sin()

    loss = teacher_forcing_loss(network, video, noise, TIMESTEPS, TEXT, shift=5.0)
    a_frame = (noisy.sin() - (noise - video)).square().mean(dim=(2, 3, 4))
    expected = (training_weight(TIMESTEPS, 5.0) * a_frame).mean().item()
    assert loss.item() == pytest.approx(expected, abs=1e-13)
    assert abs(a_frame.mean().item() - expected) > 0.01  # weights matter here


def test_pure_noise_frames_do_not_count_for_the_ar_teacher() -> None:
    clean, noise = normal(1), normal(2)
    levels = torch.tensor([[500.0, 500.0, 1000.0, 1000.0]] * 2, dtype=torch.float64)

    def network(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> Tensor:
        velocity = noise - clean
        velocity[:, 2:] += 7  # wrong where the weight is zero
        return velocity

    assert teacher_forcing_loss(network, clean, noise, levels, TEXT, 5.0).item() < 1e-12


def test_bidirectional_is_unweighted_at_one_timestep_a_sample() -> None:
    clean, noise = normal(1), normal(2)
    levels = torch.tensor([250.0, 1000.0], dtype=torch.float64)
    sigma = levels.view(2, 1, 1, 1, 1) / 1000
    noisy = (1 - sigma) * clean + sigma * noise

    def network(latent: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        torch.testing.assert_close(latent, noisy, rtol=0, atol=1e-15)
        return latent.cos()

    loss = bidirectional_loss(network, clean, noise, levels, TEXT)
    expected = (noisy.cos() - (noise - clean)).square().mean().item()
    assert loss.item() == pytest.approx(expected, abs=1e-14)


CONTEXT = torch.tensor([[20.0, 20.0, 150.0, 150.0], [0.0, 0.0, 90.0, 90.0]], dtype=torch.float64)


def test_noised_context_by_hand() -> None:
    """The past is noised with the noise of the future, to its own level, which the network is told."""
    video, noise = normal(1), normal(2)
    sigma, low = (t.view(2, 4, 1, 1, 1) / 1000 for t in (TIMESTEPS, CONTEXT))
    noisy, past = (1 - sigma) * video + sigma * noise, (1 - low) * video + low * noise

    def network(latent: Tensor, timesteps: Tensor, text: Tensor, context: Tensor, context_timesteps: Tensor) -> Tensor:
        torch.testing.assert_close(latent, noisy, rtol=0, atol=1e-15)
        torch.testing.assert_close(context, past, rtol=0, atol=1e-15)
        assert timesteps is TIMESTEPS and context_timesteps is CONTEXT and text is TEXT
        return latent.sin() + context.cos()

    loss = noised_context_loss(network, video, noise, Levels(TIMESTEPS, CONTEXT), TEXT, shift=5.0)
    a_frame = (noisy.sin() + past.cos() - (noise - video)).square().mean(dim=(2, 3, 4))
    assert loss.item() == pytest.approx((training_weight(TIMESTEPS, 5.0) * a_frame).mean().item(), abs=1e-13)


def test_a_past_that_is_not_noised_is_teacher_forcing_to_the_bit() -> None:
    network, video, noise = wan(), latents(1, 2, 4), latents(2, 2, 4)
    text = prompts(3, 2)

    def forced(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> Tensor:
        return network(latent, timesteps, text, clean=Clean(clean), segment_frames=2).velocity

    def noised(latent: Tensor, timesteps: Tensor, text: Tensor, context: Tensor, context_timesteps: Tensor) -> Tensor:
        past = Clean(context, context_timesteps)
        return network(latent, timesteps, text, clean=past, segment_frames=2).velocity

    def loss(levels: Tensor) -> float:
        return noised_context_loss(noised, video, noise, Levels(TIMESTEPS, levels), text, 5.0).item()

    plain = teacher_forcing_loss(forced, video, noise, TIMESTEPS, text, 5.0).item()
    assert loss(torch.zeros_like(CONTEXT)) == plain
    assert abs(loss(CONTEXT) - plain) > 1e-4


def test_levels_of_the_past_are_shifted_steps_below_the_highest() -> None:
    assert context_timestep(0.0, 100.0, 5.0) == 0
    assert context_timestep(1.0, 100.0, 1.0) == pytest.approx(100)
    assert context_timestep(0.5, 100.0, 5.0) == pytest.approx(1000 * 5 * 0.05 / (1 + 4 * 0.05))
    assert context_timestep(1.0, 1000.0, 5.0) == pytest.approx(1000)


def test_diffusion_forcing_by_hand() -> None:
    video, noise = normal(1), normal(2)
    sigma = TIMESTEPS.view(2, 4, 1, 1, 1) / 1000
    noisy = (1 - sigma) * video + sigma * noise

    def network(latent: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        torch.testing.assert_close(latent, noisy, rtol=0, atol=1e-15)
        assert timesteps is TIMESTEPS and text is TEXT
        return latent.cos()

    loss = diffusion_forcing_loss(network, video, noise, TIMESTEPS, TEXT, shift=5.0)
    a_frame = (noisy.cos() - (noise - video)).square().mean(dim=(2, 3, 4))
    assert loss.item() == pytest.approx((training_weight(TIMESTEPS, 5.0) * a_frame).mean().item(), abs=1e-13)


@pytest.mark.parametrize("weight", [0.0, 1.0, 6.0])
def test_guidance_of_two_batches_in_one(weight: float) -> None:
    conditional, unconditional = normal(1), normal(2)
    found = guided_velocity(torch.cat((conditional, unconditional)), weight)
    expected = (1 - weight) * unconditional + weight * conditional
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_guidance_of_bf16_velocities_is_not_rounded_again() -> None:
    both = torch.cat((normal(1), normal(2))).bfloat16()
    found = guided_velocity(both, 6.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), guided_velocity(both.double(), 6.0), rtol=1e-6, atol=1e-6)
