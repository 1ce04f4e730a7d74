"""From a recipe's facts and a cluster file to the text of a batch script. Pure: nothing is read but the templates.

The templates are slurm/*.in, plain text with @NAMES@ to fill in.
"""

from __future__ import annotations

import re
import shlex
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mirai_dist.config.cluster import Cluster, Container
from mirai_dist.config.error import RecipeError
from mirai_dist.node import transport

_NAME = re.compile(r"@([A-Z]+)@")
_PLAIN_PATH = re.compile(r"/[\w./+=,@:~-]*")


@dataclass(frozen=True)
class Sweep:
    """An array: the run directory of each element below the common one, and how many may run at a time (0: all)."""

    elements: tuple[str, ...]
    at_once: int = 0


@dataclass(frozen=True)
class Batch:
    """One job: what the script needs beside the cluster file. All paths are absolute.

    folder: of this submission, below the run directory. code: snapshot. nodes: those that train; spare: asked for on
    top, of which the pre-flight leaves the worst out. time: limit, as SLURM writes it. warning: seconds before it.
    step: of the pipeline, "" for all of them.
    """

    name: str
    run_dir: Path
    folder: str
    code: Path
    workdir: Path
    launcher_python: str
    nodes: int
    time: str
    warning: int
    spare: int = 0
    step: str = ""
    sweep: Sweep | None = None


def templates() -> Path:
    """The folder of the templates: slurm/ of the checkout, or where an installed wheel puts it."""
    places = [Path(__file__).parents[3] / "slurm", Path(sysconfig.get_path("data")) / "share" / "mirai_dist" / "slurm"]
    for place in places:
        if (place / "train.sbatch.in").exists():
            return place
    raise RecipeError("slurm", f"the batch templates are missing; looked in {' and '.join(map(str, places))}")


def render(batch: Batch, cluster: Cluster) -> str:
    """The batch script. Raises RecipeError for paths that cannot stand in it."""
    for path in (batch.run_dir, batch.code, batch.workdir):
        if not _PLAIN_PATH.fullmatch(str(path)):
            raise RecipeError(str(path), "batch scripts need paths of letters, digits and . _ - + = , @ : ~ /")
    folder = templates()
    python = cluster.python if "/" not in cluster.python else str(batch.workdir / cluster.python)
    values = {
        "TITLE": f"{batch.name}: {batch.nodes} nodes x {cluster.ranks_per_node} ranks on {cluster.name}",
        "DIRECTIVES": "".join(f"#SBATCH {each}\n" for each in directives(batch, cluster)),
        "PLACE": _place(batch),
        "CODE": str(batch.code),
        "REQUEUES": str(cluster.requeues),
        "SITE": _site(cluster),
        "ONLY": f" --only {batch.step}" if batch.step else "",
        "PREFLIGHT": _preflight(cluster),
        "NODES": str(batch.nodes),
        "ALL": str(batch.nodes + batch.spare),
        "RANKS": str(cluster.ranks_per_node),
        "PATIENCE": str(cluster.meeting),
        "ARRIVING": str(cluster.meeting + 60),  # torch is loaded before that meeting
        "LOOK": " ".join(_looks(batch, cluster)),
        "SHAPE": " ".join([*_tasks(batch, cluster), *_shape(cluster)]),
        "STEP": " ".join(_STEP),
        "SRUN": "".join(f"  {line} \\\n" for line in [*cluster.srun, *_enter(batch, cluster)]),
        "PYTHON": shlex.quote(python),
    }
    select, launch, whole = (
        (folder / f"{name}.in").read_text(encoding="utf-8") for name in ("select", cluster.launch, "train.sbatch")
    )
    parts = {
        "SELECT": _fill(select, values) if batch.spare else "",
        "LAUNCH": _fill(launch.rstrip("\n"), values),
    }
    return _fill(whole, {**values, **parts})


# A rank that fails ends the step; one that ends well waits for the others as long as they take.
_STEP = ("--kill-on-bad-exit=1", "--wait=0", "--label", "--distribution=block:block", "--export=ALL")


def directives(batch: Batch, cluster: Cluster) -> list[str]:
    """sbatch options, without those of a single submission (what it waits for)."""
    log = "%A_%a" if batch.sweep else "%j"
    found = [
        f"--job-name={batch.name}",
        f"--output={batch.run_dir}/logs/slurm-{log}.log",
        "--open-mode=append",
        "--requeue",
        f"--chdir={batch.workdir}",
        f"--signal=B:USR2@{batch.warning}",
        f"--time={batch.time}",
        f"--nodes={batch.nodes + batch.spare}",
        *_shape(cluster),
        *_gpus(cluster),
    ]
    for name in ("partition", "account", "qos", "constraint", "reservation"):
        value = getattr(cluster, name)
        if value:
            found.append(f"--{name}={shlex.quote(value)}")
    if cluster.exclude:
        found.append(f"--exclude={','.join(cluster.exclude)}")
    if cluster.exclusive:
        found.append("--exclusive")
    if cluster.memory:
        found.append(f"--mem={cluster.memory}")
    if batch.sweep:
        cap = f"%{batch.sweep.at_once}" if batch.sweep.at_once else ""
        found.append(f"--array=0-{len(batch.sweep.elements) - 1}{cap}")
    return [*found, *cluster.sbatch]


