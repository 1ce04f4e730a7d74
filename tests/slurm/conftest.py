"""One real SLURM cluster for all tests of this folder, and runs on it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mirai_launch.slurm.parse import Job, show_job
from tests.slurm.cluster import TestCluster, UnavailableError, install

ROOT = Path(__file__).parents[2]
NODES = 3
RECIPE = """
extends: {root}/recipes/base/tiny_world.yaml
name: on-slurm
video: {{latent_frames: 3, frames_per_segment: 1, latent_height: 2, latent_width: 2}}
world: {{speed: 1, radius: 3}}
text: {{dim: 8, length: 6}}
teacher: {{dim: 12, ffn_dim: 16, heads: 1, blocks: 1, freq_dim: 8}}
checkpoint: {{every_cycles: 1000000}}
"""
TEACHER = """
stages:
  teacher:
    kind: bidirectional
    cycles: 40
    batch: {global_size: 2, micro_size: 1}
    optimizer: {lr: 1.0e-3}
"""
CLUSTER = """
name: tests
gpus: {per_node: 0, form: none}
exclusive: false
time: '10'
meeting: 20
environment:
  OMP_NUM_THREADS: {value: '1', reason: all nodes share the cores of one machine}
"""


@pytest.fixture(scope="session")
def slurm() -> Iterator[TestCluster]:
    """The cluster; a machine that cannot have it skips, except in CI, which must."""
    try:
        install()
    except UnavailableError as reason:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(reason))
    cluster = TestCluster(NODES).start()
    try:
        yield cluster
    finally:
        cluster.stop()


@dataclass(frozen=True)
class Submitted:
    """One `mirai submit`: the run directory, the job ids, and what was printed."""

    slurm: TestCluster
    run_dir: Path
    jobs: tuple[str, ...]
    said: str

    @property
    def job(self) -> str:
        return self.jobs[0]

    def state(self, job: str = "") -> Job:
        """What SLURM says now."""
        return show_job(self.slurm.run("scontrol", "-o", "show", "job", job or self.job))[0]

    def wait(self, true: Callable[[Job], bool], seconds: float, what: str, job: str = "") -> Job:
        """Until something is true of the job; the test fails with the job's log when it takes too long."""
        deadline = time.monotonic() + seconds
        while not true(found := self.state(job)):
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not within {seconds:.0f} s; {found}\n{self.log()[-6000:]}")
            time.sleep(0.2)
        return found

    def ended(self, seconds: float = 120, job: str = "") -> Job:
        """The job once it has ended for good."""
        return self.wait(lambda found: found.ended, seconds, "the end", job)

    def training(self, seconds: float = 90, cycles: int = 1, folder: str = "") -> None:
        """Until the run has trained so many cycles more, counted in its metrics."""
        metrics = self.run_dir / folder / "stages" / "teacher" / "metrics.jsonl"
        lines = lambda: len(metrics.read_text().splitlines()) if metrics.exists() else 0
        before = lines()
        self.wait(lambda found: lines() >= before + cycles or found.ended, seconds, "training")
        assert lines() >= before + cycles, self.log()

    def log(self) -> str:
        """The job's log, of all attempts and elements."""
        return "\n".join(path.read_text(errors="replace") for path in sorted((self.run_dir / "logs").glob("slurm-*")))

    def checkpoints(self, folder: str = "") -> list[str]:
        return sorted(path.name for path in (self.run_dir / folder).glob("stages/teacher/checkpoints/cycle-*"))

    def everything(self) -> dict[str, torch.Tensor]:
        """Every tensor of the newest checkpoint, moments and averages included, by name."""
        tensors = self.run_dir / "stages/teacher/checkpoints" / self.checkpoints()[-1] / "tensors"
        whole = self.run_dir / "whole.pt"
        dcp_to_torch_save(tensors, whole)
        return dict(flatten_state_dict(torch.load(whole))[0])


@dataclass(frozen=True)
class Submit:
    """`submit(...)`: runs `mirai submit` on the cluster from the working directory of the tests."""

    slurm: TestCluster
    folder: Path

    def __call__(self, *arguments: str, nodes: int = 2, launch: str = "task", name: str = "run",
                 stages: str = TEACHER, expect: int = 0, **site: str) -> Submitted:  # fmt: skip
        """arguments: options and overrides. site: keys of the cluster file. expect: the exit code."""
        recipe, file, run_dir = self.folder / "recipe.yaml", self.folder / f"{name}-cluster.yaml", self.folder / name
        recipe.write_text(RECIPE.format(root=ROOT) + stages)
        keys = {"partition": "main", "warning": "60", "launch": launch, "python": sys.executable}
        keys |= {"requeues": "2", "preflight": "never", **site}
        file.write_text(CLUSTER + "".join(f"{key}: {value}\n" for key, value in keys.items()))
        command = [sys.executable, "-m", "mirai_launch", "submit", str(recipe), "--cluster", str(file)]
        command += ["--nodes", str(nodes), "--run-dir", str(run_dir), *arguments]
        paths = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "launcher"), str(ROOT / "kernels")]
        env = os.environ | self.slurm.env | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == expect, done.stdout + done.stderr
        jobs = tuple(line.split()[1] for line in done.stdout.splitlines() if line.startswith("job "))
        return Submitted(self.slurm, run_dir, jobs, done.stdout + done.stderr)


@pytest.fixture
def submit(slurm: TestCluster, tmp_path: Path) -> Iterator[Submit]:
    """Submits runs of the smallest recipe; what a test leaves in the queue is cancelled after it."""
    yield Submit(slurm, tmp_path)
    slurm.run("scancel", "-u", "root")
    slurm.wait_for_nodes()


@pytest.fixture(scope="session")
def undisturbed(slurm: TestCluster, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """The recipe on two nodes with a torchrun each, to its end."""
    run = Submit(slurm, tmp_path_factory.mktemp("undisturbed"))(launch="torchrun")
    run.ended()
    return run
