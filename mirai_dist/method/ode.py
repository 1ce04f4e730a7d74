"""Causal ODE distillation: the other few-step start of the generator (Causal-Forcing; spec 3.2).

The AR teacher integrates its guided flow from noise to a video, every segment given the clean ground truth before it;
the states on the way, at the denoising steps of the generator, are kept. The generator then learns to jump from any
of these states to the end of its trajectory. Given one history, the map from noise to video is injective, which is
why the context of the generator is the ground truth that the teacher saw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mirai_dist.method.dmd import Conditioning
from mirai_dist.method.flow import TIMESTEPS, clean_from_velocity
from mirai_dist.method.rollout import Cache, Past, SegmentNetwork
from mirai_dist.method.teacher_forcing import StateNetwork, guided_velocity


@dataclass(frozen=True)
class Integration:
    """How trajectories are made.

    grid: timesteps of the Euler integration, descending to 0. recorded: indices of grid points whose states are kept.
    guidance: weight w of classifier-free guidance, v = v_neg + w (v_pos - v_neg).
    """

    grid: tuple[float, ...]
    recorded: tuple[int, ...]
    frames_per_segment: int
    guidance: float


class TrajectoryInputs(NamedTuple):
    """noise and ground-truth latents, each [B, F, C, H, W], and the prompts [B, length, text_dim]."""

    noise: Tensor
    clean: Tensor
    prompts: Conditioning


class OdePairs(NamedTuple):
    """states [B, S + 2, F, C, H, W]: S states of a trajectory, its final sample, the ground truth. timesteps: of the
    S states."""

    states: Tensor
    timesteps: tuple[float, ...]


def recorded_points(steps: Sequence[int], points: int) -> tuple[int, ...]:
    """Grid index of each denoising step of an Euler integration in `points` steps: 0, 12, 24, 36 for 1000, 750, 500,
    250 in 48 steps. Grid and step list are warped alike, so the shift plays no part.

    ValueError unless the steps descend within 1000..1 and lie on the grid.
    """
    if not steps or any(not 0 < step <= TIMESTEPS for step in steps) or any(a <= b for a, b in pairwise(steps)):
        raise ValueError(f"denoising steps {list(steps)} do not descend from at most 1000 to at least 1")
    whole = math.lcm(*(int(TIMESTEPS) // math.gcd(int(TIMESTEPS), step) for step in steps))
    if points % whole:
        raise ValueError(
            f"denoising steps {list(steps)} do not lie on an Euler grid of {points} points: use a multiple of {whole}"
        )
    return tuple(points * (int(TIMESTEPS) - step) // int(TIMESTEPS) for step in steps)


@torch.no_grad()
def sample(
    network: SegmentNetwork, settings: Integration, noise: Tensor, prompts: Conditioning, cache: Cache
) -> Tensor:
    """A video [B, F, C, H, W] of the AR teacher by itself: each segment integrated given the samples before it.

    As `trajectories`, whose context is the ground truth instead; the cache's batch size is 2B here too.
    """
    frames, total = settings.frames_per_segment, noise.shape[1]
    wide = torch.promote_types(noise.dtype, torch.float32)
    text = torch.cat((prompts.text, prompts.negative.expand_as(prompts.text)))
    made: list[Tensor] = []
    cache.reset()
    past = Past((), None, 0)
    for first in range(0, total, frames):
        past = past._replace(held=cache.view(room=frames), first_frame=first)
        found, past = _integrated(network, settings, (noise[:, first : first + frames].to(wide), text), past)
        made.append(found[:, -1])
        if first + frames < total:  # nobody reads the last segment's cache
            zero = torch.zeros(2 * noise.shape[0], device=noise.device, dtype=wide)
            network(_twice(made[-1]), zero, text, past, 0)
            cache.keep(past.held)
    return torch.cat(made, dim=1)


@torch.no_grad()
def trajectories(network: SegmentNetwork, settings: Integration, inputs: TrajectoryInputs, cache: Cache) -> Tensor:
    """States [B, S + 2, F, C, H, W] at least float32: S recorded ones, the final sample, the ground truth.

    The network runs segment by segment with the prompt and the negative prompt as one batch of 2B, which is the
    cache's batch size; the cache must show a segment its whole past. Equal to integrating the whole video with the
    teacher-forced network, where a segment's past is the same clean video at every step, for the price of a single
    pass over the past. Passes: len(grid) - 1 a segment, and one for the context of each segment but the last.

    ValueError when the video is no whole number of segments.
    """
    noise, clean, prompts = inputs
    total, frames = noise.shape[1], settings.frames_per_segment
    if total % frames:
        raise ValueError(f"{total} frames are not whole segments of {frames}")
    wide = torch.promote_types(noise.dtype, torch.float32)
    text = torch.cat((prompts.text, prompts.negative.expand_as(prompts.text)))
    shape = (noise.shape[0], len(settings.recorded) + 2, *noise.shape[1:])
    states = torch.empty(shape, dtype=wide, device=noise.device)
    states[:, -1] = clean
    cache.reset()
    past = Past((), None, 0)
    for first in range(0, total, frames):
        own = slice(first, first + frames)
        past = past._replace(held=cache.view(room=frames), first_frame=first)
        states[:, :-1, own], past = _integrated(network, settings, (noise[:, own].to(wide), text), past)
        if first + frames < total:  # nobody reads the last segment's cache
            zero = torch.zeros(2 * noise.shape[0], device=noise.device, dtype=wide)
            network(_twice(clean[:, own]), zero, text, past, 0)
            cache.keep(past.held)
    return states


def _integrated(
    network: SegmentNetwork, settings: Integration, inputs: tuple[Tensor, Tensor], past: Past
) -> tuple[Tensor, Past]:
    """Recorded states and final sample [B, S + 1, frames, C, H, W] of one segment, from its noise and the text of
    both batches; and the past with the text's keys and values."""
    latent, text = inputs
    kept = []
    for index, (now, following) in enumerate(pairwise(settings.grid)):
        if index in settings.recorded:
            kept.append(latent)
        at = torch.full((2 * latent.shape[0],), now, device=latent.device, dtype=latent.dtype)
        output = network(_twice(latent), at, text, past, 0)
        assert output.velocity is not None
        past = past._replace(text_keys_values=output.text_keys_values)
        velocity = guided_velocity(output.velocity, settings.guidance).to(latent.dtype)
        latent = latent + (following - now) / TIMESTEPS * velocity
    return torch.stack([*kept, latent], dim=1), past


def _twice(latent: Tensor) -> Tensor:
    return latent.repeat(2, 1, 1, 1, 1)


def ode_loss(network: StateNetwork, pairs: OdePairs, index: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
    """(loss, the network's states): mean squared distance, at least float32, between the x0 that the network
    predicts from state index[b] of sample b and the end of that trajectory, given the ground truth at t = 0.

    index: integers [B] below S; all frames of a sample are at the same timestep.
    ValueError when the states are not those of the timesteps, as in layouts that hold no ground truth.
    """
    states, timesteps = pairs
    if states.shape[1] != len(timesteps) + 2:
        raise ValueError(
            f"{states.shape[1]} entries a sample; {len(timesteps)} states, a final sample and the ground truth "
            f"are {len(timesteps) + 2}"
        )
    wide = torch.promote_types(states.dtype, torch.float32)
    noisy = states[torch.arange(len(states), device=states.device), index].to(wide)
    at = torch.tensor(timesteps, device=states.device, dtype=wide)[index].unsqueeze(1).expand(-1, states.shape[2])
    velocity, hidden = network(noisy, at, text, states[:, -1].to(wide))
    return (clean_from_velocity(noisy, velocity, at) - states[:, -2].to(wide)).square().mean(), hidden
