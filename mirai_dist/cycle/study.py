"""The end of a run: sample every trained generator, measure, probe, and write the report.

All ranks sample their share with the sharded networks; the measuring is split over ranks; rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from mirai_dist.config import RecipeError, Resolved, schema
from mirai_dist.config.digest import to_yaml
from mirai_dist.cycle import account
from mirai_dist.cycle.pipeline import Job, Place, jobs, make_run
from mirai_dist.cycle.roles import Role
from mirai_dist.cycle.stages import Run
from mirai_dist.cycle.studio import Studio, gathered
from mirai_dist.evaluate import probe, video_files, world_metrics
from mirai_dist.evaluate import report as page
from mirai_dist.state.checkpoint import load_network, newest

T = TypeVar("T")
SHOWN = 6  # prompts whose videos are shown side by side
GROUND_TRUTH, TEACHER, START, RANDOM, COPY = (
    "ground truth",
    "teacher",
    "few-step start",
    "random generator",
    "copy current",
)
HIGHER = {"boundary_jump": False, "clipped": False}


def split(run: Run, work: list[Callable[[], T]]) -> list[T]:
    """Results of independent pieces of work, each done by one rank, all known to every rank."""
    own = {i: piece() for i, piece in enumerate(work) if i % run.ranks == run.rank}
    found: dict[int, T] = {}
    for part in gathered(own):
        found |= part
    return [found[i] for i in range(len(work))]


@dataclass
class Material:
    """Everything sampled: pixels of videos and probe states, by name; arms by (name, seed)."""

    teacher: Tensor
    before: dict[str, Tensor]  # other stages before the few-step start, by what the report calls them
    start: Tensor
    arms: dict[tuple[str, int], Tensor]
    states: dict[tuple[str, int], Tensor]
    history: page.Precondition


def sample_all(resolved: Resolved, place: Place, studio: Studio) -> Material:
    """Sample teacher, few-step start, an untrained generator, and every arm and seed of the study."""
    every = list(jobs(resolved, place.run_dir))
    dmd = [job for job in every if job.arm]
    by_stage = {job.stage: job for job in every if not job.arm}
    recipe = resolved.recipe
    stage = recipe.stages[dmd[0].stage]
    teacher = studio.builder.wan("teacher", recipe.teacher, None)
    _load(teacher, by_stage[stage.teacher])
    generator = studio.builder.wan("generator", recipe.generator, None)
    states = {(RANDOM, recipe.study.seeds[0]): studio.readout_states(generator)}
    before = {}
    for name, job in by_stage.items():
        kind = recipe.stages[name].kind
        if name not in (stage.teacher, stage.parent) and kind != "bidirectional":
            _load(generator, job)
            before[name.replace("_", " ")] = studio.sampler(kind)(generator)
    _load(generator, by_stage[stage.parent])
    start, history = studio.generator_samples(generator), studio.history_errors(generator)
    arms = {}
    with place.console.stage("sampling", len(dmd)) as bar:
        for done, job in enumerate(dmd, start=1):
            _load(generator, job)
            arms[job.arm, job.seed] = studio.generator_samples(generator)
            states[job.arm, job.seed] = studio.readout_states(generator)
            bar.update(done)
    return Material(studio.teacher_samples(teacher), before, start, arms, states, history)


def _load(role: Role, job: Job) -> None:
    path = newest(job.directory / "checkpoints")
    assert path is not None, job.directory
    load_network(path, role.name, role.network, "ema" if job.recipe.stages[job.stage].ema.decay > 0 else "raw")
    role.engine.release(role.network)


def quality(studio: Studio, material: Material, arms: list[str], seeds: list[int]) -> list[page.QualityRow]:
    """One row a measure: teacher, few-step start and every arm, with the paired difference of the first two arms."""
    recipe, count = studio.recipe, studio.recipe.evaluate.samples
    captions = studio.captions[:count]
    truth = studio.run.vae.decode(studio.run.clean_latents(studio.numbers, range(count))).cpu()
    columns: list[tuple[str, Tensor]] = [
        (GROUND_TRUTH, truth),
        (TEACHER, material.teacher),
        *material.before.items(),
        (START, material.start),
        *((arm, material.arms[arm, seed]) for arm in arms for seed in seeds),
    ]

    def measure(videos: Tensor) -> dict[str, float]:
        found = world_metrics.measure(videos[:count], captions, recipe.video, recipe.world)
        return {name: value.mean().item() for name, value in found.items()}

    results = split(studio.run, [lambda videos=videos: measure(videos) for _, videos in columns])
    values: dict[str, dict[str, list[float]]] = {}
    for (name, _), result in zip(columns, results, strict=True):
        for metric, value in result.items():
            values.setdefault(metric, {}).setdefault(name, []).append(value)
    return [_quality_row(m, values[m], arms) for m in ["score", *(m for m in values if m != "score")]]


def _quality_row(metric: str, values: dict[str, list[float]], arms: list[str]) -> page.QualityRow:
    higher = HIGHER.get(metric, True)
    if len(arms) > 1:
        return page.QualityRow.measured(metric, values, (arms[1], arms[0]), higher_is_better=higher)
    cells = {name: page.Cell.of(numbers) for name, numbers in values.items()}
    return page.QualityRow(metric, cells, None, higher_is_better=higher)


def probes(studio: Studio, material: Material, arms: list[str], seeds: list[int]) -> page.ProbeResult:
    """Readout PSNR of every arm and seed at every distance, with the copy and random controls."""
    recipe, video = studio.recipe, studio.recipe.video
    ks = range(min(4, video.latent_frames // video.frames_per_segment))
    assert studio.run.world is not None
    pixels = studio.run.world.clips(studio.numbers)

    def readout(states: Tensor, k: int, seed: int) -> float:
        return probe.readout_psnr(probe.Readings(states, pixels), video, k, recipe.evaluate.probe_updates, seed)

    tasks = [(name, seed, states, k) for (name, seed), states in material.states.items() for k in ks]
    results = split(studio.run, [lambda s=states, k=k, n=seed: readout(s, k, n) for _, seed, states, k in tasks])
    found: dict[str, dict[int, list[float]]] = {}
    for (name, _, _, k), value in zip(tasks, results, strict=True):
        found.setdefault(name, {}).setdefault(k, []).append(value)
    found[COPY] = {k: [probe.copy_current_psnr(pixels, video, k)] for k in ks if k > 0}
    return page.ProbeResult.measured(found, arms[1], [a for a in arms if a != arms[1]], material.history)


def videos(studio: Studio, columns: dict[str, Tensor], note: str, run_dir: Path) -> page.VideoTable:
    """Write the side-by-side videos below RUN/samples: the first prompts, one column a name of `columns`."""
    rows = []
    for i in range(min(SHOWN, *(len(pixels) for pixels in columns.values()))):
        paths = {}
        for column, pixels in columns.items():
            path = Path("samples") / column.replace(" ", "_") / video_files.vbench_name(studio.captions[i], i)
            video_files.write_mp4(run_dir / path, video_files.to_uint8(pixels[i]), studio.recipe.video.fps)
            paths[column] = str(path)
        rows.append(page.VideoRow(studio.captions[i], paths))
    return page.VideoTable(list(columns), rows, note)


def check_reportable(recipe: schema.Recipe) -> None:
    """Refuse, before anything is trained, what the report could not measure. Raises RecipeError."""
    measured = not recipe.data.prompts and any(stage.kind == "dmd" for stage in recipe.stages.values())
    if measured and recipe.video.latent_frames < world_metrics.LEAST_FRAMES:
        what = f"{recipe.video.latent_frames} is too short to measure motion; use {world_metrics.LEAST_FRAMES} or more"
        raise RecipeError("video.latent_frames", what)


def report(resolved: Resolved, place: Place) -> None:
    """Write RUN/report.html and RUN/report.json: samples, curves and phase times, and in the procedural world, where
    the truth is known, quality and future readout."""
    every = list(jobs(resolved, place.run_dir))
    if not any(job.arm for job in every):
        place.console.say("no dmd stage: nothing to compare, no report")
        return
    started = time.time()
    # what is measured is the same for all seeds: the recipe's own seed draws it
    run = make_run(replace(next(job for job in every if job.arm), seed=resolved.recipe.seed), place)
    measured = measure_world(resolved, place, run) if run.world else sample_prompts(resolved, place, run)
    if place.ranks.rank != 0:
        return
    recipe, arms = resolved.recipe, list(resolved.recipe.study.arms)
    document = page.Report(
        name=recipe.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        treatment=arms[min(1, len(arms) - 1)],
        baseline=arms[0],
        order=[GROUND_TRUTH, TEACHER, *measured.before, START, *arms, RANDOM, COPY],
        seeds=list(recipe.study.seeds),
        provenance=account.provenance(resolved, every, time.time() - started),
        quality=measured.quality,
        probe=measured.probe,
        videos=measured.videos,
        curves=account.curves(every),
        alarms=account.alarms(every),
        timing=account.timings(every),
        recipe_yaml=to_yaml(recipe),
        effective_yaml=(place.run_dir / "effective.yaml").read_text(),
    )
    path = page.write(place.run_dir, document)
    for sentence in page.summary(document):
        place.console.say(sentence)
    place.console.say(f"report: {path}")


@dataclass(frozen=True)
class Measured:
    """What the report shows of the trained generators; `videos` on rank 0 alone."""

    quality: list[page.QualityRow]
    probe: page.ProbeResult | None
    videos: page.VideoTable | None
    before: tuple[str, ...] = ()  # names of stages before the few-step start


def measure_world(resolved: Resolved, place: Place, run: Run) -> Measured:
    """Quality and readout of every arm and seed in the procedural world. Called by all ranks."""
    recipe = resolved.recipe
    assert run.world is not None
    studio = Studio(run, recipe.evaluate.probe_clips)
    arms, seeds = list(recipe.study.arms), list(recipe.study.seeds)
    material = sample_all(resolved, place, studio)
    place.console.say("measuring quality and future readout")
    rows = quality(studio, material, arms, seeds)
    readout = probes(studio, material, arms, seeds) if len(arms) > 1 else None
    if place.ranks.rank != 0:
        return Measured(rows, readout, None)
    columns = {
        GROUND_TRUTH: run.world.clips(studio.numbers[:SHOWN]),
        TEACHER: material.teacher,
        **material.before,
        START: material.start,
        **{arm: material.arms[arm, seeds[0]] for arm in arms[:2]},
    }
    note = f"Arms: seed {seeds[0]}. Ground truth: a clip of that caption."
    return Measured(rows, readout, videos(studio, columns, note, place.run_dir), tuple(material.before))


def sample_prompts(resolved: Resolved, place: Place, run: Run) -> Measured:
    """A few videos of each arm's generator. Called by all ranks; what they are worth is for VBench to say."""
    recipe = resolved.recipe
    studio = Studio(run, SHOWN)
    generator = studio.builder.wan("generator", recipe.generator, None)
    seed = recipe.study.seeds[0]
    columns = {}
    for job in jobs(resolved, place.run_dir):
        if job.arm and job.seed == seed:
            _load(generator, job)
            columns[job.arm] = studio.generator_samples(generator)
    if place.ranks.rank != 0:
        return Measured([], None, None)
    note = f"Seed {seed}, the first {SHOWN} of the evaluation's prompts. Quality is not measured here."
    return Measured([], None, videos(studio, columns, note, place.run_dir))
