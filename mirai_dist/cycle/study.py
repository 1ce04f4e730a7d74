"""The end of a run: sample what every stage has trained, measure, probe, and write the report.

All ranks sample their share with the sharded networks; the measuring is split over ranks; rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from mirai_dist.config import RecipeError, Resolved, schema
from mirai_dist.config.digest import to_yaml
from mirai_dist.config.jobs import Job, jobs
from mirai_dist.cycle import account, gate
from mirai_dist.cycle.pipeline import Place, make_run
from mirai_dist.cycle.roles import Builder, Role
from mirai_dist.cycle.stages import Run
from mirai_dist.cycle.starts import fill, source_of
from mirai_dist.cycle.studio import Studio, gathered
from mirai_dist.evaluate import probe, video_files, world_metrics
from mirai_dist.evaluate import report as page
from mirai_dist.evaluate.statistics import paired
from mirai_dist.state.checkpoint import load_network, newest

T = TypeVar("T")
SHOWN = 6  # prompts whose videos are shown side by side
GROUND_TRUTH, RANDOM, COPY = "ground truth", "random generator", "copy current"
HIGHER = {"boundary_jump": False, "clipped": False}
Trained = tuple[str, int]  # of the study: arm and seed


def title(stage: str) -> str:
    """What the report calls a stage."""
    return stage.replace("_", " ")


def split(run: Run, work: list[Callable[[], T]]) -> list[T]:
    """Results of independent pieces of work, each done by one rank, all known to every rank."""
    own = {i: piece() for i, piece in enumerate(work) if i % run.ranks == run.rank}
    found: dict[int, T] = {}
    for part in gathered(own):
        found |= part
    return [found[i] for i in range(len(work))]


class Darkroom:
    """Samples what the jobs of a run have trained, all for the same prompts, into pixels [N, T, 3, H, W]."""

    def __init__(self, run: Run, count: int) -> None:
        self.run, self.count = run, count
        self._roles: dict[str, Role] = {}

    def studio(self, recipe: schema.Recipe) -> Studio:
        """A studio for a stage's own recipe: its segments, steps and guidance."""
        return Studio(replace(self.run, recipe=recipe), self.count)

    def role(self, name: str) -> Role:
        """The teacher or the generator: built when something first needs it, with random weights."""
        if name not in self._roles:
            network = getattr(self.run.recipe, name)
            self._roles[name] = Builder(self.run.recipe, self.run.engine, self.run.draws).wan(name, network, None)
        return self._roles[name]

    def loaded(self, job: Job) -> Role:
        """The network that a job has trained: its moving average where it keeps one."""
        stage = job.recipe.stages[job.stage]
        role = self.role("teacher" if stage.kind == "bidirectional" else "generator")
        path = newest(job.directory / "checkpoints")
        assert path is not None, job.directory
        load_network(path, role.name, role.network, "ema" if stage.ema.decay > 0 else "raw")
        role.engine.release(role.network)
        return role

    def samples(self, job: Job) -> Tensor:
        """Of the prompts that quality is measured on."""
        role = self.loaded(job)
        return self.studio(job.recipe).sampler(job.recipe.stages[job.stage].kind)(role)


@dataclass
class Material:
    """Everything sampled: pixels of videos of stages and of the study's arms, and what the probe reads."""

    stages: dict[str, Tensor]
    arms: dict[Trained, Tensor]
    states: dict[Trained, Tensor]
    history: page.Precondition


def sample_all(every: Sequence[Job], place: Place, darkroom: Darkroom) -> Material:
    """Sample every stage, an untrained generator, and every arm and seed of the study."""
    study = [job for job in every if job.arm]
    of_study = darkroom.studio(study[0].recipe)
    generator = darkroom.role("generator")
    states = {(RANDOM, study[0].seed): of_study.readout_states(generator)}
    arms: dict[Trained, Tensor] = {}
    stages: dict[str, Tensor] = {}
    with place.console.stage("sampling", len(every)) as bar:
        for done, job in enumerate(every, start=1):
            if job.arm:
                arms[job.arm, job.seed] = darkroom.samples(job)
                states[job.arm, job.seed] = of_study.readout_states(generator)
            else:
                stages[job.stage] = darkroom.samples(job)
            bar.update(done)
    recipe, stage = study[0].recipe, study[0].stage
    start = source_of(recipe, stage, recipe.stages[stage].parent, place.run_dir)
    assert start is not None  # a rule wants the parent of a dmd stage
    fill(generator.network, start, "dmd", "parent")
    generator.engine.release(generator.network)
    return Material(stages, arms, states, of_study.history_errors(generator))


