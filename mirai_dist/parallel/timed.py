"""FSDP2's collectives, each inside a block of the caller's choice, through FSDP2's own hook for them.

What they send and when stays as FSDP2 has it; only their time can be told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

Around = Callable[[], AbstractContextManager[None]]


def time_collectives(network: nn.Module, around: Around) -> None:
    """Run every all-gather and reduce-scatter of a sharded network inside `around()`."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_Gather(around))  # pyright: ignore[reportArgumentType]  its base is private
            module.set_custom_reduce_scatter(_Scatter(around))  # pyright: ignore[reportArgumentType]


class _Collective:
    def __init__(self, around: Around) -> None:
        self._around = around

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Collective):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        # the name that torch 2.13 gave it; looked up at the call, as FSDP2 does
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self._around():
            return gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _Scatter(_Collective):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        with self._around():
            return scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
