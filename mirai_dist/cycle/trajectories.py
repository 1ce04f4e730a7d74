"""The AR teacher's trajectories, made before an ode stage trains on them: by the run itself, or by a job array.

Each process holds the whole AR teacher and makes its own shards, so none waits for another; what is made depends on
the entry's number alone. A killed making goes on at its first missing shard, with the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mirai_dist.config import schema
from mirai_dist.cycle.attending import backends_of
from mirai_dist.cycle.encoders import clips_of, conditions_of
from mirai_dist.cycle.fusing import ops_of
from mirai_dist.cycle.roles import causal, kv_cache, wan_shape
from mirai_dist.cycle.starts import Started, fill, source_of
from mirai_dist.data.arrays import Part
from mirai_dist.data.latents import ODE, Entry, Plan, StoreWriter
from mirai_dist.method.dmd import Conditioning
from mirai_dist.method.flow import euler_grid, warped_steps
from mirai_dist.method.ode import Integration, TrajectoryInputs, recorded_points, trajectories
from mirai_dist.models.wan import WanModel
from mirai_dist.observe.console import Console
from mirai_dist.state.cursor import Cursor
from mirai_dist.state.draws import Draws

DTYPE = "float16"  # of stored states, as the published data sets have them


@dataclass(frozen=True)
class Making:
    """Which trajectories are made: those of one ode stage of a recipe, into its folder of a run directory."""

    recipe: schema.Recipe
    stage: str
    run_dir: Path

    @property
    def folder(self) -> Path:
        return self.run_dir / "stages" / self.stage / "pairs"

    @property
    def settings(self) -> schema.Stage:
        return self.recipe.stages[self.stage]

    def numbers(self, clips: int | None) -> list[int]:
        """Which of `clips` clips (None: any number is one) the trajectories are of, in their order."""
        cursor = Cursor(self.recipe.seed, f"{self.stage}/trajectories", clips)
        return [cursor.index(n) for n in range(self.settings.trajectories)]

    @property
    def integration(self) -> Integration:
        """The Euler grid, which of its points are kept, and the guidance."""
        ode, flow = self.recipe.ode, self.recipe.flow
        recorded = recorded_points(self.recipe.rollout.steps, ode.points)
        grid = euler_grid(ode.points, flow.shift)
        return Integration(grid, recorded, self.recipe.video.frames_per_segment, ode.guidance)


def make(making: Making, part: Part, device: torch.device, console: Console) -> None:
    """Make the shards of this part that are missing. Called by all ranks of a run, or by a process alone.

    Raises FileError when the folder holds trajectories of another plan, CheckpointError when the AR teacher is not
    there yet.
    """
    recipe, video = making.recipe, making.recipe.video
    clips = clips_of(recipe, device)
    conditions = conditions_of(recipe, clips.captions_source, device)
    numbers = making.numbers(clips.size)
    network, started = _teacher(making, device)
    states = len(recipe.rollout.steps) + 2
    plan = Plan(
        kind=ODE,
        candidates=len(numbers),
        shape=(states, video.latent_frames, video.channels, video.latent_height, video.latent_width),
        dtype=DTYPE,
        shard_size=recipe.ode.shard_size,
        source=hashlib.sha256("\n".join(conditions.captions(numbers)).encode()).hexdigest(),
        timesteps=warped_steps(recipe.rollout.steps, recipe.flow.shift),
        truth=True,
        provenance={
            "teacher": started.digest,
            "points": recipe.ode.points,
            "guidance": recipe.ode.guidance,
            "shift": recipe.flow.shift,
            "seed": recipe.seed,
        },
    )
    writer = StoreWriter(making.folder, plan, part)
    missing = writer.missing()
    _say(making, plan, len(missing), console)
    for error in writer.damaged:
        console.say(f"{making.stage}: made again: {error}")

    def entries(shard: int) -> Iterator[Entry]:
        batch = making.settings.batch.micro_size
        chosen = list(plan.numbers(shard))
        for first in range(0, len(chosen), batch):
            some = chosen[first : first + batch]
            own = [numbers[n] for n in some]
            text = conditions.embed(own).to(device)
            clean = clips.latents(own).to(device)
            noise = Draws(recipe.seed, device).normal(f"{making.stage}/trajectory", 0, 0, some, clean.shape[1:])
            whole = replace(recipe, rollout=replace(recipe.rollout, window_frames=0, sink_frames=0))
            cache = kv_cache(whole, 2 * len(some), video.latent_frames, device)
            prompts = Conditioning(text, conditions.negative().to(device))
            found = trajectories(causal(network), making.integration, TrajectoryInputs(noise, clean, prompts), cache)
            for caption, states in zip(conditions.captions(own), found, strict=True):
                yield Entry(caption, states.to(getattr(torch, DTYPE)))

    with console.stage(f"{making.stage} trajectories", len(missing)) as bar:
        for done, shard in enumerate(missing, start=1):
            writer.write(shard, entries(shard))
            bar.update(done)
    writer.seal()


def _say(making: Making, plan: Plan, missing: int, console: Console) -> None:
    """Bytes and cost, before they are spent."""
    video, points = making.recipe.video, making.recipe.ode.points
    segments = video.latent_frames // video.frames_per_segment
    made = f"{plan.candidates} trajectories, {plan.shards} shards, {_bytes(plan) / 1e6:,.1f} MB"
    passes = f"{segments * points + segments - 1} segment passes of the AR teacher"
    cost = f"a trajectory is {passes}, each with prompt and negative prompt"
    console.say(f"{making.stage}: {made}; {cost}; this process makes {missing} shards")


def _teacher(making: Making, device: torch.device) -> tuple[nn.Module, Started]:
    """The whole AR teacher, in the compute dtype, on this device."""
    recipe = making.recipe
    source = source_of(recipe, making.stage, making.settings.parent, making.run_dir)
    assert source is not None  # a rule wants the parent of an ode stage
    backends = backends_of(recipe, device, trained=False)
    with torch.device("meta"):
        network = WanModel(wan_shape(recipe.generator, recipe), backends, ops_of(recipe, device))
    network = network.to(getattr(torch, recipe.parallel.compute_dtype)).to_empty(device=device).requires_grad_(False)
    return network, fill(network, source, "ode", "parent")


def _bytes(plan: Plan) -> int:
    size = 2 * plan.candidates
    for each in plan.shape:
        size *= each
    return size
