"""Shard plans as data: units, dtypes, recomputation; and what a plan of one network cannot contradict."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from mirai_dist.config import load, schema
from mirai_dist.plan.shards import ShardPlan, Unit, predictor_plan, ranks_per_shard, wan_plan

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny" / "video_mirai.yaml"
EVERY = [
    schema.Parallel(compute_dtype=dtype, unit=unit, reshard_after_forward=reshard, recompute=recompute)
    for dtype, unit, reshard, recompute in itertools.product(
        ("bfloat16", "float32"), ("block", "network"), (True, False), ("block", "selective", "none"))
]


def test_a_unit_a_block_and_the_root_last() -> None:
    """fully_shard gives a unit what no earlier unit took: the root must come last to own the rest."""
    plan = wan_plan(schema.Parallel(), blocks=3, trained=True)
    assert [unit.path for unit in plan.units] == ["blocks.0", "blocks.1", "blocks.2", ""]
    assert [unit.path for unit in wan_plan(schema.Parallel(unit="network"), 3, trained=True).units] == [""]


@pytest.mark.parametrize("parallel", EVERY)
def test_every_recipe_of_the_section(parallel: schema.Parallel) -> None:
    trained, frozen = (wan_plan(parallel, 2, trained=each) for each in (True, False))
    for plan in (trained, frozen):
        assert {unit.reshard_after_forward for unit in plan.units} == {parallel.reshard_after_forward}
        assert plan.compute_dtype == parallel.compute_dtype
        assert plan.units[-1].path == "" and len({unit.path for unit in plan.units}) == len(plan.units)
    assert trained.storage_dtype == "float32", "masters are wide"
    assert frozen.storage_dtype == parallel.compute_dtype, "nothing is gained by storing more than is computed with"
    assert trained.recompute == (("blocks.0", "blocks.1") if parallel.recompute != "none" else ())
    assert trained.keep_attention == (parallel.recompute == "selective")
    assert frozen.recompute == () and not frozen.keep_attention, "a frozen network has no backward"
    assert trained.units == frozen.units


def test_the_predictor_is_one_unit_that_stays() -> None:
    for parallel in EVERY:
        plan = predictor_plan(parallel, bf16_masters=False)
        assert plan.units == (Unit("", False),) and plan.recompute == () and plan.storage_dtype == "float32"
        assert plan.compute_dtype == parallel.compute_dtype
        assert predictor_plan(parallel, bf16_masters=True) == dataclasses.replace(plan, storage_dtype="bfloat16")


@pytest.mark.parametrize("every", [True, False])
def test_reduction_of_micro_batches_is_passed_on(every: bool) -> None:
    parallel = schema.Parallel(sync_every_micro_batch=every)
    plans: list[ShardPlan] = [wan_plan(parallel, 1, trained=True), predictor_plan(parallel, False)]
    assert [plan.sync_every_micro_batch for plan in plans] == [every, every]


def test_ranks_of_a_shard_group() -> None:
    recipe = load(RECIPE).recipe
    hybrid = dataclasses.replace(recipe, parallel=schema.Parallel(replicas=3))
    assert ranks_per_shard(recipe, 8) == 8 and ranks_per_shard(hybrid, 6) == 2
    with pytest.raises(ValueError, match="parallel.replicas = 3 does not divide 8 ranks"):
        ranks_per_shard(hybrid, 8)
