"""The meeting of a step's tasks: sockets on this machine, ranks as threads."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mirai_dist.runtime import rendezvous
from mirai_dist.runtime.rendezvous import LaunchError, Step, UnreachableError, candidates, command, environment, meet

PATIENCE = 20.0


def step(rank: int, ranks: int = 2, node: int = 0, token: str = "mirai 1.0.0") -> Step:
    return Step(rank, ranks, node, ("localhost", "n2", "n3")[: max(ranks, node + 1)], token)


def ports(count: int) -> list[int]:
    """Ports that nobody holds now."""
    probes = [socket.create_server(("", 0)) for _ in range(count)]
    found = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return found


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Results or exceptions of calls that run at the same time."""
    results: list[Any] = [None] * len(calls)

    def call(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@contextmanager
def somebody(port: int, says: bytes) -> Iterator[None]:
    """A service that has nothing to do with us."""
    server = socket.create_server(("", port))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(says)
                connection.recv(4096)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def test_all_learn_one_free_port() -> None:
    free = ports(4)
    found = together(*(lambda r=r: meet(step(r, 3), free, None, PATIENCE) for r in range(3)))
    assert found == [free[1]] * 3


def test_ports_of_others_are_passed_over_whatever_they_say() -> None:
    free = ports(5)
    with somebody(free[0], b"HTTP/1.1 400\r\n\r\n"), somebody(free[1], b"{}\n"), somebody(free[3], b""):
        found = together(*(lambda r=r: meet(step(r), free, None, PATIENCE) for r in range(2)))
    assert found == [free[4]] * 2  # 2 was the meeting's own


def test_a_port_that_the_site_has_set_is_used_or_refused() -> None:
    *free, own = ports(3)
    assert together(*(lambda r=r: meet(step(r), free, own, PATIENCE) for r in range(2))) == [own] * 2
    with somebody(own, b""), pytest.raises(LaunchError, match=f"port {own} is taken; set MASTER_PORT to a free one"):
        meet(step(0), free, own, PATIENCE)
    with somebody(free[0], b""), pytest.raises(LaunchError, match=f"port {free[0]} is taken"):
        meet(step(0), free[:1], None, PATIENCE)


def test_who_never_came_is_named_and_who_came_is_told() -> None:
    free = ports(3)
    host, guest = together(
        lambda: meet(step(0, 3), free, None, 2.0), lambda: meet(step(1, 3, node=1), free, None, 2.0)
    )
    assert isinstance(host, UnreachableError)
    assert "only 2 of 3 tasks came in 2 s; nothing from n3" in str(host)
    assert (host.suspects, host.exit_code, guest) == (["n3"], 30, None)


def test_a_first_host_that_nobody_reaches_suspects_itself() -> None:
    with pytest.raises(UnreachableError, match="this host itself may be out of reach") as error:
        meet(step(0, 3), ports(2), None, 0.5)
    assert error.value.suspects == ["localhost"]


def test_a_first_host_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_ANSWER", 0.5)
    free = ports(2)
    with pytest.raises(UnreachableError) as error:
        meet(step(1, node=1), free, None, 1.0)
    assert f"(rank 1) cannot reach localhost, where rank 0 is, at ports {free[0]} to {free[1]}" in str(error.value)
    assert "Connection refused" in str(error.value)
    assert (error.value.suspects, error.value.exit_code) == (["localhost"], 30)


def test_the_cluster_files_patience_names_it_within_a_minute() -> None:
    from mirai_dist.config.cluster import Cluster, Gpus

    cluster = Cluster(name="x", time="1:00:00", gpus=Gpus(per_node=8))
    assert cluster.meeting + rendezvous._ANSWER + rendezvous._CALL < 60


def test_two_nodes_of_one_name_are_refused() -> None:
    free = ports(3)
    host, _ = together(lambda: meet(step(0), free, None, PATIENCE), lambda: meet(step(1, node=1), free, None, PATIENCE))
    assert isinstance(host, LaunchError)
    assert f"nodes 0 and 1 of the job are both called {socket.gethostname()}" in str(host)


def test_a_task_of_another_job_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_ANSWER", 0.5)
    free = ports(3)

    def stranger() -> object:
        return meet(step(1, token="mirai 2.0.0"), free, None, 1.0)

    def late() -> object:
        time.sleep(1.0)
        return meet(step(1), free, None, PATIENCE)

    host, other, ours = together(lambda: meet(step(0), free, None, PATIENCE), stranger, late)
    assert host == ours == free[1]
    assert isinstance(other, UnreachableError)


def test_candidates_differ_by_attempt_and_stay_below_the_kernels_range() -> None:
    first = candidates({"SLURM_JOB_ID": "5"}, 32768)
    assert len(set(first)) == 16 and max(first) < 32768
    assert candidates({"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "1"}, 32768)[0] != first[0]
    assert len(candidates({"SLURM_JOB_ID": "5"}, 1026)) == 2


def test_a_task_becomes_a_rank_or_a_torchrun() -> None:
    rest = ["-m", "mirai_dist", "--recipe", "r"]
    assert command(step(1), 29000, None, rest) == rest
    assert command(step(0, ranks=1), None, 8, rest)[2:5] == ["--standalone", "--nproc-per-node", "8"]
    became = command(step(1), 29000, 8, rest)
    assert became[:2] == ["-m", "mirai_dist.runtime.torchrun"]
    wanted = {"--nnodes": "2", "--node-rank": "1", "--master-addr": "localhost", "--master-port": "29000"}
    for option, value in wanted.items():
        assert became[became.index(option) + 1] == value
    assert became[-4:] == rest


def test_what_a_containers_hook_has_set_does_not_reach_the_ranks() -> None:
    hook = {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "PATH": "/bin"}
    assert environment(hook, step(1), 29000, None) == {
        "PATH": "/bin", "MASTER_ADDR": "localhost", "MASTER_PORT": "29000",
    }  # fmt: skip
    assert environment({"OMP_NUM_THREADS": "6"}, step(1), None, 8) == {"OMP_NUM_THREADS": "6"}
    assert environment({}, step(1), None, 8) == {"OMP_NUM_THREADS": "1"}


def test_outside_of_srun_nobody_guesses() -> None:
    with pytest.raises(LaunchError, match="start this with srun"):
        rendezvous.find_step({"SLURM_JOB_ID": "5", "SLURM_PROCID": "0"})
    env = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": "1"}
    with pytest.raises(LaunchError, match="rank 0 is not on the first host"):
        rendezvous.find_step(env)
