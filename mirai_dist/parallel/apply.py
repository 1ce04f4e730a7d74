"""Apply a shard plan to a network. Order: recomputation inside, then the units from the inside out.

recompute(network)                 replaces the forward of each block
fully_shard(unit) for each unit    blocks first, the root last, so the root owns what is left
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from mirai_dist.parallel.recompute import recompute
from mirai_dist.plan.shards import ShardPlan


def apply(network: nn.Module, plan: ShardPlan, mesh: DeviceMesh) -> FSDPModule:
    """Shard a (meta-device) network in place. Gradients reduce in fp32 or wider; inputs are cast by the networks."""
    compute = getattr(torch, plan.compute_dtype)
    reduce = torch.promote_types(compute, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    # Segments' keys and values leave a network as views on purpose; nothing here writes in place into an output.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    recompute(network, plan.recompute, plan.keep_attention)
    for unit in plan.units:
        module = network.get_submodule(unit.path) if unit.path else network
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=unit.reshard_after_forward)
    assert isinstance(network, FSDPModule)
    return network