Measures = dict[str, list[float]]  # by measure: a value a prompt


@dataclass(frozen=True)
class Measured:
    """Every measure of every prompt: of clips of the world, of each stage's samples, and of each arm and seed."""

    truth: Measures
    stages: dict[str, Measures]
    arms: dict[Trained, Measures]


def measure_all(every: Sequence[Job], darkroom: Darkroom, material: Material) -> Measured:
    """Measure all samples, split over the ranks."""
    recipe, run = darkroom.run.recipe, darkroom.run
    studio, count = darkroom.studio(recipe), recipe.evaluate.samples
    captions = studio.captions[:count]
    truth = run.vae.decode(run.clean_latents(studio.numbers, range(count))).cpu()

    def measure(videos: Tensor, own: schema.Recipe) -> Measures:
        found = world_metrics.measure(videos[:count], captions, own.video, own.world)
        return {name: value.float().tolist() for name, value in found.items()}

    pixels = [material.arms[job.arm, job.seed] if job.arm else material.stages[job.stage] for job in every]
    work = [(truth, recipe), *((videos, job.recipe) for videos, job in zip(pixels, every, strict=True))]
    first, *others = split(run, [lambda v=videos, r=own: measure(v, r) for videos, own in work])
    pairs = list(zip(every, others, strict=True))
    stages = {job.stage: found for job, found in pairs if not job.arm}
    return Measured(first, stages, {(job.arm, job.seed): found for job, found in pairs if job.arm})


def quality(measured: Measured, study: schema.Study) -> list[page.QualityRow]:
    """One row a measure: every stage and arm, with the paired difference of the first two arms over seeds."""
    arms = list(study.arms)

    def row(metric: str) -> page.QualityRow:
        def mean(found: Measures) -> float:
            return sum(found[metric]) / len(found[metric])

        values = {GROUND_TRUTH: [mean(measured.truth)]}
        values |= {title(name): [mean(found)] for name, found in measured.stages.items()}
        values |= {arm: [mean(measured.arms[arm, seed]) for seed in study.seeds] for arm in arms}
        higher = HIGHER.get(metric, True)
        if len(arms) > 1:
            return page.QualityRow.measured(metric, values, (arms[1], arms[0]), higher_is_better=higher)
        cells = {name: page.Cell.of(numbers) for name, numbers in values.items()}
        return page.QualityRow(metric, cells, None, higher_is_better=higher)

    return [row(metric) for metric in ["score", *(metric for metric in measured.truth if metric != "score")]]


def steps(every: Sequence[Job], measured: Measured, seeds: Sequence[int]) -> list[page.StageStep]:
    """What each stage, and each arm of the study, makes of what it started from, over the same prompts."""
    scores = {name: found["score"] for name, found in measured.stages.items()}
    seconds = account.seconds(every)
    rows = []
    for job in every:
        if job.arm and job.seed != seeds[0]:
            continue
        alike = [each for each in every if (each.stage, each.arm) == (job.stage, job.arm)]
        own = scores[job.stage] if not job.arm else _mean([measured.arms[job.arm, seed]["score"] for seed in seeds])
        stage = job.recipe.stages[job.stage]
        before = scores.get(stage.parent)
        rows.append(
            page.StageStep(
                name=job.arm or title(job.stage),
                kind=stage.kind,
                parent=title(stage.parent),
                frames_per_segment=0 if stage.kind == "bidirectional" else job.recipe.video.frames_per_segment,
                cycles=stage.cycles,
                seconds=sum(seconds[each.title] for each in alike) / len(alike),
                score=sum(own) / len(own),
                gain=paired([a - b for a, b in zip(own, before, strict=True)]) if before else None,
            )
        )
    return rows


def _mean(lists: Sequence[Sequence[float]]) -> list[float]:
    """Mean over lists, place by place."""
    return [sum(values) / len(values) for values in zip(*lists, strict=True)]


