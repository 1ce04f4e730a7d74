"""Peaks of a rank as planned, and as followed operator by operator in the run's own updates.

Two ranks that are threads; one of them is followed. The networks are of the tiny shapes, the videos so large that
activations outweigh weights, as they do in a real run.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mirai_dist.config import schema
from mirai_dist.plan import memory
from tests.live_bytes import LiveBytes
from tests.procs import tiny

LARGE = [
    "video.latent_height=24",
    "video.latent_width=24",
    "teacher={dim: 56, ffn_dim: 160, heads: 2, blocks: 3, freq_dim: 16}",
    "generator={dim: 48, ffn_dim: 200, heads: 2, blocks: 3, freq_dim: 16}",
    "critic={dim: 48, ffn_dim: 200, heads: 2, blocks: 3, freq_dim: 16}",
]


def measured(recipe: schema.Recipe, name: str, follower: Any) -> dict[str, int]:
    """Peak of each update of the second cycle of a stage on this rank, by the name of the position."""
    with follower, tiny.lively():
        stage = tiny.stage_of(recipe, name)
        last = len(recipe.rollout.steps) - 1
        found: dict[str, int] = {}
        with mock.patch.object(stage, "exit_steps", lambda *_: (last, None), create=True):
            for cycle in range(2):
                for position in stage.positions:
                    follower.restart()
                    stage.step()
                    stage.metrics.reduce()
                    stage.advance()
                    if cycle:
                        found[position] = max(follower.peak, found.get(position, 0))
    return found


def planned(recipe: schema.Recipe, name: str, ranks: int) -> dict[str, memory.Moment]:
    """The largest moment of each position."""
    replicas = recipe.parallel.replicas
    found: dict[str, memory.Moment] = {}
    for moment in memory.moments(recipe, recipe.stages[name], (replicas, ranks // replicas)):
        position = {"generator": "generator"}.get(moment.update, "critic" if name == "distil" else "update")
        if position not in found or found[position].total < moment.total:
            found[position] = moment
    return found
