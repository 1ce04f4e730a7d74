"""The FSDP2 engine: build a sharded network, accumulate gradients, take one checked and clipped optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mirai_dist.parallel.apply import apply
from mirai_dist.parallel.materialize import allocate
from mirai_dist.parallel.timed import Around, time_collectives
from mirai_dist.plan.shards import ShardPlan


class NonFiniteError(RuntimeError):
    """A gradient is infinite or NaN; raised on every rank before the optimizer moves. Never requeued."""

    exit_code = 20


@dataclass(frozen=True)
class FsdpEngine:
    """Builds and steps networks sharded over one mesh. waiting: put around each collective (parallel/timed.py)."""

    mesh: DeviceMesh
    device: torch.device
    waiting: Around = nullcontext

    def build(self, network: nn.Module, plan: ShardPlan, fill: Callable[[nn.Module], None]) -> nn.Module:
        """Shard a meta-device network by its plan, allocate it and fill it (with draws or from a file), each rank
        its own shards; frozen plans hold compute-dtype parameters."""
        network.to(getattr(torch, plan.storage_dtype))
        self.shard(network, plan)
        allocate(network, self.device)
        fill(network)
        return network

    def shard(self, network: nn.Module, plan: ShardPlan) -> None:
        """Shard a network; one that is on the device already keeps each rank's part alone."""
        apply(network, plan, self.mesh)
        time_collectives(network, self.waiting)

    def accumulate(self, network: nn.Module, plan: ShardPlan, last: bool) -> None:
        """Announce a micro-batch: gradients are reduced over ranks after the last one only, unless planned."""
        assert isinstance(network, FSDPModule)
        network.set_requires_gradient_sync(last or plan.sync_every_micro_batch)

    def norm(self, network: nn.Module) -> Tensor:
        """Global gradient norm, equal on all ranks. Raises NonFiniteError, on all ranks alike, if it is not finite."""
        norm = get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        with self.waiting():
            whole: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(whole):
            raise NonFiniteError(f"gradient norm is {whole.item()}")
        return whole

    def step(self, network: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, norm: Tensor) -> None:
        """Scale gradients of this global norm down to `clip_norm`, step, and forget them."""
        clip_grads_with_norm_([p for p in network.parameters() if p.grad is not None], clip_norm, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def release(self, network: nn.Module) -> None:
        """Free gathered parameters, so that a later forward gathers the stepped or loaded ones."""
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
