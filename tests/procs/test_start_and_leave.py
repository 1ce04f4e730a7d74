"""Ranks find each other under torchrun and srun, agree to stop, and are gone when one of them fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def rank_main(mode: str, run_dir: Path, seconds: float) -> int:
    """What one rank does: python THIS_FILE agree|fail|start RUN_DIR SECONDS."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from mirai_dist.runtime import bootstrap
    from mirai_dist.runtime.signals import StopRequest

    stop = StopRequest().install()
    before = dict(os.environ)
    world = bootstrap.start(timedelta(seconds=seconds))
    assert dict(os.environ) == before, "the environment belongs to the site"
    total = torch.tensor(float(world.rank + 1))
    dist.all_reduce(total)
    if mode == "fail":
        if world.rank == 1:
            raise RuntimeError("only here")
        dist.all_reduce(total)
    if mode == "agree":
        assert not stop.agreed()
        if world.rank == 1:
            os.kill(os.getpid(), 10)  # SIGUSR1
        assert stop.agreed(), "the rank without a signal must hear of it"
        assert (stop.reason == "SIGUSR1") == (world.rank == 1)
    facts = {"rank": world.rank, "size": world.world_size, "local": [world.local_rank, world.local_size]}
    (run_dir / f"rank-{world.rank}.json").write_text(json.dumps({**facts, "sum": total.item()}))
    bootstrap.stop(world)
    return 0


def environment(**extra: str) -> dict[str, str]:
    """This environment without any launcher's variables."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    paths = os.pathsep.join(filter(None, [kept.get("PYTHONPATH"), str(REPOSITORY)]))
    return {**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def step(rank: int, nodes: str, counts: str, node: int, local: int) -> dict[str, str]:
    """What srun tells task `rank` of two."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": counts,
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
    }


def task(mode: str, run_dir: Path, env: dict[str, str], seconds: float = 60) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, mode, str(run_dir), str(seconds)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def ended(*tasks: subprocess.Popen[str], timeout: float = 90) -> list[tuple[int, str]]:
    """(exit code, standard error) of each; nothing outlives the test."""
    try:
        outputs = [each.communicate(timeout=timeout)[1] for each in tasks]
        return [(each.returncode, output) for each, output in zip(tasks, outputs, strict=True)]
    finally:
        for each in tasks:
            each.kill()


def facts(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads((run_dir / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_torchrun_and_a_signal_to_one_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    subprocess.run([*command, "agree", str(tmp_path), "60"], env=environment(), check=True, timeout=120)
    assert facts(tmp_path) == [{"rank": rank, "size": 2, "local": [rank, 2], "sum": 3.0} for rank in (0, 1)]


def test_srun_on_one_node(tmp_path: Path) -> None:
    envs = [environment(**step(rank, "n1", "2", 0, rank)) for rank in (0, 1)]
    assert [code for code, _ in ended(*(task("agree", tmp_path, env) for env in envs))] == [0, 0]
    assert facts(tmp_path) == [{"rank": rank, "size": 2, "local": [rank, 2], "sum": 3.0} for rank in (0, 1)]


def test_srun_on_two_nodes_meets_at_the_first_one(tmp_path: Path) -> None:
    envs = [environment(**step(rank, "localhost,elsewhere", "1(x2)", rank, 0)) for rank in (0, 1)]
    assert [code for code, _ in ended(*(task("agree", tmp_path, env) for env in envs))] == [0, 0]
    assert facts(tmp_path) == [{"rank": rank, "size": 2, "local": [0, 1], "sum": 3.0} for rank in (0, 1)]


def test_all_ranks_are_gone_when_one_fails(tmp_path: Path) -> None:
    envs = [environment(**step(rank, "n1", "2", 0, rank)) for rank in (0, 1)]
    tasks = [task("fail", tmp_path, env) for env in envs]
    started = time.monotonic()
    (waiting, _), (failing, said) = ended(*tasks)
    assert time.monotonic() - started < 40, "well before the collective's own timeout"
    assert (waiting, failing) == (1, 1)
    assert said.splitlines()[-1].endswith(f":1 RuntimeError: only here; see {tmp_path}/logs/failure-rank-1.json")
    record = json.loads((tmp_path / "logs/failure-rank-1.json").read_text())
    assert (record["message"], record["rank"]) == ("only here", 1)
    assert (tmp_path / "logs/failure-rank-0.json").exists()


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as taken:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        taken.bind(("::", 0))
        taken.listen()
        env = environment(**step(0, "n1", "2", 0, 0), MASTER_PORT=str(taken.getsockname()[1]))
        [(code, said)] = ended(task("start", tmp_path, env, seconds=20))
    assert code == 20
    assert len([line for line in said.splitlines() if "LaunchError" in line]) == 1
    assert "cannot listen at 127.0.0.1:" in said and "set MASTER_PORT to a free port" in said
    assert "Traceback" not in said


def test_a_head_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = environment(**step(1, "localhost,elsewhere", "1(x2)", 1, 0), MASTER_PORT=port)
    [(code, said)] = ended(task("start", tmp_path, env, seconds=2))
    assert code == 20
    assert f"rank 1 cannot reach rank 0 at localhost:{port}" in said and socket.gethostname() in said
    assert "Traceback" not in said


if __name__ == "__main__":
    from mirai_dist.runtime.guard import guarded

    sys.exit(guarded(lambda: rank_main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])), Path(sys.argv[2])))
