"""The tiny twin of a recipe: the same run at sizes that two CPU ranks train in seconds.

What stays is everything that decides which code runs: roles and their sources, cadence, accumulation, exit draws,
offsets, presets, schedules, precision, sharding units, window and sink, the proportion of the networks' depths.
What shrinks is how large and how long: widths, depths, frames, texts, cycles, seeds, ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mirai_dist.config import FileError, Resolved, schema
from mirai_dist.config.digest import flatten
from mirai_dist.config.kinds import ACCEPTS
from mirai_dist.config.rules import accumulation, check_layout, least_grid
from mirai_dist.config.schema import Network, Optimizer, Recipe
from mirai_dist.config.source import dump
from mirai_dist.evaluate.world_metrics import LEAST_FRAMES

RANKS = 2  # of a twin, and of a recipe that does not say how many it is for
CYCLES = 2  # before and after whatever begins late
HEAD_DIM = 20  # rotates 8 channels with time, 6 with rows, 6 with columns: uneven, as 128 = 44 + 42 + 42 is


@dataclass(frozen=True)
class Scale:
    """What a recipe, its stages and arms shrink by: latent frames, divisor of the depths, widths in use."""

    frames: int
    blocks: int
    widths: tuple[int, ...]
    ranks: int
    folder: Path


def ranks_of(path: Path, asked: int | None) -> int:
    """How many ranks a recipe is written for: what was asked for, else -NODESxGPUS at the end of its file name, else
    the two that a machine without GPUs runs. FileError where that is no number of ranks."""
    if asked is not None:
        if asked < 1:
            raise FileError("--ranks", f"{asked} ranks cannot train anything; use at least 1")
        return asked
    layout = re.search(r"-(\d+)x(\d+)$", path.stem)
    ranks = int(layout[1]) * int(layout[2]) if layout else RANKS
    if ranks < 1:
        raise FileError(path, f"the name says {layout and layout[0][1:]} ranks; give the number with --ranks")
    return ranks


def twin(resolved: Resolved, ranks: int, folder: Path) -> Recipe:
    """The twin of a recipe that is written for `ranks` ranks; the files it names lie in `folder`.

    Raises RecipeError where the recipe itself cannot run on that many ranks.
    """
    recipe = resolved.recipe
    for variant in resolved.variants():
        check_layout(variant.recipe, ranks)
    stages = {name: resolved.of_stage(name).recipe for name in recipe.stages}
    arms = {name: resolved.of_arm(name).recipe for name in recipe.study.arms}
    every = [recipe, *stages.values(), *arms.values()]
    scale = Scale(_frames(every), _block_divisor(every), _widths(recipe), ranks, folder)
    small = _shrunken(recipe, scale)
    own = {
        name: _shrunken_overrides(recipe.stages[name].overrides, _shrunken(stage, scale))
        for name, stage in stages.items()
    }
    of_arms = {name: _shrunken_overrides(recipe.study.arms[name], _shrunken(arm, scale)) for name, arm in arms.items()}
    return replace(
        small,
        stages={name: replace(stage, overrides=own[name]) for name, stage in small.stages.items()},
        study=replace(small.study, arms=of_arms),
    )


def weight_path(entry: str, published: str, folder: Path) -> Path:
    """Where the twin of published weights lies: a folder where they are one, a .pt file where they are one."""
    return folder / "weights" / (f"{entry}.pt" if is_pickled(published) else entry)


def vae_path(published: str, folder: Path) -> Path:
    """Where the twin of the autoencoder lies, in the layout that its path suggests."""
    return folder / ("Wan2.1_VAE.pth" if is_pickled(published) else "vae")


def is_pickled(published: str) -> bool:
    """Whether a path is that of one file of torch.save, and not of a folder."""
    return Path(published).suffix in (".pt", ".pth", ".bin", ".ckpt")


# --- what the recipe and all its arms must have in common ------------------------------------------------------


def _frames(recipes: Sequence[Recipe]) -> int:
    """Fewest latent frames in which, in whole segments of each recipe, every offset has a full and a cut target, every
    window slides, and motion shows."""
    whole = math.lcm(*(recipe.video.frames_per_segment for recipe in recipes))
    wanted = max(_segments(recipe) * recipe.video.frames_per_segment for recipe in recipes)
    return min(recipes[0].video.latent_frames, -(-wanted // whole) * whole)


def _segments(recipe: Recipe) -> int:
    measured = 0 if recipe.data.prompts else LEAST_FRAMES
    wanted = [3, -(-measured // recipe.video.frames_per_segment), max(recipe.foresight.offsets) + 2]
    if _slides(recipe):
        wanted.append(_window_segments(recipe) + 1)
    return max(wanted)


def _slides(recipe: Recipe) -> bool:
    return 0 < recipe.rollout.window_frames < recipe.video.latent_frames


def _window_segments(recipe: Recipe) -> int:
    """Of a sliding window: the present segment, one that will leave, and the sink."""
    own = recipe.rollout.window_frames // recipe.video.frames_per_segment
    return min(own, 3 if recipe.rollout.sink_frames else 2)


def _block_divisor(recipes: Sequence[Recipe]) -> int:
    """Largest divisor of all depths that leaves the foresight depth a whole number of blocks wherever it is one."""
    recipe = recipes[0]
    depths = [recipe.teacher.blocks, recipe.generator.blocks, recipe.critic.blocks]
    fractions = {each.foresight.depth for each in recipes}
    common = math.gcd(*depths)
    for divisor in range(common, 1, -1):
        if common % divisor == 0 and all(
            _whole(blocks // divisor * fraction) or not _whole(blocks * fraction)
            for blocks in depths
            for fraction in fractions
        ):
            return divisor
    return 1


def _whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-9


def _widths(recipe: Recipe) -> tuple[int, ...]:
    return tuple(sorted({recipe.teacher.dim, recipe.generator.dim, recipe.critic.dim}))


# --- one recipe ------------------------------------------------------------------------------------------------


def _shrunken(recipe: Recipe, scale: Scale) -> Recipe:
    return replace(
        recipe,
        name=f"{recipe.name}-twin",
        video=_video(recipe.video, scale),
        world=recipe.world if recipe.data.prompts else _world(recipe, scale),
        text=_text(recipe.text, scale.folder),
        data=_data(recipe.data, scale.folder),
        vae=replace(recipe.vae, path=str(vae_path(recipe.vae.path, scale.folder)) if recipe.vae.path else ""),
        weights={
            name: replace(each, path=str(weight_path(name, each.path, scale.folder)), kind=_kind(name, recipe))
            for name, each in recipe.weights.items()
        },
        teacher=_network(recipe.teacher, scale),
        generator=_network(recipe.generator, scale),
        critic=_network(recipe.critic, scale),
        rollout=_rollout(recipe, scale),
        ode=_ode(recipe),
        dmd=replace(recipe.dmd, critic_optimizer=_optimizer(recipe.dmd.critic_optimizer)),
        foresight=replace(
            recipe.foresight,
            start_cycle=min(recipe.foresight.start_cycle, 1),
            optimizer=_optimizer(recipe.foresight.optimizer),
        ),
        stages={name: _stage(stage, scale) for name, stage in recipe.stages.items()},
        parallel=replace(
            recipe.parallel,
            replicas=min(recipe.parallel.replicas, RANKS),
            attention="auto",  # what was named may need a GPU
            segment_attention="auto",
            kernels="auto",
        ),
        checkpoint=replace(recipe.checkpoint, every_cycles=1),
        study=replace(recipe.study, seeds=recipe.study.seeds[:1]),
        evaluate=_evaluate(recipe.evaluate),
    )


def _video(video: schema.Video, scale: Scale) -> schema.Video:
    # 2 x 2 tokens a frame, and one column more where the real picture is wider: rows and columns are told apart
    wide = 2 if video.latent_width > video.latent_height else 0
    return replace(
        video,
        latent_frames=scale.frames,
        latent_height=min(video.latent_height, 4),
        latent_width=min(video.latent_width, 4 + wide),
    )


def _world(recipe: Recipe, scale: Scale) -> schema.World:
    """Shapes and ways as much smaller as the picture is."""
    world, whole, small = recipe.world, recipe.video, _video(recipe.video, scale)
    by = min(small.latent_height / whole.latent_height, small.latent_width / whole.latent_width)
    return replace(world, speed=world.speed * by, radius=world.radius * by, radius_jitter=world.radius_jitter * by)


def _data(data: schema.Data, folder: Path) -> schema.Data:
    prompts = str(folder / "prompts.txt") if data.prompts else ""
    return replace(data, prompts=prompts, latents=str(folder / "latents") if data.latents else "")


def _text(text: schema.Text, folder: Path) -> schema.Text:
    path = str(folder / "embeddings") if text.encoder == "store" else text.path
    return replace(text, path=path, dim=min(text.dim, 24), length=min(text.length, 12))


def _kind(entry: str, recipe: Recipe) -> str:
    """Kind of the twin's weights, which record none themselves: that of the recipe, else the first that fits."""
    fitting = (
        ACCEPTS[stage.kind, role][0]
        for stage in recipe.stages.values()
        for role in ("parent", "teacher", "critic")
        if getattr(stage, role) == entry
    )
    return recipe.weights[entry].kind or next(fitting)


