"""Before anything is allocated: does the planner expect this run to fit on the devices it has?"""

from __future__ import annotations

import torch

from mirai_dist.config import Resolved
from mirai_dist.plan.estimate import Cluster
from mirai_dist.plan.gpus import of_model
from mirai_dist.plan.host import cpu_cluster
from mirai_dist.plan.verdict import headline, refusal, refuse_over
from mirai_dist.runtime.bootstrap import World


def budget(resolved: Resolved, ranks: World) -> str:
    """What the plan says of this run, in one line.

    Raises RecipeError where it predicts more memory than a device has, unless `parallel.over_memory` is warn.
    """
    found = refuse_over(resolved, cluster_of(ranks))
    return f"{headline(found)}; over the limit: {refusal(found)}" if found.fits is False else headline(found)


def cluster_of(ranks: World) -> Cluster:
    """The cluster that these ranks are, as far as this one can see: its own device, and as many ranks on each host."""
    nodes, each = divmod(ranks.world_size, ranks.local_size)
    nodes, each = (1, ranks.world_size) if each else (nodes, ranks.local_size)
    if ranks.device.type != "cuda":
        return cpu_cluster(nodes, each)
    properties = torch.cuda.get_device_properties(ranks.device)
    return Cluster(nodes, each, of_model(properties.name), properties.total_memory)
