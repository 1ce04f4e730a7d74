"""From the environment to the default process group: torchrun, srun, or a world of one.

Nothing the site has set is overwritten, no environment variable is written at all, and nothing falls back:
an environment that does not say where rank 0 is stops the process with one line.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mirai_dist.runtime import nodelist
from mirai_dist.runtime.rendezvous import LaunchError, derived_port
from mirai_dist.runtime.rendezvous import number as _number


@dataclass(frozen=True)
class World:
    """This rank among all ranks. `local_rank`, `local_size`: among those on this host. `store`: that they share."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int
    host: str
    device: torch.device
    store: dist.Store


@dataclass(frozen=True)
class Place:
    """What the environment says, before anything is connected. `port` 0: the OS chooses (world of one)."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    launcher: str  # torchrun, srun or single


def start(timeout: timedelta = timedelta(minutes=10)) -> World:
    """Initialise the default process group (nccl where there are GPUs, else gloo) and say who this rank is.

    Raises LaunchError if ranks, address or devices do not fit together; `timeout` bounds every collective and
    the wait for the other ranks.
    """
    place = find_place(os.environ)
    host = socket.gethostname()
    device = choose_device(place, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = connect(place, host, timeout)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
    if dist.get_world_size() != place.world_size or dist.get_rank() != place.rank:
        found, said = (dist.get_rank(), dist.get_world_size()), (place.rank, place.world_size)
        raise LaunchError(f"{host}: (rank, ranks) of the process group are {found}; {place.launcher} said {said}")
    return World(place.rank, place.local_rank, place.world_size, place.local_size, host, device, store)


def hosts(world: World) -> tuple[str, ...]:
    """Host of every rank. Collective."""
    found = [""] * world.world_size
    dist.all_gather_object(found, world.host)
    return tuple(found)


def stop(world: World) -> None:
    """Leave the process group at the end of a run that went well. Never on the way out of an error: it may hang."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    dist.destroy_process_group()


def find_place(env: Mapping[str, str]) -> Place:
    """Read the launcher's variables. Raises LaunchError for a set of them that is incomplete or contradicts itself."""
    if "TORCHELASTIC_RUN_ID" in env or ("RANK" in env and "WORLD_SIZE" in env):
        return _torchrun(env)
    if "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env and _number(env, "SLURM_NTASKS") > 1:
        return _slurm(env)
    return Place(0, 1, 0, 1, "127.0.0.1", 0, "single")


def choose_device(place: Place, gpus: int) -> torch.device:
    """The rank's own GPU among the visible ones, or the CPU where none is visible."""
    if gpus == 0:
        return torch.device("cpu")
    if gpus >= place.local_size:
        return torch.device("cuda", place.local_rank)
    if gpus == 1 and place.launcher == "srun":
        return torch.device("cuda", 0)  # SLURM bound one GPU to each task
    what = f"{place.local_size} ranks on this host and {gpus} visible GPUs; start one rank a GPU"
    raise LaunchError(f"{socket.gethostname()}: {what} (--nproc {gpus}), or hide the GPUs with CUDA_VISIBLE_DEVICES=")


def _torchrun(env: Mapping[str, str]) -> Place:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in env]
    if missing:
        what = f"torchrun's variables are set, but {', '.join(missing)} not"
        raise LaunchError(f"{what}; start with torchrun, or unset them")
    return Place(
        rank=_number(env, "RANK"),
        world_size=_number(env, "WORLD_SIZE"),
        local_rank=_number(env, "LOCAL_RANK"),
        local_size=_number(env, "LOCAL_WORLD_SIZE"),
        address=env["MASTER_ADDR"],
        port=_number(env, "MASTER_PORT"),
        launcher="torchrun",
    )


def _slurm(env: Mapping[str, str]) -> Place:
    hosts = nodelist.expand(env["SLURM_STEP_NODELIST"])
    counts = nodelist.tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", ""))
    rank, ranks, node = (_number(env, name) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODEID"))
    if sum(counts) != ranks or len(counts) != len(hosts):
        what = f"SLURM says {ranks} tasks, {len(hosts)} hosts and tasks per node {counts}"
        raise LaunchError(f"{what}, which do not add up; give srun the task shape again")
    if rank == 0 and node != 0:
        # The address below is the first host's: everybody would wait for a rank 0 that is elsewhere.
        raise LaunchError("rank 0 is not on the first host of the step; use srun --distribution=block")
    return Place(
        rank=rank,
        world_size=ranks,
        local_rank=_number(env, "SLURM_LOCALID"),
        local_size=counts[node],
        address=env.get("MASTER_ADDR") or ("127.0.0.1" if len(hosts) == 1 else hosts[0]),
        port=_number(env, "MASTER_PORT") if env.get("MASTER_PORT") else derived_port(env),
        launcher="srun",
    )


def connect(place: Place, host: str, timeout: timedelta, everybody: bool = True) -> dist.Store:
    """The store of all ranks, which rank 0 serves. everybody: rank 0 goes on only when all ranks are connected.

    Raises LaunchError if the address cannot be listened at or reached within `timeout`.
    """
    # torchrun's agent already serves a store at this address; we join it under the names of this process group.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listens = place.rank == 0 and not agent
    end = f"{place.address}:{place.port}"
    try:
        store = dist.TCPStore(place.address, place.port, place.world_size, listens, timeout, everybody)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if listens:
            what = f"cannot listen at {end} ({reason}); set MASTER_PORT to a free port"
        else:
            what = f"rank {place.rank} cannot reach rank 0 at {end} ({reason}); check name and route from here"
        raise LaunchError(f"{host}: {what}") from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"/mirai/attempt_{attempt}", store)
