"""The command that starts the ranks, as an argument list: torchrun on this machine, or one rank where a launcher
has already started us once a rank."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mirai_dist.config import RecipeError
from mirai_dist.node import transport

CPU_RANKS = 2


@dataclass(frozen=True)
class Request:
    """What the user asked `mirai train` for. `nproc` None: as many ranks as there are GPUs, else two; `only` empty:
    all steps."""

    recipe: Path
    run_dir: Path
    resume: str = "auto"
    nproc: int | None = None
    preflight: str = "auto"
    expected: str = ""
    overrides: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """What to exec: arguments, whole environment, and the world size it will have."""

    argv: list[str]
    env: dict[str, str]
    ranks: int


def prepare(request: Request, env: Mapping[str, str], gpus: int) -> Launch:
    """Command for this environment. Raises RecipeError if the environment and the request do not fit.

    gpus: how many this process sees. Variables the site has set are kept as they are.
    """
    ours = ["-m", "mirai_dist", "--recipe", str(request.recipe), "--run-dir", str(request.run_dir)]
    ours += ["--resume", request.resume, *(f"--only={step}" for step in request.only)]
    if request.preflight != "auto":
        ours += ["--preflight", request.preflight]
    if request.expected:
        ours += ["--expect-transport", request.expected]
        env = {**env, **transport.wanted(env, request.run_dir / "logs")}
    ours += request.overrides
    started = started_ranks(env)
    if started is not None:
        if request.nproc not in (None, started):
            what = f"--nproc {request.nproc}, and the launcher around this process has started {started} ranks"
            raise RecipeError("command line", f"{what}; leave --nproc out")
        return Launch([sys.executable, *ours], dict(env), started)
    _refuse_idle_nodes(env)
    return torchrun(ours, request.nproc or gpus or CPU_RANKS, env)


def torchrun(ours: list[str], ranks: int, env: Mapping[str, str]) -> Launch:
    """`python *ours` on several ranks of this machine."""
    launcher = ["-m", "mirai_dist.runtime.torchrun", "--standalone", "--nproc-per-node", str(ranks)]
    threads = {"OMP_NUM_THREADS": "1"} if ranks > 1 and "OMP_NUM_THREADS" not in env else {}
    return Launch([sys.executable, *launcher, *ours], {**env, **threads}, ranks)


def visible_gpus(env: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """GPUs this process may use, without asking CUDA: CUDA_VISIBLE_DEVICES if it is set, else the device files."""
    if "CUDA_VISIBLE_DEVICES" in env:
        names = [name.strip() for name in env["CUDA_VISIBLE_DEVICES"].split(",")]
        # CUDA stops at the first entry that is no device.
        stop = next((i for i, name in enumerate(names) if not name or name.startswith("-")), len(names))
        return stop
    return len([path for path in devices.glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()])


def started_ranks(env: Mapping[str, str]) -> int | None:
    """World size if torchrun or srun started this process as one of its ranks."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return _number(env, "WORLD_SIZE")
    if "SLURM_PROCID" in env and _in_step(env) and _number(env, "SLURM_NTASKS") > 1:
        return _number(env, "SLURM_NTASKS")
    return None


def _in_step(env: Mapping[str, str]) -> bool:
    # A batch script has SLURM_PROCID=0 and SLURM_NTASKS too; only what srun started knows its step's nodes.
    return "SLURM_STEP_NODELIST" in env


def _refuse_idle_nodes(env: Mapping[str, str]) -> None:
    nodes = _number(env, "SLURM_NNODES") if "SLURM_NNODES" in env and "SLURM_JOB_ID" in env else 1
    if nodes > 1:
        what = f"this job has {nodes} nodes, and started here the run would use one of them"
        raise RecipeError("SLURM", f"{what}; start it with srun, one task a rank: srun mirai train ...")


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "1")
    if not value.isdigit():
        raise RecipeError("environment", f"{name} is {value!r}, which is no number; unset it or start through srun")
    return int(value)