def _shape(cluster: Cluster) -> list[str]:
    """Tasks and CPUs; repeated on srun, which does not inherit them in every version of SLURM."""
    tasks = cluster.ranks_per_node if cluster.launch == "task" else 1
    cpus = [f"--cpus-per-task={cluster.cpus // tasks}"] if cluster.cpus else []
    return [f"--ntasks-per-node={tasks}", *cpus]


def _tasks(batch: Batch, cluster: Cluster) -> list[str]:
    """With spare nodes the step is smaller than the job, whose number of tasks it would inherit."""
    if not batch.spare:
        return []
    return [f"--ntasks={batch.nodes * (cluster.ranks_per_node if cluster.launch == 'task' else 1)}"]


def _looks(batch: Batch, cluster: Cluster) -> list[str]:
    """Tasks and CPUs of the step that looks at all nodes: always a task a rank."""
    ranks = cluster.ranks_per_node
    cpus = [f"--cpus-per-task={cluster.cpus // ranks}"] if cluster.cpus else []
    return [f"--ntasks={(batch.nodes + batch.spare) * ranks}", f"--ntasks-per-node={ranks}", *cpus]


def _preflight(cluster: Cluster) -> str:
    mode = f" --preflight {cluster.preflight}" if cluster.preflight != "auto" else ""
    expected = ",".join(cluster.expect_transport)
    return mode + (f' --expect-transport "{expected}"' if expected else "")


def _gpus(cluster: Cluster) -> list[str]:
    gpus = cluster.gpus
    if not gpus.per_node or gpus.form == "none":
        return []
    count = f"{gpus.type}:{gpus.per_node}" if gpus.type else str(gpus.per_node)
    return [f"--gpus-per-node={count}" if gpus.form == "gpus-per-node" else f"--gres=gpu:{count}"]


def _place(batch: Batch) -> str:
    lines = [f"run_dir={batch.run_dir}"]
    if batch.sweep:
        names = "".join(f"  {shlex.quote(element)}\n" for element in batch.sweep.elements)
        lines = [f"elements=(\n{names})", f'run_dir={batch.run_dir}/${{elements[$SLURM_ARRAY_TASK_ID]}}']
    lines.append(f'recipe="$run_dir"/{batch.folder}/recipe.yaml')
    lines.append(f"launcher_python={shlex.quote(batch.launcher_python)}  # outside containers, with the base install")
    return "\n".join(lines)


def _site(cluster: Cluster) -> str:
    lines = []
    if cluster.modules:
        lines += ["module purge", *(f"module load {module}" for module in cluster.modules)]
    if cluster.scratch:
        lines.append(f'site TMPDIR "{cluster.scratch}"  # on every node; made by the tasks')
    for name, variable in cluster.environment.items():
        lines.append(f"site {name} {shlex.quote(variable.value)}  # {variable.reason}")
    if cluster.expect_transport and cluster.gpus.per_node:
        for name, value in transport.wanted(cluster.environment, Path("$run_dir/logs")).items():
            lines.append(f'site {name} "{value}"  # NCCL\'s log says which transport it uses')
    return "".join(f"{line}\n" for line in lines)


def _enter(batch: Batch, cluster: Cluster) -> list[str]:
    """Lines that put srun's tasks into the container; run directory and working directory are always there."""
    container = cluster.container
    if container.kind == "pyxis":
        mounts = ",".join(each if ":" in each else f"{each}:{each}" for each in _mounts(batch, container))
        image = shlex.quote(container.image)
        return [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={batch.workdir}"]
    if container.kind == "apptainer":
        gpus = "--nv " if cluster.gpus.per_node else ""
        binds = ",".join(_mounts(batch, container))
        return [f"apptainer exec {gpus}--bind {binds}", f"--pwd {batch.workdir} {shlex.quote(container.image)}"]
    return []


def _mounts(batch: Batch, container: Container) -> list[str]:
    return list(dict.fromkeys([str(batch.run_dir), str(batch.workdir), *container.mounts]))


def _fill(text: str, values: Mapping[str, str]) -> str:
    """The text with every @NAME@ filled in, once: what is filled in is not looked at again."""
    return _NAME.sub(lambda found: values[found.group(1)], text)
