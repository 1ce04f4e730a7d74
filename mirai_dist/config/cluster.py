"""Cluster files: everything that is true of a site and not of a run. Closed like a recipe, read by `mirai submit`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mirai_dist.config.error import RecipeError
from mirai_dist.config.keys import Document
from mirai_dist.config.load import load_document
from mirai_dist.config.schema import key

PREFLIGHT = ("auto", "always", "never")
TRANSPORTS = ("ib", "efa", "socket", "nvlink", "gloo")


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The GPUs of a node, and how this site wants them asked for."""

    per_node: int = key(help="GPUs of a node; 0: a cluster without any")
    form: str = key(
        "gpus-per-node",
        help="option that asks for them: --gpus-per-node=8, --gres=gpu:8, or none where --exclusive gives them all",
        choices=("gpus-per-node", "gres", "none"),
    )
    type: str = key("", help="type as `sinfo -o %G` shows it, such as h100; empty: any")
    model: str = key("", help="what `mirai plan --gpu` calls them, such as h100-80gb; empty: jobs are not planned")


@dataclass(frozen=True, kw_only=True)
class Container:
    """The container that ranks run in."""

    kind: str = key("none", help="how srun enters it", choices=("none", "pyxis", "apptainer"))
    image: str = key("", help="pyxis: file.sqsh or registry image; apptainer: file.sif")
    mounts: list[str] = key(list, help="folder, or host:inside, or host:inside:ro; the run directory is always added")


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One environment variable of the job; what the site or the user has set already stays."""

    value: str = key(help="its value")
    reason: str = key(help="why this cluster needs it; a variable without a reason outlives its cause")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A SLURM cluster as one group uses it."""

    name: str = key(help="shown in the script")
    partition: str = key("", help="--partition; empty: the site's default")
    account: str = key("", help="--account")
    qos: str = key("", help="--qos")
    constraint: str = key("", help="--constraint: features that every node must have, such as ib&h100")
    reservation: str = key("", help="--reservation")
    exclude: list[str] = key(list, help="--exclude: nodes never to be used")
    exclusive: bool = key(True, help="--exclusive: share no node with other jobs")
    gpus: Gpus = key(help="GPUs of a node")
    cpu_ranks: int = key(1, help="ranks a node where gpus.per_node is 0")
    cpus: int = key(0, help="CPUs of a node, shared among its tasks; 0: as SLURM gives them")
    memory: str = key("", help="--mem, a node: 0 for all of it, or 512G; empty: the site's default")
    time: str = key(help="time limit of a job, unless --time is given: 24:00:00 or 1-12:00:00")
    warning: int = key(
        0,
        help="seconds before the time limit at which the run saves and is queued again; 0: from the plan's seconds "
        "of a cycle and a save",
    )
    requeues: int = key(3, help="attempts in a row that may leave no new checkpoint before the job stays down")
    launch: str = key(
        "torchrun",
        help="torchrun: one torchrun a node; task: one SLURM task a rank, nothing between its signals and the loop",
        choices=("torchrun", "task"),
    )
    python: str = key("python3", help="Python with the training install, as the ranks see it (inside the container)")
    launcher_python: str = key(
        "", help="Python with the base install, on the nodes themselves; empty: the one that ran mirai submit"
    )
    modules: list[str] = key(list, help="module load, in this order, after module purge")
    scratch: str = key("", help="folder on the node's own disk for TMPDIR; $SLURM_JOB_ID and $USER are filled in")
    container: Container = key(Container, help="container of the ranks")
    environment: dict[str, Variable] = key(dict, help="variables of the job, each with its reason")
    meeting: int = key(45, help="seconds in which all nodes must have met; more where images load slowly")
    preflight: str = key(
        "auto", help="look at all nodes before anything is trained; auto: where there are several", choices=PREFLIGHT
    )
    expect_transport: list[str] = key(list, help=f"stop unless the ranks talk over these: {', '.join(TRANSPORTS)}")
    sbatch: list[str] = key(list, help="further sbatch options, such as --mail-type=FAIL")
    srun: list[str] = key(list, help="further srun options, such as --mpi=none")

    @property
    def ranks_per_node(self) -> int:
        """Ranks started on each node: one a GPU."""
        return self.gpus.per_node or self.cpu_ranks


CLUSTER = Document(Cluster, "cluster")

_TIME = re.compile(r"\d+-\d+(:\d\d){0,2}|\d+(:\d\d){0,2}|UNLIMITED")
_MEMORY = re.compile(r"\d+[KMGT]?|")
_SCRATCH_VARIABLES = ("SLURM_JOB_ID", "USER")


