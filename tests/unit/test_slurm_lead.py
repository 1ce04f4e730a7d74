"""How early a job is warned, and what the planner refuses before it is queued."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mirai_dist.config import RecipeError, load
from mirai_dist.config.cluster import Cluster, load_cluster
from mirai_launch.slurm import lead

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/wan/causal-forcing-chunkwise-mirai-8x8.yaml"
H100 = load_cluster(ROOT / "recipes/clusters/h100-infiniband.yaml")


def of(model: str, cluster: Cluster = H100) -> Cluster:
    return replace(cluster, gpus=replace(cluster.gpus, model=model))


def test_the_warning_covers_a_cycle_and_a_save_twice_and_the_clock() -> None:
    plan = lead.planned(load(RECIPE), H100, 8)
    assert plan is not None and plan.seconds_a_cycle and plan.seconds_a_cycle > 5
    found = lead.warning(H100, plan)
    assert 0 <= found - 120 - 2 * (plan.seconds_a_cycle + plan.seconds_a_save) < 1


def test_a_slower_save_is_warned_of_earlier() -> None:
    """One node writes what eight wrote."""
    few, many = (lead.planned(load(RECIPE, [f"parallel.replicas={n}"]), H100, n) for n in (1, 8))
    assert few and many and few.seconds_a_save > many.seconds_a_save
    assert lead.warning(H100, few) > lead.warning(H100, many)


def test_what_the_cluster_file_says_and_what_nobody_knows() -> None:
    assert lead.warning(replace(H100, warning=77), lead.planned(load(RECIPE), H100, 8)) == 77
    assert lead.planned(load(RECIPE), of(""), 8) is None
    assert lead.warning(of(""), None) == lead.UNKNOWN


def test_a_gpu_that_the_planner_lacks_and_a_run_that_does_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="gpus.model 'h100-80bg' is unknown to the planner; nearest: h100-80gb"):
        lead.planned(load(RECIPE), of("h100-80bg"), 8)
    big = load(RECIPE, ["parallel.recompute=none", "parallel.reshard_after_forward=false"])
    with pytest.raises(RecipeError, match="GiB a rank in .* parallel.over_memory=warn starts it all the same"):
        lead.planned(big, of("l40s"), 8)
