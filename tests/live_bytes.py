"""Bytes of tensor storage that are alive, followed operator by operator: a device's allocator, for the CPU.

A dispatch mode sees every tensor that an operator of its thread makes, backward's included; storages that FSDP frees
and fills again in place are measured anew each time. What an operator uses inside is not seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Follows what operators make inside, and what `adopt` was given. `peak` is the most there was since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: Any = WeakIdKeyDictionary()
        self.peak = 0

    def adopt(self, *tensors: torch.Tensor) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._see(local)

    def restart(self) -> None:
        self.peak = self.now

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for storage in list(self._storages.keys()))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and not isinstance(each, DTensor):
                self._see(each)
        self.peak = max(self.peak, self.now)
        return made

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            self._storages[tensor.untyped_storage()] = None
