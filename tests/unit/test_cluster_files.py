"""Cluster files: the samples are valid, and a mistake is one line with file, line and what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mirai_dist.config import RecipeError, keys
from mirai_dist.config.cluster import CLUSTER, load_cluster
from mirai_dist.config.source import dump
from mirai_launch.slurm.submission import Wish, prepare, scripts

TINY = Path(__file__).parents[1] / "procs" / "tiny.yaml"
STAGES = ("teacher", "ar_teacher", "few_step", "distil")
SAMPLES = sorted((Path(__file__).parents[2] / "recipes/clusters").glob("*.yaml"))
LEAST = "name: x\ngpus: {per_node: 8}\ntime: '60'\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def file(text: str) -> Path:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return path

    return file


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_samples_are_valid_and_give_reasons(path: Path) -> None:
    cluster = load_cluster(path)
    assert cluster.name == path.stem
    assert all(len(variable.reason) > 20 for variable in cluster.environment.values())


def test_the_least_that_a_cluster_needs(write) -> None:
    cluster = load_cluster(write(LEAST))
    assert (cluster.ranks_per_node, cluster.launch, cluster.container.kind) == (8, "torchrun", "none")
    assert load_cluster(write("name: x\ngpus: {per_node: 0}\ncpu_ranks: 2\ntime: '60'\n")).ranks_per_node == 2


def test_a_site_file_can_extend_another(write, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(LEAST)
    assert load_cluster(write("extends: base.yaml\npartition: long\n")).partition == "long"


@pytest.mark.parametrize(
    ("more", "line", "parts"),
    [
        ("partion: gpu", 4, ["unknown key partion", "did you mean partition?"]),
        ("gpus: {per_nod: 8}", 4, ["unknown key gpus.per_nod", "did you mean gpus.per_node?"]),
        ("per_node: 8", 4, ["unknown key per_node", "did you mean gpus.per_node?"]),
        ("launch: tasks", 4, ["launch is 'tasks'", "did you mean task?"]),
        ("environment: {NCCL_DEBUG: {value: INFO}}", 4, ["missing key environment.NCCL_DEBUG.reason"]),
        ("environment: {NCCL_DEBUG: {value: INFO, reason: ' '}}", 4, ["needs a value of one line and a reason"]),
        ("environment: {A-B: {value: x, reason: y}}", 4, ["environment.A-B", "no name of an environment variable"]),
        ("warning: -1", 4, ["warning is -1; at least 0"]),
        ("cpus: 4", 4, ["cpus is 4 for 8 ranks a node"]),
        ("memory: lots", 4, ["memory is 'lots'"]),
        ("container: {kind: pyxis}", 4, ["container.kind is pyxis, but container.image is empty"]),
        ("container: {image: a.sif}", 4, ["container.image is set, but container.kind is none"]),
        ("container: {kind: apptainer, image: a.sif, mounts: [data]}", 4, ["container.mounts has 'data'"]),
        ("scratch: /tmp/$HOSTNAME", 4, ["scratch uses $HOSTNAME", "$SLURM_JOB_ID and $USER"]),
        ("partition: 'gpu; rm -rf /'", 4, ["partition is"]),
        ("constraint: 'ib && h100'", 4, ["constraint is"]),
        ("modules: [cuda; true]", 4, ["modules has 'cuda; true'"]),
        ("srun: [mpi=none]", 4, ["srun has 'mpi=none'", "--option=value"]),
        ("name: y", 4, ["name is written twice, first at c.yaml:1"]),
    ],
)
def test_a_mistake_is_named_with_its_line(write, more: str, line: int, parts: list[str]) -> None:
    text = LEAST if not more.startswith("gpus") else "name: x\n# none\ntime: '60'\n"
    with pytest.raises(RecipeError) as refusal:
        load_cluster(write(f"{text}{more}\n"))
    said = str(refusal.value)
    assert said.startswith(f"c.yaml:{line}: "), said
    for part in parts:
        assert part in said
    assert "\n" not in said


@pytest.mark.parametrize(("time", "valid"), [("60", True), ("1-12:00:00", True), ("24:00:00", True), ("1 day", False)])
def test_time_limits(write, time: str, valid: bool) -> None:
    path = write(f"name: x\ngpus: {{per_node: 8}}\ntime: '{time}'\n")
    if valid:
        assert load_cluster(path).time == time
    else:
        with pytest.raises(RecipeError, match="time is '1 day'; write minutes"):
            load_cluster(path)


def test_an_empty_or_missing_file(write) -> None:
    with pytest.raises(RecipeError, match="the cluster file is empty; it needs at least name, gpus, time"):
        load_cluster(write(""))
    with pytest.raises(RecipeError, match="no cluster file nowhere.yaml"):
        load_cluster("nowhere.yaml")


CHANGED = {
    "name": "y", "partition": "p", "account": "a", "qos": "q", "constraint": "c", "reservation": "r", "exclude": ["n1"],
    "exclusive": False, "gpus.per_node": 4, "gpus.form": "gres", "gpus.type": "h100", "gpus.model": "h200-141gb",
    "cpu_ranks": 2, "cpus": 16,
    "memory": "9G", "time": "90", "warning": 301, "requeues": 4, "launch": "task", "python": "python3.12",
    "launcher_python": "/p", "modules": ["m"], "scratch": "/s", "container.kind": "apptainer", "container.image": "j",
    "container.mounts": ["/m"], "environment.A.value": "w", "environment.A.reason": "q", "meeting": 60,
    "sbatch": ["--x"], "srun": ["--y"], "preflight": "never", "expect_transport": ["ib"],
}  # fmt: skip


def test_every_key_of_the_schema_changes_the_script(tmp_path: Path) -> None:
    """A key that nothing reads would be a promise that nobody keeps."""
    every = {key.dotted.replace("<name>", "A") for key in keys.every_leaf(CLUSTER.root)}
    assert set(CHANGED) == every
    for dotted, value in CHANGED.items():
        gpus = 0 if dotted == "cpu_ranks" else 2
        tree: dict = {
            "name": "x", "gpus": {"per_node": gpus}, "time": "60", "container": {"kind": "pyxis", "image": "i"},
            "environment": {"A": {"value": "v", "reason": "r"}},
        }  # fmt: skip
        before = script(tmp_path, tree)
        *above, last = dotted.split(".")
        section = tree
        for name in above:
            section = section[name]
        section[last] = value
        assert script(tmp_path, tree) != before, dotted


def script(folder: Path, tree: dict) -> str:
    """What `mirai submit --dry-run` would print for a cluster file."""
    file = folder / "cluster.yaml"
    file.write_text(dump(tree))
    # the planner has seconds for bf16 alone
    batches = ["parallel.replicas=1", "parallel.compute_dtype=bfloat16"]
    batches += [f"stages.{name}.batch.global_size=8" for name in STAGES]
    wish = Wish(TINY, file, nodes=1, run_dir=folder / "run", overrides=tuple(batches))
    prepared = replace(prepare(wish), folder="slurm/now")
    return "".join(scripts(prepared, folder / "code").values())
