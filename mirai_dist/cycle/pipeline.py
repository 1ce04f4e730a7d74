"""The training runs of a recipe: its stages in order, the study's arms and seeds, each skipped when already done.

    for each:  build its networks, start them from the parent, resume, run the loop, mark it done

chain.py runs them, each stage behind its gate; study.py measures what comes out of it.
"""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mirai_dist.config.digest import digest
from mirai_dist.config.jobs import DONE, Job, is_done
from mirai_dist.cycle.cycle import Loop
from mirai_dist.cycle.desk import Desk
from mirai_dist.cycle.encoders import (
    CaptionSource,
    WorldClips,
    check_shape,
    clips_of,
    conditions_of,
    open_clips,
    sharded,
)
from mirai_dist.cycle.gallery import Gallery
from mirai_dist.cycle.saver import Saver
from mirai_dist.cycle.stages import STAGES, Run, Stage
from mirai_dist.cycle.starts import starts_of
from mirai_dist.cycle.trajectories import Making, make
from mirai_dist.cycle.watch import Watch
from mirai_dist.data.arrays import Part
from mirai_dist.data.conditions import Selected
from mirai_dist.data.latents import STORE, LatentStore
from mirai_dist.data.lmdb_files import LmdbClips
from mirai_dist.data.prompts import PromptFile
from mirai_dist.observe.console import Console
from mirai_dist.observe.sinks import Sinks
from mirai_dist.observe.slow import SlowRanks
from mirai_dist.observe.waits import Waits
from mirai_dist.operate.events import Events
from mirai_dist.parallel.engine_fsdp import FsdpEngine
from mirai_dist.parallel.mesh import build_mesh
from mirai_dist.runtime.bootstrap import World
from mirai_dist.runtime.signals import StopRequest
from mirai_dist.state.draws import Draws


@dataclass(frozen=True)
class Place:
    """Where and with whom the pipeline runs. hosts: of each rank, empty where nobody asked."""

    ranks: World
    run_dir: Path
    console: Console
    stop: StopRequest
    hosts: tuple[str, ...] = ()

    @property
    def events(self) -> Events:
        """Where rank 0 says what happens to the run."""
        return Events(self.run_dir if self.ranks.rank == 0 else None)


def make_run(job: Job, place: Place) -> Run:
    """Engine, keyed randomness, and what samples are conditioned on, for one job."""
    return run_on(job, place, open_pairs(job, place) if job.recipe.stages[job.stage].kind == "ode" else None)


def run_on(job: Job, place: Place, pairs: LatentStore | LmdbClips | None) -> Run:
    """The same on these trajectories, or without any."""
    recipe, ranks, waits = job.recipe, place.ranks, Waits(place.ranks.device)
    mesh = build_mesh(ranks.world_size, recipe.parallel.replicas, ranks.device.type)
    engine = FsdpEngine(mesh, ranks.device, waits.collective)
    clips = clips_of(recipe, ranks.device) if needs_clips(job) else None
    captions: CaptionSource = clips.captions_source if clips else pairs or PromptFile(Path(recipe.data.prompts))
    conditions = sharded(conditions_of(recipe, captions, ranks.device), recipe, engine)
    if pairs and clips:  # trajectories of some of the clips
        conditions = Selected(conditions, Making(recipe, job.stage, place.run_dir).numbers(clips.size))
    return Run(
        recipe,
        ranks.world_size,
        ranks.rank,
        engine,
        Draws(job.seed, ranks.device),
        conditions,
        clips.world if isinstance(clips, WorldClips) else None,
        clips,
        pairs,
        waits,
    )


def needs_clips(job: Job) -> bool:
    """Whether a stage reads clips, or at least their captions: a dmd stage where it has no prompts of its own, an ode
    stage whose trajectories are of clips."""
    kind = job.recipe.stages[job.stage].kind
    return not {"dmd": job.recipe.data.prompts, "ode": job.recipe.data.ode_pairs}.get(kind)


def open_pairs(job: Job, place: Place) -> LatentStore | LmdbClips:
    """The trajectories of an ode stage; made first, every rank its share, where the recipe has none."""
    if job.recipe.data.ode_pairs:
        store = open_clips(Path(job.recipe.data.ode_pairs))
        check_shape(store, job.recipe)
        return store
    making = Making(job.recipe, job.stage, place.run_dir)
    if (making.folder / STORE).exists():
        return LatentStore(making.folder)
    torch.distributed.barrier()  # all have looked before anybody seals it
    make(making, Part(place.ranks.rank, place.ranks.world_size), place.ranks.device, place.console)
    torch.distributed.barrier()  # whoever came last has sealed it
    return LatentStore(making.folder)


def train(job: Job, place: Place) -> None:
    """Run one job to its end, or say that it is done already."""
    if is_done(job):
        place.console.say(f"{job.title}: already done, skipped")
        return
    started = time.time()
    run = make_run(job, place)
    starts = starts_of(job.recipe, job.stage, place.run_dir)
    stage: Stage = STAGES[job.recipe.stages[job.stage].kind](job.stage, run, starts)
    for role, origin in stage.started.items():
        place.console.say(f"{job.title}: {role} from {origin}")
    saver = saver_of(job, place)
    saver.resume(stage)
    place.events.write("begun", stage=job.title, cycles=job.cycles, cycle=stage.cycle)
    with closing(Sinks.of_stage(place.ranks.rank, job.directory)) as sinks:
        sinks.text("effective", f"```\n{(place.run_dir / 'effective.yaml').read_text()}```", stage.cycle)
        gallery = Gallery(job.directory, sinks)
        desk = Desk(place.run_dir, place.ranks.rank, place.ranks.world_size, place.stop, job.title)
        slow = SlowRanks(place.hosts, place.ranks.world_size // job.recipe.parallel.replicas)
        watch = Watch(place.console, sinks, desk, slow, place.events)
        Loop(saver, watch, gallery, desk).run(stage, job.title)
        gallery.stage_ended(stage)
    if place.ranks.rank == 0:
        mark_done(job, {"cycles": stage.cycle, "seconds": time.time() - started})
        place.events.write("finished", stage=job.title, cycles=stage.cycle)


def saver_of(job: Job, place: Place) -> Saver:
    """Checkpoints of one job."""
    return Saver(
        job.directory / "checkpoints",
        job.recipe.checkpoint,
        digest(job.recipe),
        place.ranks.rank,
        place.console,
        place.events,
        job.title,
    )


def mark_done(job: Job, summary: dict[str, Any]) -> None:
    """Write the marker; a job interrupted before this resumes at its last checkpoint."""
    beside = job.directory / f"{DONE}.new"
    beside.write_text(json.dumps(summary))
    beside.replace(job.directory / DONE)
