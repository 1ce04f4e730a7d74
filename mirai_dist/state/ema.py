"""Exponential moving average of the weights, kept in fp32 on each rank's own shard: an update communicates nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: the local shard of a DTensor (storage shared), the tensor itself otherwise."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(module: nn.Module) -> None:
    """Free every gathered copy of the parameters, so that the shards are the only weights there are."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by plain name, as shards.

    `nn.Module.state_dict` strips the recompute wrapper from the names and reshards FSDP modules (torch's own hooks);
    `keep_vars` makes it return the very parameters that the optimizer holds.
    """
    return module.state_dict(keep_vars=True)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with requires_grad by plain name, as shards."""
    return {name: tensor for name, tensor in named_tensors(module).items()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad}


class Ema:
    """average <- decay * average + (1 - decay) * weight, in fp32, over the trainable parameters of `module`.

    The average starts as a copy of the weights. It holds on to the module's sharded parameters: build it after
    `fully_shard`, and rebuild it when they are replaced. Raises ValueError when decay is outside [0, 1) or nothing
    is trainable.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay is {decay}, must be in [0, 1)")
        self.decay = decay
        self.updates = 0
        self._weights = trainable(module)
        if not self._weights:
            raise ValueError(f"ema of {type(module).__name__}: no parameter is trainable")
        self._averages = {name: weight.detach().float().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average toward the present weights; call it once after each optimizer step of the network."""
        weights = [local(weight.detach()).float() for weight in self._weights.values()]
        torch._foreach_lerp_([local(average) for average in self._averages.values()], weights, 1 - self.decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the weights of `module` (sharded as the averaged one is) with the average, in its own dtype.

        Raises ValueError naming the first parameter that the module lacks or holds in another shape or sharding.
        """
        targets = named_tensors(module)
        for name, average in self._averages.items():
            target = targets.get(name)
            if target is None or local(target).shape != local(average).shape or target.shape != average.shape:
                found = "no such parameter" if target is None else f"shape {tuple(target.shape)}"
                raise ValueError(f"ema {name} {tuple(average.shape)}: the module has {found}, or shards it otherwise")
            local(target.detach()).copy_(local(average))

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Inside, `module` computes with the average; afterwards its raw weights are back, bit for bit.

        The raw shards are kept aside on the device. A module that FSDP keeps gathered is resharded on both sides,
        because a forward would otherwise use the gathered copy of the other weights.
        """
        targets = named_tensors(module)
        raw = {name: local(targets[name].detach()).clone() for name in self._averages if name in targets}
        try:
            self.copy_to(module)
            yield
        finally:
            reshard(module)
            with torch.no_grad():
                for name, weight in raw.items():
                    local(targets[name].detach()).copy_(weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by plain parameter name, fp32, sharded as the weights are; the live storage, not a copy."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take averages over from another of the same sharding. Raises KeyError naming a missing parameter."""
        for name, average in self._averages.items():
            if name not in state:
                raise KeyError(f"ema: the state lacks {name}")
            local(average).copy_(local(state[name]))
