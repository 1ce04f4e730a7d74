"""The device mesh: shard inside, replicate outside (HSDP); one replica is plain FSDP."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def build_mesh(ranks: int, replicas: int, device_type: str) -> DeviceMesh:
    """Mesh of all ranks: 1-D ("shard",), or 2-D ("replicate", "shard") with neighbouring ranks in a shard group.

    ValueError when `replicas` does not divide `ranks`.
    """
    if ranks % replicas:
        raise ValueError(f"{replicas} replicas do not divide {ranks} ranks")
    if replicas == 1:
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
