"""The training runs of a recipe: its stages, of the study's stage every arm and seed. Nothing here writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mirai_dist.config.load import Resolved
from mirai_dist.config.schema import Recipe

DONE = "DONE"


@dataclass(frozen=True)
class Job:
    """One training run of the pipeline: a stage as its own recipe has it, of the study's stage one arm and seed."""

    stage: str
    title: str
    directory: Path
    recipe: Recipe
    seed: int
    arm: str = ""

    @property
    def cycles(self) -> int:
        """Cycles the recipe asks for."""
        return self.recipe.stages[self.stage].cycles


def jobs(resolved: Resolved, run_dir: Path) -> Iterator[Job]:
    """Every training run of the recipe, in order; seeds outside arms, so that each seed's arms end together."""
    recipe = resolved.recipe
    for name in recipe.stages:
        directory = run_dir / "stages" / name
        if name != recipe.study_stage:
            yield Job(name, name, directory, resolved.of_stage(name).recipe, recipe.seed)
            continue
        for seed in recipe.study.seeds:
            for arm in recipe.study.arms:
                own = resolved.of_arm(arm).recipe
                yield Job(name, f"{name} {arm} seed {seed}", directory / arm / f"seed-{seed}", own, seed, arm)


def is_done(job: Job) -> bool:
    """Whether a job ran all the cycles that the recipe asks for; a recipe with more cycles goes on."""
    marker = job.directory / DONE
    return marker.exists() and json.loads(marker.read_text())["cycles"] >= job.cycles
