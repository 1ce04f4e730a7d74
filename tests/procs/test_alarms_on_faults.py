"""Injected faults raise their own alarm within 20 cycles, and a healthy run none.

A dmd stage of untrained networks is not a healthy run, so a teacher and a few-step start are trained first, for
seconds: the teacher obeys its prompts a little, which is all that guidance needs to have an effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mirai_dist.config import schema
from mirai_dist.cycle import phases
from mirai_dist.cycle.roles import Role
from mirai_dist.cycle.stages import DmdStage
from mirai_dist.observe.alarms import Change
from mirai_dist.state.ema import local, named_tensors
from tests.procs import tiny
from tests.procs.conftest import run_threads

CYCLES = 20
BATCH = 8
TEACHER, AR_TEACHER, FEW_STEP = 300, 150, 100  # cycles of training
STAGES = ("teacher", "ar_teacher", "few_step", "distil")
OVERRIDES = (
    "video.latent_frames=6", "video.frames_per_segment=2", "video.latent_height=4", "video.latent_width=4",
    "world.speed=2.5", "world.radius=5.5",
    *(f"{network}.{key}" for network in ("teacher", "generator")
      for key in ("dim=64", "ffn_dim=128", "heads=2", "freq_dim=32")),
    *(f"stages.{stage}.batch.{size}={BATCH}" for stage in STAGES for size in ("global_size", "micro_size")),
    *(f"stages.{stage}.optimizer.{key}" for stage in STAGES[:2] for key in ("lr=3e-3", "clip_norm=1")),
    f"stages.distil.cycles={CYCLES}",
)
Weights = dict[str, Tensor]
pytestmark = pytest.mark.slow


class Start(NamedTuple):
    """Weights that a dmd stage starts from."""

    teacher: Weights
    few_step: Weights


@torch.no_grad()
def copied(network: nn.Module) -> Weights:
    return {name: tiny.whole(tensor) for name, tensor in named_tensors(network).items()}


@torch.no_grad()
def fill(network: nn.Module, weights: Weights) -> None:
    """On one rank a shard is the whole."""
    for name, tensor in named_tensors(network).items():
        local(tensor).copy_(weights[name])


@pytest.fixture(scope="module")
def start() -> Start:
    recipe = tiny.recipe(*OVERRIDES)

    def body(rank: int) -> Start:
        teacher = tiny.stage_of(recipe, "teacher")
        tiny.train(teacher, TEACHER)
        trained = copied(teacher.trained.network)
        ar_teacher = tiny.stage_of(recipe, "ar_teacher")
        fill(ar_teacher.trained.network, trained)
        tiny.train(ar_teacher, AR_TEACHER)
        few_step = tiny.stage_of(recipe, "few_step")
        causal = copied(ar_teacher.trained.network)
        for network in (few_step.trained.network, few_step.teacher.network):
            fill(network, causal)
        few_step.trained.average = None
        few_step.trained.average_if_due()
        few_step.refresh_target()
        tiny.train(few_step, FEW_STEP)
        return Start(trained, copied(few_step.trained.network))

    return run_threads(1, body, tiny.TIMEOUT)[0]


def run(start: Start, recipe: schema.Recipe, fault: Callable[[DmdStage], AbstractContextManager[Any]]) -> list[Change]:
    """What the alarms of a dmd stage from `start` say, with `fault` in it."""

    def body(rank: int) -> list[Change]:
        stage = tiny.stage_of(recipe, "distil")
        fill(stage.generator.network, start.few_step)
        for role in (stage.teacher, stage.critic):
            fill(role.network, start.teacher)
        changes: list[Change] = []
        with fault(stage):
            for _ in range(CYCLES * len(stage.positions)):
                stage.step()
                changes += stage.observe().changes
                stage.advance()
        return changes

    return run_threads(1, body, tiny.TIMEOUT)[0]


def healthy(stage: DmdStage) -> AbstractContextManager[Any]:
    return nullcontext()


def skipped_step(stage: DmdStage) -> AbstractContextManager[Any]:
    return mock.patch.object(stage.critic.optimizer, "step", lambda: None)


def rate_of_zero(stage: DmdStage) -> AbstractContextManager[Any]:
    step = Role.step

    def still(role: Role, norm: Tensor) -> dict[str, Tensor | float]:
        if role is not stage.critic:
            return step(role, norm)
        with mock.patch("mirai_dist.cycle.roles.learning_rate", lambda settings, update, total: 0.0):
            return step(role, norm)

    return mock.patch.object(Role, "step", still)


def unshifted_scores(stage: DmdStage) -> AbstractContextManager[Any]:
    return mock.patch.object(phases, "score_timestep", lambda draw, shift, low, high: min(max(float(draw), low), high))


def unshifted_steps(stage: DmdStage) -> AbstractContextManager[Any]:
    steps = tuple(float(step) for step in stage.recipe.rollout.steps)
    return mock.patch.object(stage, "rollout", dataclasses.replace(stage.rollout, timesteps=steps))


GUIDANCE_X10 = "dmd.guidance=10"  # tiny.yaml: 1


def test_a_healthy_run_raises_nothing(start: Start) -> None:
    changes = run(start, tiny.recipe(*OVERRIDES), healthy)
    assert [change.sentence for change in changes] == []


@pytest.mark.parametrize(
    ("alarm", "override", "fault"),
    [
        ("critic_frozen", (), skipped_step),
        ("critic_frozen", (), rate_of_zero),
        ("score_scale", (GUIDANCE_X10,), healthy),
        ("score_timesteps", (), unshifted_scores),
        ("rollout_timesteps", (), unshifted_steps),
    ],
)
def test_a_fault_raises_its_own_alarm(start: Start, alarm: str, override: tuple[str, ...], fault: Any) -> None:
    changes = run(start, tiny.recipe(*OVERRIDES, *override), fault)
    assert [(change.name, change.raised) for change in changes] == [(alarm, True)]
