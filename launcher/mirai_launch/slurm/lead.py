"""What the planner says of a job before it is queued: whether it fits, and how early it must be warned of its end."""

from __future__ import annotations

import math

from mirai_dist.config import RecipeError, Resolved
from mirai_dist.config.cluster import Cluster
from mirai_dist.plan import estimate, gpus
from mirai_dist.plan.estimate import Plan
from mirai_dist.plan.verdict import refuse_over

CLOCK = 120  # seconds: SLURM looks at limits now and then, and all nodes must come to see the STOP file
UNKNOWN = 600  # seconds where nothing is known of the GPU
CAUTION = 2.0  # the planner's seconds are a model


def planned(resolved: Resolved, cluster: Cluster, nodes: int) -> Plan | None:
    """The plan of the job; None where the cluster file does not say which GPU its nodes have.

    Raises RecipeError where it is predicted over the GPU's memory, unless `parallel.over_memory` is warn.
    """
    model = cluster.gpus.model
    if not model:
        return None
    gpu = gpus.find(model)
    if gpu is None:
        what = f"gpus.model {model!r} is unknown to the planner; nearest: {', '.join(gpus.nearest(model))}"
        raise RecipeError("cluster file", f"{what}; or leave it empty")
    return refuse_over(resolved, estimate.Cluster(nodes, cluster.ranks_per_node, gpu))


def warning(cluster: Cluster, found: Plan | None) -> int:
    """Seconds before its time limit at which a job saves: those of the cluster file, else enough for a cycle and a
    save by the plan, twice, and for SLURM's clock."""
    if cluster.warning:
        return cluster.warning
    if found is None or found.seconds_a_cycle is None:
        return UNKNOWN
    return CLOCK + math.ceil(CAUTION * (found.seconds_a_cycle + found.seconds_a_save))
