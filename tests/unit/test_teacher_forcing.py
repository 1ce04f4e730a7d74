"""Flow matching of the two teachers: what the networks are given, and how frames are weighted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mirai_dist.method.flow import training_weight
from mirai_dist.method.teacher_forcing import bidirectional_loss, teacher_forcing_loss

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
