"""Collectives as planned, and as a counting process group sees them in the run's own updates on a fake mesh.

The process group is torch's fake one: rank 0 of any number of ranks, whose collectives move nothing. What they are
handed is real: FSDP2's own, in a cycle of a tiny dmd stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore  # torch's own test helper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirai_dist.config import schema
from mirai_dist.parallel.engine_fsdp import FsdpEngine
from mirai_dist.plan import passes, traffic
from tests.procs import tiny

COLLECTIVES = {
    "c10d::_allgather_base_": (traffic.GATHER, max),
    "c10d::_reduce_scatter_base_": (traffic.REDUCE_SCATTER, max),
    "c10d::allreduce_": (traffic.ALL_REDUCE, max),
}


@contextmanager
def ranks(count: int) -> Iterator[None]:
    """Rank 0 of a fake process group."""
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Listener(TorchDispatchMode):
    """Counts every collective and the bytes of the largest tensor it is handed: the whole of what it gathers or
    reduces."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: dict[str, traffic.Moved] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            tensors = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            name, which = COLLECTIVES[function._schema.name]
            one = traffic.Moved(1, which(each.nbytes for each in tensors))
            self.moved[name] = self.moved.get(name, traffic.Moved()) + one
        return function(*args, **(kwargs or {}))


def counted(recipe: schema.Recipe, name: str, count: int, exit_step: int) -> dict[str, traffic.Moved]:
    """Collectives of the second cycle: what a network keeps gathered over a cycle's end is then as it always is."""
    with ranks(count), tiny.lively():
        stage = tiny.stage_of(recipe, name)
        # What was "gathered" is whatever lay in memory, so gradients may be anything.
        finite = mock.patch.object(FsdpEngine, "norm", lambda *_: torch.tensor(1.0))
        exits = mock.patch.object(stage, "exit_steps", lambda *_: (exit_step, None), create=True)
        with finite, exits:
            for _ in stage.positions:
                stage.step()
                stage.advance()
            with Listener() as listener:
                for _ in stage.positions:
                    stage.step()
                    stage.advance()
    return listener.moved


def planned(recipe: schema.Recipe, name: str, count: int) -> dict[str, traffic.Moved]:
    """The same from the planner, in the steady state."""
    stage, replicas = recipe.stages[name], recipe.parallel.replicas
    follower = traffic.follower(recipe, stage, (replicas, count // replicas))
    updates = [update for each in passes.updates(recipe, stage, count) for update in [each] * each.times]
    for update in updates:
        follower.update(update)
    found: dict[str, traffic.Moved] = {}
    for update in updates:
        for (_, collective), moved in follower.update(update).items():
            found[collective] = found.get(collective, traffic.Moved()) + moved
    return found


def one_exit(recipe: schema.Recipe, exit_step: int) -> Any:
    """The planner's expectation replaced by one exit step."""
    expected = passes.rollout

    def rollout(given: schema.Recipe, batch: int, gradient: bool = False) -> list[passes.Pass]:
        counts: dict[passes.Pass, float] = {}
        for each in passes._rollout(given, batch, (exit_step, exit_step), gradient):
            counts[each] = counts.get(each, 0) + 1
        return [passes.replace(each, count=count) for each, count in counts.items()]

    assert expected is not rollout
    return mock.patch.object(passes, "rollout", rollout)


def compare(recipe: schema.Recipe, name: str, count: int, exit_step: int = 0) -> dict[str, traffic.Moved]:
    found = counted(recipe, name, count, exit_step)
    with one_exit(recipe, exit_step):
        wanted = planned(recipe, name, count)
    assert wanted.keys() == found.keys()
    for collective, moved in found.items():
        assert wanted[collective].count == pytest.approx(moved.count), collective
        assert wanted[collective].payload == pytest.approx(moved.payload), collective
    return found


def layout(unit: str, reshard: bool, *more: str) -> list[str]:
    return [f"parallel.unit={unit}", f"parallel.reshard_after_forward={str(reshard).lower()}", *more]


LAYOUTS = [
    layout("block", True, "parallel.recompute=block", "parallel.compute_dtype=bfloat16"),
    layout("block", False),
    layout("network", True),
    layout("network", False, "parallel.sync_every_micro_batch=true"),
    layout("block", True, "rollout.kv_grad=leaky", "foresight.preset=release"),
    layout("network", True, "rollout.kv_grad=leaky", "stages.distil.batch.micro_size=2", "dmd.critic_updates=1"),
]


CASES = [*((each, 4, 1) for each in LAYOUTS), (LAYOUTS[0], 8, 2), (LAYOUTS[3], 8, 8), (LAYOUTS[0], 1, 1)]


@pytest.mark.parametrize(("overrides", "count", "replicas"), CASES)
def test_a_cycle_of_dmd(overrides: list[str], count: int, replicas: int) -> None:
    recipe = tiny.recipe(*overrides, f"parallel.replicas={replicas}", f"stages.distil.batch.global_size={2 * count}")
    compare(recipe, "distil", count, exit_step=1)


@pytest.mark.parametrize(("replicas", "overrides"), [(1, LAYOUTS[0]), (128, LAYOUTS[3])])
def test_a_thousand_ranks(replicas: int, overrides: list[str]) -> None:
    recipe = tiny.recipe(*overrides, f"parallel.replicas={replicas}", "stages.distil.batch.global_size=2048")
    found = compare(recipe, "distil", 1024)
    assert (traffic.ALL_REDUCE in found) == (replicas > 1)
    assert math.isfinite(sum(moved.payload for moved in found.values()))


@pytest.mark.parametrize("overrides", LAYOUTS[:2], ids=lambda o: ",".join(o))
def test_foresight_of_a_few_step_start(overrides: list[str]) -> None:
    settings = ["stages.few_step.foresight.weight=0.5", "stages.few_step.teacher=teacher"]
    compare(tiny.recipe(*overrides, *settings, "stages.few_step.batch.global_size=16"), "few_step", 8)


@pytest.mark.parametrize("overrides", LAYOUTS[:2], ids=lambda o: ",".join(o))
@pytest.mark.parametrize("name", ["teacher", "ar_teacher", "few_step"])
def test_an_update_of_an_earlier_stage(name: str, overrides: list[str]) -> None:
    compare(tiny.recipe(*overrides, f"stages.{name}.batch.global_size=16"), name, 8)
