"""One GPU and the recipe that is measured on it: the trainer's own stage, on weights that are drawn where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from benchmarks.session.measure import Desk
from mirai_dist.attention.select import SPLIT, Choice
from mirai_dist.config import load, schema
from mirai_dist.config.jobs import Job, jobs
from mirai_dist.cycle.attending import attention_of
from mirai_dist.cycle.budget import cluster_of
from mirai_dist.cycle.fusing import fusing_of
from mirai_dist.cycle.pipeline import Place, make_run
from mirai_dist.cycle.roles import Fill
from mirai_dist.cycle.stages import DmdStage
from mirai_dist.cycle.starts import Starts
from mirai_dist.observe.console import Console
from mirai_dist.plan.estimate import Cluster, StagePlan, needed, plan
from mirai_dist.runtime import bootstrap
from mirai_dist.runtime.signals import StopRequest
from mirai_dist.state.ema import local

RECIPE = Path(__file__).with_name("one_gpu.yaml")
NAMES = {False: "cycle without foresight", True: "cycle with foresight"}
ALL = "all"  # phases together
TOO_LARGE = "not even two blocks of the teacher fit beside the other networks"
ROOM = 0.95  # of the device's memory: the planner's part for the allocator is an assumption
SMALL = (  # a rehearsal: the same recipe, in seconds on a CPU
    *("video.latent_frames=9", "video.latent_height=8", "video.latent_width=8", "text.dim=64", "text.length=8"),
    *("teacher.dim=96", "teacher.ffn_dim=192", "teacher.heads=3", "teacher.blocks=4"),
    *("generator.dim=64", "generator.ffn_dim=128", "generator.heads=2", "generator.blocks=2"),
    *("foresight.predictor_blocks=1", "parallel.compute_dtype=float32"),
)


class DrawnStage(DmdStage):
    """The trainer's stage. Its Wan networks start from normal numbers, drawn on the device: published weights would
    take minutes to read, and those of untrained networks hold zeros, which are multiplied faster."""

    def fill(self, role: str) -> Fill:
        """First values of every parameter, with the variance that keeps activations as wide as they are."""

        @torch.no_grad()
        def draw(network: nn.Module) -> None:
            for name, parameter in network.named_parameters():
                generator = self.run.draws.generator(self.purpose(f"{role}/{name}"), 0, 0, 0)
                own = local(parameter).normal_(generator=generator)
                own.mul_(parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
                if parameter.ndim == 1 and name.endswith("weight"):  # of norms
                    own.add_(1.0)

        return draw


@dataclass(frozen=True)
class OneGpu:
    """The dmd job as it fits on this device. asked: as the recipe has it."""

    job: Job
    asked: schema.Recipe
    cluster: Cluster
    ranks: bootstrap.World

    @property
    def recipe(self) -> schema.Recipe:
        return self.job.recipe

    @property
    def size(self) -> str:
        """What is measured, in words."""
        video, blocks, whole = self.recipe.video, self.recipe.teacher.blocks, self.asked.teacher.blocks
        teacher = f"{blocks} blocks" if blocks == whole else f"{blocks} of {whole} blocks, for want of memory"
        latents = f"{video.latent_frames} x {video.latent_height} x {video.latent_width}"
        return f"1 sample of {latents} latents, teacher of {teacher}"

    @cached_property
    def by(self) -> str:
        """What computes, `in_words`."""
        device = self.ranks.device
        return in_words(fusing_of(self.recipe, device).name, attention_of(self.recipe, device))

    def planned(self) -> StagePlan:
        """What `mirai plan` says of the job on this device."""
        (found,) = plan(self.recipe, self.cluster, {(self.job.stage, self.job.arm): self.recipe}).stages
        return found

    def stage(self, folder: Path) -> DrawnStage:
        """Built as the trainer builds it, FSDP on one rank."""
        console = Console(self.ranks.rank, self.ranks.host, folder / "console.log")
        run = make_run(self.job, Place(self.ranks, folder, console, StopRequest()))
        return DrawnStage(self.job.stage, run, Starts())


def in_words(kernels: str, choice: Choice) -> str:
    """Who computes between attention and products, who attention, and whether it leaves out the gradient of a cache."""
    return f"{kernels}, {choice.dense}{', no gradient of a cache' if choice.behind == SPLIT else ''}"


def phase_name(update: str, phase: str) -> str:
    """As `mirai plan` names a phase of an update: "generator rollout", "critic backward", "replay"."""
    return phase if update == phase else f"{update} {phase}"


def one_gpu(desk: Desk) -> OneGpu | None:
    """The recipe on this machine, with as many of the teacher's blocks as the planner finds room for; None: too few."""
    resolved, ranks = load(RECIPE, SMALL if desk.rehearsal else ()), bootstrap.start()
    (job,) = jobs(resolved, desk.out)
    cluster, desk.dtype = cluster_of(ranks), getattr(torch, job.recipe.parallel.compute_dtype)
    for recipe in _smaller_teachers(job.recipe):
        if cluster.limit is None or needed(recipe, job.stage, cluster) <= ROOM * cluster.limit:
            return OneGpu(replace(job, recipe=recipe), job.recipe, cluster, ranks)
    return None


def _smaller_teachers(recipe: schema.Recipe) -> Iterator[schema.Recipe]:
    """The recipe, then with ever fewer blocks of its teacher, down to two: one is read for foresight, one follows."""
    for blocks in range(recipe.teacher.blocks, 1, -1):
        yield replace(recipe, teacher=replace(recipe.teacher, blocks=blocks))


def with_small_teacher(one: OneGpu) -> OneGpu:
    """The same where nobody asks the teacher: two blocks of it are all that is built."""
    *_, smallest = _smaller_teachers(one.asked)
    return replace(one, job=replace(one.job, recipe=smallest), asked=smallest)
