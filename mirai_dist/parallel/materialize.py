"""Give a sharded meta-device network its storage and initial values, without ever holding the whole network.

Initial values are drawn per parameter, keyed by its name, so they do not depend on the world size; only one
full parameter exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Initialise = Callable[[str, Tensor, torch.Generator], None]
GeneratorOf = Callable[[str], torch.Generator]


def allocate(network: nn.Module, device: torch.device) -> None:
    """Undefined storage on `device`. Networks here have no buffers; ValueError if one appears."""
    if next(iter(network.buffers()), None) is not None:
        raise ValueError("a network with buffers needs its own materialisation: to_empty would leave them undefined")
    network.to_empty(device=device)


@torch.no_grad()
def draw(network: nn.Module, initialise: Initialise, generator_of: GeneratorOf) -> None:
    """Fill every parameter of an allocated network."""
    for name, parameter in network.named_parameters():
        full = torch.empty(parameter.shape, dtype=torch.float32)
        initialise(name, full, generator_of(name))
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(own_part(full, parameter))


def own_part(full: Tensor, parameter: Tensor) -> Tensor:
    """This rank's slice of a full tensor laid out like `parameter` (all of it when that is not sharded)."""
    if not isinstance(parameter, DTensor):
        return full
    assert all(p.is_replicate() or isinstance(p, Shard) for p in parameter.placements)
    shape, offset = compute_local_shape_and_global_offset(full.shape, parameter.device_mesh, parameter.placements)
    return full[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]
