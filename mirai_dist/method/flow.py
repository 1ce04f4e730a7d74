"""The one flow-matching schedule of every network: sigma(t) = t / 1000, continuous.

x_t = (1 - sigma) x0 + sigma noise; a network predicts v = noise - x0. Published code looks sigma up in tables
whose shift differs between networks; here the noise level is exact for every t, in every place (spec 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TIMESTEPS = 1000.0


def expand_like(timesteps: Tensor, latent: Tensor) -> Tensor:
    """sigma of timesteps [B] or [B, F], shaped to broadcast over latents [B, F, C, H, W], at least float32."""
    dtype = torch.promote_types(latent.dtype, torch.float32)
    sigma = timesteps.to(dtype) / TIMESTEPS
    return sigma.reshape(*sigma.shape, *(1,) * (latent.ndim - sigma.ndim))


def shifted(u: float, shift: float) -> float:
    """Timestep of a uniform position u in [0, 1]: 1000 shift u / (1 + (shift - 1) u)."""
    return TIMESTEPS * shift * u / (1.0 + (shift - 1.0) * u)


def warped_steps(steps: Sequence[int], shift: float) -> tuple[float, ...]:
    """Denoising steps as the shifted schedule places them: 1000, 750, 500, 250 at shift 5 are
    1000, 937.5, 833.33, 625 (spec 2.5)."""
    return tuple(shifted(step / TIMESTEPS, shift) for step in steps)


def euler_grid(points: int, shift: float) -> tuple[float, ...]:
    """Timesteps of an Euler integration from 1000 to 0 in `points` steps (points + 1 values)."""
    return tuple(shifted(1.0 - i / points, shift) for i in range(points + 1))


def add_noise(clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t of clean latents [B, F, C, H, W] at timesteps [B] or [B, F]; the dtype of `clean` is kept."""
    sigma = expand_like(timesteps, clean)
    return ((1.0 - sigma) * clean + sigma * noise).to(clean.dtype)


def clean_from_velocity(noisy: Tensor, velocity: Tensor, timesteps: Tensor) -> Tensor:
    """x0 = x_t - sigma v, in at least float32, in the dtype of `noisy`."""
    sigma = expand_like(timesteps, noisy)
    return (noisy - sigma * velocity.to(sigma.dtype)).to(noisy.dtype)


def training_weight(timesteps: Tensor, shift: float) -> Tensor:
    """Weight of the AR teacher's loss: a bell around t = 500, zero at t = 1000, mean one over the schedule
    (spec 2.4)."""
    table = torch.tensor([shifted(1.0 - i / 1000, shift) for i in range(1000)], dtype=torch.float64)
    bell = torch.exp(-2.0 * ((table - 500.0) / TIMESTEPS) ** 2)
    lowest = bell.min()
    scale = 1000.0 / (bell - lowest).sum()
    weight = (torch.exp(-2.0 * ((timesteps.double() - 500.0) / TIMESTEPS) ** 2) - lowest.to(timesteps.device)) * scale
    return weight.clamp_min(0.0)


def flow_matching_loss(velocity: Tensor, clean: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error against noise - clean, in at least float32; `weight` [B] or [B, F] multiplies frames."""
    dtype = torch.promote_types(clean.dtype, torch.float32)
    error = (velocity.to(dtype) - (noise - clean).to(dtype)).square().mean(dim=(2, 3, 4))
    if weight is not None:
        error = error * weight.to(dtype).reshape(*weight.shape, *(1,) * (2 - weight.ndim))
    return error.mean()