def probes(darkroom: Darkroom, material: Material, arms: list[str]) -> page.ProbeResult:
    """Readout PSNR of every arm and seed at every distance, with the copy and random controls."""
    recipe, studio = darkroom.run.recipe, darkroom.studio(darkroom.run.recipe)
    video = recipe.video
    ks = range(min(4, video.latent_frames // video.frames_per_segment))
    assert darkroom.run.world is not None
    pixels = darkroom.run.world.clips(studio.numbers)

    def readout(states: Tensor, k: int, seed: int) -> float:
        return probe.readout_psnr(probe.Readings(states, pixels), video, k, recipe.evaluate.probe_updates, seed)

    tasks = [(name, seed, states, k) for (name, seed), states in material.states.items() for k in ks]
    results = split(darkroom.run, [lambda s=states, k=k, n=seed: readout(s, k, n) for _, seed, states, k in tasks])
    found: dict[str, dict[int, list[float]]] = {}
    for (name, _, _, k), value in zip(tasks, results, strict=True):
        found.setdefault(name, {}).setdefault(k, []).append(value)
    found[COPY] = {k: [probe.copy_current_psnr(pixels, video, k)] for k in ks if k > 0}
    return page.ProbeResult.measured(found, arms[1], [a for a in arms if a != arms[1]], material.history)


def videos(studio: Studio, columns: Mapping[str, Tensor], note: str, run_dir: Path) -> page.VideoTable:
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
    measured = not recipe.data.prompts and recipe.study_stage
    if measured and recipe.video.latent_frames < world_metrics.LEAST_FRAMES:
        what = f"{recipe.video.latent_frames} is too short to measure motion; use {world_metrics.LEAST_FRAMES} or more"
        raise RecipeError("video.latent_frames", what)


def report(resolved: Resolved, place: Place) -> None:
    """Write RUN/report.html and RUN/report.json: samples, curves and phase times, and in the procedural world, where
    the truth is known, quality and future readout."""
    every = list(jobs(resolved, place.run_dir))
    study = [job for job in every if job.arm]
    if not study:
        place.console.say("no dmd stage: nothing to compare, no report")
        return
    started = time.time()
    # what is measured is the same for all seeds: the recipe's own seed draws it
    run = make_run(replace(study[0], seed=resolved.recipe.seed), place)
    found = measure_world(every, place, run) if run.world else sample_prompts(every, place, run)
    if place.ranks.rank != 0:
        return
    recipe, arms = resolved.recipe, list(resolved.recipe.study.arms)
    document = page.Report(
        name=recipe.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        treatment=arms[min(1, len(arms) - 1)],
        baseline=arms[0],
        order=[GROUND_TRUTH, *(title(job.stage) for job in every if not job.arm), *arms, RANDOM, COPY],
        seeds=list(recipe.study.seeds),
        provenance=account.provenance(resolved, every, time.time() - started),
        gates=gate.results(place.run_dir, recipe),
        steps=found.steps,
        quality=found.quality,
        probe=found.probe,
        videos=found.videos,
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
class Found:
    """What the report shows of the trained networks; `videos` on rank 0 alone."""

    quality: list[page.QualityRow]
    steps: list[page.StageStep]
    probe: page.ProbeResult | None
    videos: page.VideoTable | None


def measure_world(every: Sequence[Job], place: Place, run: Run) -> Found:
    """Quality and readout of every stage, arm and seed in the procedural world. Called by all ranks."""
    recipe = run.recipe
    assert run.world is not None
    darkroom = Darkroom(run, recipe.evaluate.probe_clips)
    material = sample_all(every, place, darkroom)
    place.console.say("measuring quality and future readout")
    measured = measure_all(every, darkroom, material)
    arms = list(recipe.study.arms)
    readout = probes(darkroom, material, arms) if len(arms) > 1 else None
    rows, bought = quality(measured, recipe.study), steps(every, measured, recipe.study.seeds)
    if place.ranks.rank != 0:
        return Found(rows, bought, readout, None)
    studio, seed = darkroom.studio(recipe), recipe.study.seeds[0]
    columns = {
        GROUND_TRUTH: run.world.clips(studio.numbers[:SHOWN]),
        **{title(name): pixels for name, pixels in material.stages.items()},
        **{arm: material.arms[arm, seed] for arm in arms[:2]},
    }
    note = f"Arms: seed {seed}. Ground truth: a clip of that caption."
    return Found(rows, bought, readout, videos(studio, columns, note, place.run_dir))


def sample_prompts(every: Sequence[Job], place: Place, run: Run) -> Found:
    """A few videos of each stage and arm. Called by all ranks; what they are worth is for VBench to say."""
    darkroom, seed = Darkroom(run, SHOWN), run.recipe.study.seeds[0]
    shown = [job for job in every if job.arm == "" or job.seed == seed]
    columns = {job.arm or title(job.stage): darkroom.samples(job) for job in shown}
    if place.ranks.rank != 0:
        return Found([], [], None, None)
    note = f"Arms: seed {seed}. The first {SHOWN} of the evaluation's prompts. Quality is not measured here."
    return Found([], [], None, videos(darkroom.studio(run.recipe), columns, note, place.run_dir))