def _network(network: Network, scale: Scale) -> Network:
    """Narrower networks stay narrower, and equal ones equal."""
    heads = min(network.heads, 2 + scale.widths.index(network.dim))
    dim = HEAD_DIM * heads
    return Network(
        dim=dim,
        ffn_dim=round(dim * network.ffn_dim / network.dim),
        heads=heads,
        blocks=network.blocks // scale.blocks,
        freq_dim=min(network.freq_dim, 32),
    )


def _rollout(recipe: Recipe, scale: Scale) -> schema.Rollout:
    rollout, length = recipe.rollout, recipe.video.frames_per_segment
    if not rollout.window_frames:
        return rollout
    window = _window_segments(recipe) * length if _slides(recipe) else scale.frames
    longer = rollout.total_frames > recipe.video.latent_frames
    return replace(
        rollout,
        window_frames=window,
        sink_frames=min(rollout.sink_frames, length),
        total_frames=scale.frames + length if longer else 0,
    )


def _stage(stage: schema.Stage, scale: Scale) -> schema.Stage:
    micro = min(stage.batch.micro_size, 2)
    together = RANKS * micro * accumulation(stage.batch, scale.ranks)
    return replace(
        stage,
        cycles=min(stage.cycles, CYCLES),
        batch=replace(stage.batch, micro_size=micro, global_size=together),
        trajectories=min(stage.trajectories, 4),
        # weights that were trained for two cycles, or not at all, are measured and let pass
        gate=replace(stage.gate, clips=min(stage.gate.clips, 2), failing=1.0) if stage.gate.clips else stage.gate,
        optimizer=_optimizer(stage.optimizer),
        foresight=replace(stage.foresight, optimizer=_optimizer(stage.foresight.optimizer)),
        ema=replace(stage.ema, start_update=min(stage.ema.start_update, 1)),
    )


def _ode(recipe: Recipe) -> schema.Ode:
    if not any(stage.trajectories for stage in recipe.stages.values()):
        return recipe.ode
    return replace(recipe.ode, points=least_grid(recipe.rollout.steps), shard_size=min(recipe.ode.shard_size, 2))


def _optimizer(optimizer: Optimizer) -> Optimizer:
    return replace(optimizer, warmup=min(optimizer.warmup, 1))


def _evaluate(evaluate: schema.Evaluate) -> schema.Evaluate:
    return schema.Evaluate(
        samples=min(evaluate.samples, 2),
        probe_clips=min(evaluate.probe_clips, 8),
        probe_updates=min(evaluate.probe_updates, 2),
        grid_every=min(evaluate.grid_every, 1),
        teacher_steps=min(evaluate.teacher_steps, 2),
    )


def _shrunken_overrides(written: Iterable[str], arm: Recipe) -> list[str]:
    """An arm's overrides with the values of its twin."""
    values = flatten(arm)
    keys = [text.partition("=")[0].strip() for text in written]
    leaves = [leaf for key in keys for leaf in values if leaf == key or leaf.startswith(f"{key}.")]
    return [f"{leaf}={dump(values[leaf], flow=True)}" for leaf in leaves]
