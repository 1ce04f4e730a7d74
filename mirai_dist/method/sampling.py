"""Many-step sampling of a bidirectional teacher: Euler integration with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirai_dist.method.dmd import Conditioning, Velocity, guided


@torch.no_grad()
def euler_sample(
    network: Velocity, noise: Tensor, prompts: Conditioning, timesteps: Sequence[float], guidance: float
) -> Tensor:
    """Integrate dx = v d sigma over descending timesteps, from noise [B, F, C, H, W] to clean latents.

    guidance is g in conditional + g (conditional - unconditional), as in the real score of DMD.
    """
    latents = noise
    both = torch.cat((prompts.text, prompts.negative.expand_as(prompts.text)))
    for now, following in zip(timesteps[:-1], timesteps[1:], strict=True):
        at = torch.full((2 * latents.shape[0],), now, device=latents.device)
        conditional, unconditional = network(latents.repeat(2, 1, 1, 1, 1), at, both).chunk(2)
        velocity = guided(conditional, unconditional, guidance)
        latents = latents + (following - now) / 1000.0 * velocity.to(latents.dtype)
    return latents
