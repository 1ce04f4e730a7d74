"""Flow matching of teachers: bidirectional, and autoregressive by teacher or diffusion forcing (Causal-Forcing;
spec 3.1).

The two ways to train an autoregressive teacher differ in what a noisy segment sees of the past: the clean segments
themselves (teacher forcing, a doubled sequence), or those segments at the noise levels they are trained at (diffusion
forcing, one sequence). Teacher forcing may noise the past a little, so that the network learns to live with what it
will have made itself.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mirai_dist.method.dmd import Velocity
from mirai_dist.method.flow import TIMESTEPS, add_noise, flow_matching_loss, shifted, training_weight


class TeacherForcedNetwork(Protocol):
    """Velocity of every noisy segment given the clean segments before it; timesteps [B, F]."""

    def __call__(self, latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> Tensor: ...


class StateNetwork(Protocol):
    """A teacher-forced network (timesteps [B, F]): velocity of every noisy segment, and its mid-depth states
    [B, tokens, dim] if the caller wants them for foresight, else None."""

    def __call__(
        self, latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor
    ) -> tuple[Tensor, Tensor | None]: ...


class NoisedContextNetwork(Protocol):
    """Velocity of every noisy segment given earlier segments that are themselves noised to context_timesteps [B, F]."""

    def __call__(
        self, latent: Tensor, timesteps: Tensor, text: Tensor, context: Tensor, context_timesteps: Tensor
    ) -> Tensor: ...


class SegmentCausalNetwork(Protocol):
    """Velocity of every segment given itself and the earlier ones, each at its own timestep [B, F]."""

    def __call__(self, latent: Tensor, timesteps: Tensor, text: Tensor) -> Tensor: ...


class Levels(NamedTuple):
    """Timesteps [B, F], equal within a segment: of the segments that are learnt, and of the past that they see."""

    timesteps: Tensor
    context: Tensor


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


def noised_context_loss(
    network: NoisedContextNetwork, clean: Tensor, noise: Tensor, levels: Levels, text: Tensor, shift: float
) -> Tensor:
    """Teacher forcing whose clean half is noised to levels.context; at level 0 it is `teacher_forcing_loss`.

    Both halves get the same noise [B, F, C, H, W], as in the public code: a segment sees of the past only other
    segments, whose noise tells nothing of its own.
    """
    context = add_noise(clean, noise, levels.context)
    noisy = add_noise(clean, noise, levels.timesteps)
    velocity = network(noisy, levels.timesteps, text, context, levels.context)
    return flow_matching_loss(velocity, clean, noise, training_weight(levels.timesteps, shift))


def context_timestep(u: float, highest: float, shift: float) -> float:
    """Timestep of the noised past for a uniform draw u in [0, 1): a step of the unshifted schedule between 0 and
    `highest` (of 1000), shifted as all timesteps are."""
    return shifted(u * highest / TIMESTEPS, shift)


def diffusion_forcing_loss(
    network: SegmentCausalNetwork, clean: Tensor, noise: Tensor, timesteps: Tensor, text: Tensor, shift: float
) -> Tensor:
    """Weighted flow matching of one sequence whose segments have independent timesteps ([B, F], equal within a
    segment) and see each other noised, earlier ones only."""
    velocity = network(add_noise(clean, noise, timesteps), timesteps, text)
    return flow_matching_loss(velocity, clean, noise, training_weight(timesteps, shift))


def guided_velocity(both: Tensor, guidance: float) -> Tensor:
    """unconditional + guidance (conditional - unconditional) of velocities [2B, F, C, H, W], the conditional ones
    first; in at least float32, because the difference of two bfloat16 values is mostly rounding."""
    conditional, unconditional = both.to(torch.promote_types(both.dtype, torch.float32)).chunk(2)
    return unconditional + guidance * (conditional - unconditional)
