"""Flow matching of teachers: bidirectional, and autoregressive by teacher forcing (Causal-Forcing; spec 3.1)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mirai_dist.method.dmd import Velocity
from mirai_dist.method.flow import add_noise, flow_matching_loss, training_weight


class TeacherForcedNetwork(Protocol):
    """Velocity of every noisy segment given the clean segments before it; timesteps [B, F]."""

    def __call__(self, latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> Tensor: ...


def bidirectional_loss(network: Velocity, clean: Tensor, noise: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """Unweighted flow matching of a bidirectional network at one timestep [B] a sample."""
    velocity = network(add_noise(clean, noise, timesteps), timesteps, text)
    return flow_matching_loss(velocity, clean, noise)


def teacher_forcing_loss(
    network: TeacherForcedNetwork, clean: Tensor, noise: Tensor, timesteps: Tensor, text: Tensor, shift: float
) -> Tensor:
    """Weighted flow matching of all segments at once, each at its own timestep ([B, F], equal within a segment)."""
    velocity = network(add_noise(clean, noise, timesteps), timesteps, text, clean)
    return flow_matching_loss(velocity, clean, noise, training_weight(timesteps, shift))
