"""Peaks of a rank as planned, and as followed operator by operator in the run's own updates.

Two ranks that are threads; one of them is followed. The networks are tiny, the videos so large that activations
outweigh weights, as they do in a real run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
    *("video.latent_height=24", "video.latent_width=24", "dmd.critic_updates=1", "foresight.predictor_blocks=2"),
    *("teacher.dim=56", "teacher.ffn_dim=160", "teacher.blocks=3"),
    *("generator.dim=48", "generator.ffn_dim=200", "generator.blocks=3"),
]
RANKS = 2
LEAST, MOST = 0.97, 1.10  # of the peak: too little ends in an error hours later, too much in a needless refusal


class Nobody(nullcontext):
    """Stands for a follower on the rank that is not followed."""

    peak = 0

    def restart(self) -> None: ...


class CudaPeak(nullcontext):
    """What the caching allocator says."""

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def restart(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


Follower = LiveBytes | Nobody | CudaPeak


@contextmanager
def phases_of(stage: Any, follower: Follower, found: dict[str, int]) -> Iterator[None]:
    """Notes the peak of every phase but "data", which is the procedural world's and nobody plans."""
    enter = stage.ledger.phase

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        follower.restart()
        with enter(name):
            yield
        position = stage.positions[stage.position]
        if name != "data":
            found[position] = max(found.get(position, 0), follower.peak)

    with mock.patch.object(stage.ledger, "phase", phase):
        yield


def measured(recipe: schema.Recipe, name: str, follower: Follower) -> dict[str, int]:
    """Peak of each position of a second cycle, when moments and averages are there."""
    found: dict[str, int] = {}
    with follower, tiny.lively():
        stage = tiny.stage_of(recipe, name)
        last = len(recipe.rollout.steps) - 1, None
        with mock.patch.object(stage, "exit_steps", lambda *_: last, create=True):
            tiny.train(stage, len(stage.positions))
            with phases_of(stage, follower, found):
                tiny.train(stage, len(stage.positions))
    return found


def planned(recipe: schema.Recipe, name: str, ranks: int = RANKS) -> dict[str, int]:
    """Bytes of the largest moment of each position."""
    replicas, found = recipe.parallel.replicas, dict[str, int]()
    for moment in memory.moments(recipe, recipe.stages[name], (replicas, ranks // replicas)):
        position = {"generator": "generator", "critic": "critic", "replay": "critic"}.get(moment.update, "update")
        found[position] = max(found.get(position, 0), moment.total)
    return found


SAVING = ("parallel.recompute=block", "parallel.unit=block", "parallel.reshard_after_forward=true")
CASES: list[Any] = [
    ("distil", [*SAVING, "parallel.compute_dtype=bfloat16", "stages.distil.batch.global_size=2"]),
    ("ar_teacher", [*SAVING, "stages.ar_teacher.batch.global_size=2"]),
]
SINKS = [  # that move, in a rollout of many segments
    *("video.latent_height=16", "video.latent_width=16", "video.latent_frames=8", "video.frames_per_segment=1"),
    *("generator.blocks=5", "rollout.window_frames=4", "rollout.sink_frames=2"),
]
SLOW = [
    ("distil", [*SAVING, "stages.distil.batch.global_size=6"]),
    ("distil", [*SAVING, "stages.distil.batch.global_size=4", "parallel.sync_every_micro_batch=true"]),
    ("distil", ["stages.distil.batch.global_size=2", "foresight.preset=release"]),
    ("distil", ["parallel.unit=network", "parallel.compute_dtype=bfloat16", "parallel.replicas=2"]),
    ("distil", [*SAVING, "rollout.kv_grad=leaky", "stages.distil.batch.global_size=2"]),
    ("distil", [*SAVING, *SINKS, "stages.distil.batch.global_size=2"]),
    ("teacher", [*SAVING]),
    ("distil", [*SAVING, "parallel.recompute=selective", "stages.distil.batch.global_size=2"]),
    ("ar_teacher", [*SAVING, "parallel.recompute=selective"]),
    ("teacher", ["parallel.compute_dtype=bfloat16", "stages.teacher.batch.micro_size=2"]),
    ("ar_teacher", [*SAVING, "stages.ar_teacher.kind=diffusion_forcing", "parallel.compute_dtype=bfloat16"]),
    ("few_step", ["parallel.unit=block", "parallel.reshard_after_forward=true"]),
    ("few_step", [*SAVING, "parallel.compute_dtype=bfloat16"]),
    ("few_step", [*SAVING, "stages.few_step.foresight.weight=0.5", "stages.few_step.teacher=teacher"]),
]


CASES += [pytest.param(*each, marks=pytest.mark.slow) for each in SLOW]


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_the_peak_of_each_update(threads: Any, name: str, overrides: list[str]) -> None:
    recipe = tiny.recipe(*LARGE, *overrides)
    found = threads(RANKS, 2 * tiny.TIMEOUT)(lambda rank: measured(recipe, name, Nobody() if rank else LiveBytes()))[0]
    wanted = planned(recipe, name)
    assert wanted.keys() == found.keys()
    for position, peak in found.items():
        assert LEAST * peak <= wanted[position] <= MOST * peak, position


WAN_LIKE = [
    *("video.latent_height=60", "video.latent_width=104", "video.latent_frames=9", "video.frames_per_segment=3"),
    *("teacher.dim=1024", "teacher.ffn_dim=2816", "teacher.heads=8", "teacher.blocks=8"),
    *("generator.dim=768", "generator.ffn_dim=4480", "generator.heads=6", "generator.blocks=8"),
    *("parallel.compute_dtype=bfloat16", "dmd.critic_updates=1", "stages.distil.batch.global_size=2"),
]


@pytest.mark.gpu
def test_the_peak_on_a_gpu() -> None:
    """One rank, at Wan's tokens a frame and head width."""
    recipe = tiny.recipe(*LARGE, *WAN_LIKE, *SAVING)
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with mock.patch.object(tiny, "CPU", torch.device("cuda", 0)):
            found = measured(recipe, "distil", CudaPeak())
    finally:
        dist.destroy_process_group()
    wanted = planned(recipe, "distil", ranks=1)
    assert wanted.keys() == found.keys()
    for position, peak in found.items():
        assert LEAST * peak <= wanted[position] <= MOST * peak, position


def test_the_follower_sees_what_lives() -> None:
    """Storage that is made, freed, resized in place, and kept by autograd alone."""
    with LiveBytes() as follower:
        kept = torch.zeros(1000)
        assert follower.now == follower.peak == 4000
        gone = torch.zeros(500)
        del gone
        assert (follower.now, follower.peak) == (4000, 6000)
        kept.untyped_storage().resize_(0)
        assert follower.now == 0
        weight = torch.ones(100, requires_grad=True)
        loss = (weight * torch.ones(100)).exp().sum()  # exp keeps its result, the product one factor
        assert follower.now == 400 + 400 + 400 + 4
        follower.restart()
        loss.backward()
        assert follower.peak > follower.now