def load_cluster(path: str | Path) -> Cluster:
    """Read and check a cluster file. Raises RecipeError: where (file and line), which key, what to do."""
    path = Path(path)
    cluster, origins = load_document(path, CLUSTER)
    for dotted, what in _problems(cluster):
        raise RecipeError(_origin(origins, dotted, path), f"{dotted} {what}")
    return cluster


def _origin(origins: Mapping[str, str], dotted: str, path: Path) -> str:
    """Where a key was written; of a list of named entries the first line below it."""
    below = [origin for name, origin in origins.items() if name == dotted or name.startswith(f"{dotted}.")]
    return next((origin for origin in below if origin != "default"), str(path))


def _problems(cluster: Cluster) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it)."""
    for name in ("partition", "account", "qos", "reservation"):
        value = getattr(cluster, name)
        if not re.fullmatch(r"[\w.@+,-]*", value):
            yield name, f"is {value!r}; a name, or several joined by commas"
    if not _TIME.fullmatch(cluster.time):
        yield "time", f"is {cluster.time!r}; write minutes, 24:00:00 or 1-12:00:00 (in quotes)"
    if not _MEMORY.fullmatch(cluster.memory):
        yield "memory", f"is {cluster.memory!r}; write 0 for all of the node's, or a size such as 512G"
    for name, value, least in (
        ("gpus.per_node", cluster.gpus.per_node, 0),
        ("cpu_ranks", cluster.cpu_ranks, 1),
        ("cpus", cluster.cpus, 0),
        ("warning", cluster.warning, 0),
        ("requeues", cluster.requeues, 0),
        ("meeting", cluster.meeting, 5),
    ):
        if value < least:
            yield name, f"is {value}; at least {least}"
    if 0 < cluster.cpus < cluster.ranks_per_node:
        yield "cpus", f"is {cluster.cpus} for {cluster.ranks_per_node} ranks a node; at least one each"
    yield from _texts(cluster)
    yield from _container(cluster.container)


_LISTS = {
    "modules": (r"[\w./+,\[\]-]+", "one name an entry"),
    "expect_transport": ("|".join(TRANSPORTS), f"one of {', '.join(TRANSPORTS)} an entry"),
    "exclude": (r"[\w./+,\[\]-]+", "one name an entry"),
    "sbatch": (r"--[a-z][\w-]*(=\S+)?", "one --option or --option=value an entry, without blanks"),
    "srun": (r"--[a-z][\w-]*(=\S+)?", "one --option or --option=value an entry, without blanks"),
}


def _texts(cluster: Cluster) -> Iterator[tuple[str, str]]:
    if not re.fullmatch(r"[\w.-]*", cluster.gpus.model):
        yield "gpus.model", f"is {cluster.gpus.model!r}; one of the names that `mirai plan --gpu` knows"
    if not re.fullmatch(r"[\w.:+-]*", cluster.gpus.type):
        yield "gpus.type", f"is {cluster.gpus.type!r}; one word, as `sinfo -o %G` shows it"
    if not re.fullmatch(r"[\w.:@+&|*()\[\]-]*", cluster.constraint):
        yield "constraint", f"is {cluster.constraint!r}; features joined by & or |, without blanks"
    for name, (form, what) in _LISTS.items():
        for entry in getattr(cluster, name):
            if not re.fullmatch(form, entry):
                yield name, f"has {entry!r}; {what}"
    if not re.fullmatch(r"(/[\w.$/{}-]*)?", cluster.scratch):
        yield "scratch", f"is {cluster.scratch!r}; an absolute path, of letters, digits and . _ - /"
    for name in re.findall(r"\$\{?(\w*)", cluster.scratch):
        if name not in _SCRATCH_VARIABLES:
            yield "scratch", f"uses ${name}; it may use ${' and $'.join(_SCRATCH_VARIABLES)}"
    yield from _environment(cluster.environment)


def _environment(variables: Mapping[str, Variable]) -> Iterator[tuple[str, str]]:
    for name, variable in variables.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield f"environment.{name}", "is no name of an environment variable"
        if "\n" in variable.value + variable.reason or not variable.reason.strip():
            yield f"environment.{name}", "needs a value of one line and a reason of one line"


def _container(container: Container) -> Iterator[tuple[str, str]]:
    if container.kind == "none":
        for name in ("image", "mounts"):
            if getattr(container, name):
                yield f"container.{name}", "is set, but container.kind is none; set it to pyxis or apptainer"
    elif not container.image:
        yield "container.kind", f"is {container.kind}, but container.image is empty; name the image"
    elif not re.fullmatch(r"[\w./:@#+-]+", container.image):
        yield "container.image", f"is {container.image!r}; a path or image name without blanks"
    for mount in container.mounts:
        if not re.fullmatch(r"/[\w./+-]*(:/[\w./+-]*(:(ro|rw))?)?", mount):
            yield "container.mounts", f"has {mount!r}; write /folder, /host:/inside or /host:/inside:ro"
