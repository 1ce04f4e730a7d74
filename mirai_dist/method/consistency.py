"""Causal consistency distillation: the few-step start of the generator (Causal-Forcing; spec 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mirai_dist.method.dmd import Conditioning
from mirai_dist.method.flow import add_noise, clean_from_velocity, expand_like
from mirai_dist.method.teacher_forcing import StateNetwork, TeacherForcedNetwork, guided_velocity


class ConsistencyNetworks(NamedTuple):
    """The student, its moving average (the target) and the frozen AR teacher, all teacher-forced."""

    student: StateNetwork
    target: TeacherForcedNetwork
    teacher: TeacherForcedNetwork


class Neighbours(NamedTuple):
    """Two neighbouring timesteps of the Euler grid, [B, F] each, equal over a sample's frames."""

    timesteps: Tensor
    next_timesteps: Tensor


def consistency_loss(
    networks: ConsistencyNetworks, clean: Tensor, noise: Tensor, at: Neighbours, prompts: Conditioning, guidance: float
) -> tuple[Tensor, Tensor | None]:
    """(loss, the student's states): mean squared distance between the student's x0 at t and the target's x0 one
    teacher step later.

    The teacher's step is guided as unconditional + guidance (conditional - unconditional), both in one call. The
    boundary condition holds by parametrisation: at t = 0, x0 is the input. The last interval of the grid, which ends
    at t = 0, is drawn like the others: it anchors the target to the data (the public code leaves it out).

    Latents move in at least float32, whatever they are stored in: neighbours near t = 1000 are 4 timesteps apart,
    less than bfloat16 resolves of a value near one.
    """
    wide = torch.promote_types(clean.dtype, torch.float32)
    clean, noise = clean.to(wide), noise.to(wide)
    noisy = add_noise(clean, noise, at.timesteps)
    with torch.no_grad():
        both = torch.cat((prompts.text, prompts.negative.expand_as(prompts.text)))
        double = (noisy.repeat(2, 1, 1, 1, 1), at.timesteps.repeat(2, 1), both, clean.repeat(2, 1, 1, 1, 1))
        velocity = guided_velocity(networks.teacher(*double), guidance)
        step = expand_like(at.next_timesteps, noisy) - expand_like(at.timesteps, noisy)
        nearer = (noisy + step * velocity).to(wide)
        velocity = networks.target(nearer, at.next_timesteps, prompts.text, clean)
        goal = clean_from_velocity(nearer, velocity, at.next_timesteps)
    velocity, hidden = networks.student(noisy, at.timesteps, prompts.text, clean)
    return (clean_from_velocity(noisy, velocity, at.timesteps) - goal).square().mean(), hidden
