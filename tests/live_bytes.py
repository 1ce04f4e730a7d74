"""Bytes of tensor storage that are alive, followed operator by operator: a device's allocator, for the CPU.

A dispatch mode sees every tensor that an operator of its thread makes, backward's included, and `UntypedStorage.
resize_` is how FSDP frees and refills what it gathered. What an operator uses inside is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows what operators make inside. `now` bytes are alive; `peak` is the most there was since `restart`.

    One at a time in a process: it patches torch's storages.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[Any, int]] = {}  # by address of the storage object: what tells its end, its bytes
        self.now = self.peak = 0

    def __enter__(self) -> LiveBytes:
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in self._alive:
                self._count(storage)
            return result

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resized)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def restart(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it asks again for its local tensor, whose storage is the one there is
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and each.device.type != "meta":
                storage = each.untyped_storage()
                if id(storage) not in self._alive:
                    self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        end, before = self._alive.get(key, (None, 0))
        self._alive[key] = (end or weakref.ref(storage, lambda _: self._ended(key)), size)
        self.now += size - before
        self.peak = max(self.peak, self.now)

    def _ended(self, key: int) -> None:
        _, size = self._alive.pop(key)
        self.now -= size
