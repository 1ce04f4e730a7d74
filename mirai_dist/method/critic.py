"""The critic learns the generator's own distribution by plain flow matching on its rollouts (spec 3.6)."""

from __future__ import annotations

from torch import Tensor

from mirai_dist.method.dmd import Velocity
from mirai_dist.method.flow import add_noise, flow_matching_loss


def critic_loss(critic: Velocity, latents: Tensor, noise: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """Unweighted flow matching on detached rollouts [B, F, C, H, W] at timesteps [B]."""
    latents = latents.detach()
    velocity = critic(add_noise(latents, noise, timesteps), timesteps, text)
    return flow_matching_loss(velocity, latents, noise)
