"""Distribution matching distillation: the generator's loss (DMD2 / Self-Forcing; spec 3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mirai_dist.method.flow import add_noise, clean_from_velocity, shifted


class Velocity(Protocol):
    """A bidirectional score network: velocity of a noisy video [B, F, C, H, W] at timesteps [B], given text."""

    def __call__(self, latent: Tensor, timesteps: Tensor, text: Tensor) -> Tensor: ...


class Conditioning(NamedTuple):
    """Prompt embeddings [B, length, text_dim] and the negative prompt's [1 or B, length, text_dim]."""

    text: Tensor
    negative: Tensor


class Scores(NamedTuple):
    """One comparison of the two scores on rollouts [B, F, C, H, W], all but timesteps of that shape, without graph.

    latents: the rollout. fake, conditional, real: x0 of the critic, of the teacher without guidance and of the guided
    teacher, all from the same noisy rollout at `timesteps` [B]. gradient: the normalised DMD gradient.
    """

    latents: Tensor
    timesteps: Tensor
    fake: Tensor
    conditional: Tensor
    real: Tensor
    gradient: Tensor


SCHEDULES = ("none", "lower", "both")


def exit_interval(steps: Sequence[int], exit_step: int) -> tuple[int, int]:
    """(from, to) of an exit step, in the units of the unwarped step list: 1000, 750, 500, 250 gives (1000, 750),
    (750, 500), (500, 250), (250, 0) (spec 3.4)."""
    return steps[exit_step], steps[exit_step + 1] if exit_step + 1 < len(steps) else 0


def score_draws(steps: Sequence[int], exit_step: int, schedule: str) -> range:
    """The integers that a score timestep is drawn from, uniformly, after a rollout with this exit step (spec 3.5).

    none: 0..999 whatever the exit. lower: from `to` of the exit's interval on; both: and below its `from`: noise no
    weaker, or just as strong, as what the generator removed. steps: unwarped, descending; exit_step: that of all
    segments but a first one with its own list. ValueError for another schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"no schedule {schedule!r} of score timesteps; there are {', '.join(SCHEDULES)}")
    start, end = exit_interval(steps, exit_step)
    return range(0 if schedule == "none" else end, start if schedule == "both" else 1000)


def score_timestep(draw: int, shift: float, lowest: float, highest: float) -> float:
    """Timestep of an integer of `score_draws`: shifted as the schedule is, then clamped (spec 3.5 step 1)."""
    return min(max(shifted(draw / 1000.0, shift), lowest), highest)


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """conditional + guidance (conditional - unconditional): CFG weight guidance + 1."""
    return conditional + guidance * (conditional - unconditional)


@torch.no_grad()
def score_difference(
    latents: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    prompts: Conditioning,
    scores: tuple[Velocity, Velocity],
    guidance: float,
) -> Scores:
    """The normalised DMD gradient g [B, F, C, H, W], at least float32, and the estimates it was made of.

    g = (fake - real) / mean|x - real|, the mean over one sample; fake and real are the critic's and the guided
    teacher's x0 of the noised rollout. `scores` is (teacher, critic). Non-finite values are not masked.
    """
    teacher, critic = scores
    dtype = torch.promote_types(latents.dtype, torch.float32)
    fake = clean_from_velocity(noisy, critic(noisy, timesteps, prompts.text), timesteps).to(dtype)
    both = torch.cat((prompts.text, prompts.negative.expand_as(prompts.text)))
    velocity = teacher(noisy.repeat(2, 1, 1, 1, 1), timesteps.repeat(2), both)
    conditional, unconditional = (
        clean_from_velocity(noisy.repeat(2, 1, 1, 1, 1), velocity, timesteps.repeat(2)).to(dtype).chunk(2)
    )
    real = guided(conditional, unconditional, guidance)
    scale = (latents.to(dtype) - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return Scores(latents.detach(), timesteps, fake, conditional, real, (fake - real) / scale)


def dmd_loss(latents: Tensor, gradient: Tensor, gradient_mask: Tensor | None = None) -> Tensor:
    """0.5 mean (x - stopgrad(x - g))^2, so that the derivative by x is g / numel.

    gradient_mask [F], bool: the mean is over these frames alone, and the others get no gradient (`scored_clip`).
    """
    x = latents.to(gradient.dtype)
    squared = (x - (x - gradient).detach()).square()
    return 0.5 * (squared if gradient_mask is None else squared[:, gradient_mask]).mean()


def noised(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The rollout noised for scoring, without graph."""
    return add_noise(latents.detach(), noise, timesteps)
