"""Batch scripts of several sites. `python -m tests.golden.slurm_profiles` writes them anew: look at the difference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mirai_dist.config.cluster import Cluster, Container, Gpus, Variable, load_cluster
from mirai_launch.slurm.render import Batch, Sweep, render

FOLDER = Path(__file__).parent / "slurm"
CLUSTERS = Path(__file__).parents[2] / "recipes" / "clusters"
H100 = Gpus(per_node=8, type="h100")


def batch(
    nodes: int = 8, step: str = "", sweep: Sweep | None = None, time: str = "24:00:00", spare: int = 0
) -> Batch:
    """A job with fixed paths."""
    return Batch(
        name=f"mirai-{step}" if step else "mirai",
        run_dir=Path("/shared/runs/mirai"),
        folder="slurm/20260101-000000",
        code=Path("/shared/runs/mirai/slurm/code-0123456789ab"),
        workdir=Path("/shared/mirai"),
        launcher_python="/shared/mirai/.venv/bin/python",
        nodes=nodes,
        spare=spare,
        time=time,
        warning=600,
        step=step,
        sweep=sweep,
    )


def profiles() -> dict[str, tuple[Batch, Cluster]]:
    """Name -> what is rendered."""
    infiniband = load_cluster(CLUSTERS / "h100-infiniband.yaml")
    efa = load_cluster(CLUSTERS / "h100-efa.yaml")
    task = Cluster(
        name="task-per-gpu",
        partition="gpu,gpu-long",
        account="a",
        qos="high",
        constraint="ib&h100",
        reservation="night",
        exclude=["n[13-14]", "n7"],
        gpus=H100,
        cpus=96,
        memory="512G",
        time="4:00:00",
        launch="task",
        modules=["cuda/12.8", "nccl"],
        environment={"NCCL_IB_HCA": Variable(value="=mlx5_0:1,mlx5_3:1", reason="the others are for storage; it's so")},
        sbatch=["--mail-type=FAIL"],
        srun=["--mpi=none"],
    )
    apptainer = Cluster(
        name="apptainer",
        partition="gpu",
        gpus=Gpus(per_node=4, form="gres", type="a100"),
        time="12:00:00",
        python="python3",
        launcher_python="/usr/bin/python3.11",
        container=Container(kind="apptainer", image="/images/mirai.sif", mounts=["/data", "/scratch:/tmp:rw"]),
        scratch="/scratch/$USER/$SLURM_JOB_ID",
    )
    bare = Cluster(name="bare", gpus=Gpus(per_node=2, form="none"), exclusive=True, time="60")
    return {
        "infiniband": (batch(), infiniband),
        "efa-pyxis": (batch(), efa),
        "task-per-gpu": (batch(), task),
        "apptainer": (batch(2, time="12:00:00"), apptainer),
        "bare": (batch(1, time="60"), bare),
        "local-test": (batch(2, time="10"), load_cluster(CLUSTERS / "local-test.yaml")),
        "spare-nodes": (batch(spare=2), infiniband),
        "transport": (batch(spare=1), replace(task, preflight="always", expect_transport=["ib", "nvlink"])),
        "array": (batch(1, sweep=Sweep(("seed=1", "seed=2", "seed=3"), 2)), infiniband),
        "chain-step": (batch(step="distil.gate"), infiniband),
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (job, cluster) in profiles().items():
        (FOLDER / f"{name}.sbatch").write_text(render(job, cluster))


if __name__ == "__main__":
    main()
