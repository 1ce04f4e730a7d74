"""What a dmd stage measures of its own health (method/health.py), put among the metrics of a position.

Parts go in and numbers come out of `Stage.observe`, after the one reduction over ranks that metrics make anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mirai_dist.method import health
from mirai_dist.models.predictor import PredictorBlock
from mirai_dist.parallel.materialize import own_part
from mirai_dist.state.ema import local

if TYPE_CHECKING:
    from mirai_dist.cycle.stages import DmdStage


def timesteps(stage: DmdStage, drawn: Sequence[float], among: range) -> None:
    """How far score timesteps are off the recipe's schedule: of draws from the integers `among`."""
    dmd = stage.recipe.dmd
    schedule = health.Schedule(stage.recipe.flow.shift, dmd.min_timestep, dmd.max_timestep)
    stage.metrics.add("timesteps/deviation", health.timestep_deviation(drawn, schedule, among))


def step_lists(stage: DmdStage) -> None:
    """How far the timesteps that rollouts denoise at are off the recipe's steps, first segment included."""
    used, asked, shift = stage.rollout, stage.recipe.rollout, stage.recipe.flow.shift
    error = max(
        health.step_list_error(used.timesteps, asked.steps, shift),
        health.step_list_error(used.first_timesteps, asked.first_steps, shift),
    )
    stage.metrics.add("timesteps/step_list_error", error)


def gates(stage: DmdStage, predictor: nn.Module) -> None:
    """Gate norms of a gated predictor; the plain one has no gates."""
    blocks = [block for block in predictor.modules() if isinstance(block, PredictorBlock)]
    modulations = [block.modulation for block in blocks if block.modulation is not None]
    if modulations:
        stage.metrics.add_all(health.gate_norms([(local(each), _first_row(each)) for each in modulations]))


def _first_row(parameter: Tensor) -> int:
    """Which row of the whole parameter this rank's part begins with; 0 where it has none."""
    numbers = torch.arange(parameter.shape[0]).unsqueeze(1).expand(parameter.shape)
    rows = own_part(numbers, parameter)[:, 0].tolist()
    return rows[0] if rows else 0
