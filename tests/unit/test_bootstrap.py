"""What the launcher's environment means, before anything is connected."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from mirai_dist.runtime import bootstrap
from mirai_dist.runtime.bootstrap import LaunchError, Place, choose_device, derived_port, find_place

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29400",
}
SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}


def test_torchrun() -> None:
    assert find_place(TORCHRUN) == Place(3, 4, 1, 2, "n1", 29400, "torchrun")
    assert find_place({**SRUN, **TORCHRUN}).launcher == "torchrun"  # torchrun inside a step


def test_srun() -> None:
    place = find_place(SRUN)
    assert place == Place(3, 4, 1, 2, "n1", derived_port(SRUN), "srun")
    first = {**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    assert (find_place(first).address, find_place(first).port) == (place.address, place.port)


def test_several_nodes_never_meet_at_localhost() -> None:
    assert find_place(SRUN).address == "n1"
    one = {**SRUN, "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}
    assert find_place(one).address == "127.0.0.1"


def test_what_the_site_has_set_is_used() -> None:
    place = find_place({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7777"})
    assert (place.address, place.port) == ("10.0.0.1", 7777)


def test_no_launcher_is_a_world_of_one() -> None:
    assert find_place({}) == Place(0, 1, 0, 1, "127.0.0.1", 0, "single")
    batch_script = {"SLURM_JOB_ID": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert find_place(batch_script).launcher == "single"


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({**SRUN, "SLURM_NTASKS": "3"}, "do not add up"),
        ({**SRUN, "SLURM_STEP_NODELIST": "n1"}, "do not add up"),
        ({**SRUN, "SLURM_PROCID": "0"}, "rank 0 is not on the first host"),
    ],
)
def test_contradictions_are_refused(env: dict[str, str], text: str) -> None:
    with pytest.raises(LaunchError, match=text):
        find_place(env)


def test_ports_stay_below_what_the_kernel_hands_out() -> None:
    for job in range(0, 5_000_000, 9973):
        assert 20768 <= derived_port({"SLURM_JOB_ID": str(job)}, 32768) < 32768
        assert 1024 <= derived_port({"SLURM_JOB_ID": str(job)}, 5000) < 5000
    ports = {derived_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0"}, 32768) for job in range(100)}
    assert len(ports) == 100
    steps = {derived_port({"SLURM_JOB_ID": "5", "SLURM_STEP_ID": str(step)}, 32768) for step in range(20)}
    assert len(steps) == 20
    assert derived_port({"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "1"}) != derived_port({"SLURM_JOB_ID": "5"})
    with pytest.raises(LaunchError, match="set MASTER_PORT"):
        derived_port({"SLURM_JOB_ID": "5"}, 1024)


def test_devices() -> None:
    torchrun, srun = Place(1, 4, 1, 2, "n1", 1, "torchrun"), Place(1, 4, 1, 2, "n1", 1, "srun")
    assert choose_device(torchrun, 0) == torch.device("cpu")
    assert choose_device(torchrun, 2) == torch.device("cuda", 1) == choose_device(srun, 8)
    assert choose_device(srun, 1) == torch.device("cuda", 0)
    with pytest.raises(LaunchError, match="2 ranks on this host and 1 visible GPUs"):
        choose_device(torchrun, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the CPU backend")
def test_a_world_of_one_starts_and_stops_without_touching_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*TORCHRUN, *SRUN]:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    world = bootstrap.start()
    try:
        assert (world.rank, world.world_size, world.local_size, world.device) == (0, 1, 1, torch.device("cpu"))
        assert dist.get_backend() == "gloo"
        value = torch.ones(2)
        dist.all_reduce(value)
        assert value.tolist() == [1.0, 1.0]
    finally:
        bootstrap.stop(world)
    assert not dist.is_initialized()
    assert dict(os.environ) == before
