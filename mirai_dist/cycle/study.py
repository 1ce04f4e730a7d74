"""The end of a run: sample every trained generator, measure, probe, and write the report.

All ranks sample their share with the sharded networks; the measuring is split over ranks; rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mirai_dist.config import Resolved
from mirai_dist.config.digest import to_yaml
from mirai_dist.cycle import account
from mirai_dist.cycle.pipeline import Job, Place, jobs, make_run
from mirai_dist.cycle.roles import (
    Builder,
    Role,
    causal,
    kv_cache,
    rollout_settings,
    teacher_forced,
    velocity_of,
)
from mirai_dist.cycle.stages import Run, start_from
from mirai_dist.evaluate import probe, video_files, world_metrics
from mirai_dist.evaluate import report as page
from mirai_dist.method.dmd import Conditioning
from mirai_dist.method.flow import add_noise, clean_from_velocity, euler_grid
from mirai_dist.method.foresight import PRESETS, captured_blocks
from mirai_dist.method.rollout import RolloutInputs, rollout
from mirai_dist.method.sampling import euler_sample
from mirai_dist.state.commit import latest
from mirai_dist.state.cursor import Cursor

T = TypeVar("T")
SHOWN = 6  # prompts whose videos are shown side by side
GROUND_TRUTH, TEACHER, START, RANDOM, COPY = (
    "ground truth", "teacher", "few-step start", "random generator", "copy current")
HIGHER = {"boundary_jump": False, "clipped": False}
HISTORY_RATIO = 0.8  # error with the right history must be below this fraction of the error without


@dataclass(frozen=True)
class Samples:
    """Videos of one network: pixels [N, T, 3, H, W] and, for generators, exit-pass states [N, segments, S, dim]."""

    pixels: Tensor
    states: Tensor | None = None


class Studio:
    """Samples networks of one run on all ranks; every rank ends up with everything."""

    def __init__(self, run: Run) -> None:
        self.run, self.recipe = run, run.recipe
        self.builder = Builder(run.recipe, run.engine, run.draws)
        self.count = run.recipe.evaluate.probe_clips
        cursor = Cursor(run.recipe.seed, "evaluate", size=None)
        self.numbers = [cursor.index(n) for n in cursor.take(self.count)]
        self.captions = run.world.captions(self.numbers)

    def own(self) -> list[int]:
        """Clips this rank samples: its stride of all, padded so that every rank makes as many passes."""
        per_rank = -(-self.count // self.run.ranks)
        return [(self.run.rank + i * self.run.ranks) % self.count for i in range(per_rank)]

    def text(self, clips: list[int]) -> Tensor:
        return self.run.encode(self.numbers, clips)

    @torch.no_grad()
    def generator_samples(self, role: Role) -> Samples:
        """Rollouts through all denoising steps, with the state of the last one."""
        recipe, clips = self.recipe, self.own()
        video, settings = recipe.video, rollout_settings(recipe)
        steps = len(settings.timesteps)
        shape = (steps + 1, video.latent_frames, video.channels, video.latent_height, video.latent_width)
        noise = self.run.draws.normal("evaluate/rollout", 0, 0, clips, shape).transpose(0, 1)
        depth = captured_blocks(recipe.generator.blocks, recipe.foresight.depth, PRESETS[recipe.foresight.preset])
        inputs = RolloutInputs(noise, self.text(clips), steps - 1, depth)
        cache = kv_cache(recipe, len(clips), video.latent_frames, noise.device, streaming=True)
        latents, states = rollout(causal(role.network), settings, inputs, cache)
        pixels = self.run.vae.decode(latents).cpu()
        return Samples(self._whole(clips, pixels), self._whole(clips, torch.stack(states, dim=1).float().cpu()))

    @torch.no_grad()
    def teacher_samples(self, role: Role) -> Samples:
        """Many-step guided samples of the bidirectional teacher, as many as quality is measured on."""
        recipe = self.recipe
        clips = [c for c in self.own() if c < recipe.evaluate.samples] or self.own()[:1]
        clips = (clips * 2)[: -(-recipe.evaluate.samples // self.run.ranks)]  # equal passes on all ranks
        video = recipe.video
        shape = (video.latent_frames, video.channels, video.latent_height, video.latent_width)
        noise = self.run.draws.normal("evaluate/teacher", 0, 0, clips, shape)
        grid = euler_grid(recipe.evaluate.teacher_steps, recipe.flow.shift)
        prompts = Conditioning(self.text(clips), self.run.negative)
        latents = euler_sample(velocity_of(role.network), noise, prompts, grid, recipe.dmd.guidance)
        return Samples(self._whole(clips, self.run.vae.decode(latents).cpu()))

    @torch.no_grad()
    def history_errors(self, role: Role) -> page.Precondition:
        """x0 error from pure noise on later segments: with the clip's own history, with another's, and of the mean."""
        clips = self.own()
        clean = self.run.clean_latents(self.numbers, clips)
        noise = self.run.draws.normal("evaluate/history", 0, 0, clips, clean.shape[1:])
        at = torch.full(clean.shape[:2], rollout_settings(self.recipe).timesteps[0], device=clean.device)
        segment = self.recipe.video.frames_per_segment
        network = teacher_forced(role.network, segment)

        def error(history: Tensor) -> float:
            noisy = add_noise(clean, noise, at)
            estimate = clean_from_velocity(noisy, network(noisy, at, self.text(clips), history), at)
            return self._mean((estimate - clean)[:, segment:].square().mean().item())

        spread = (clean - clean.mean(0))[:, segment:].square().mean().item()
        references = {"another clip's history": error(clean.roll(1, 0)), "mean predictor": self._mean(spread)}
        return page.Precondition(error(clean), references, HISTORY_RATIO)

    def _mean(self, value: float) -> float:
        return sum(gathered(value)) / self.run.ranks

    def _whole(self, clips: list[int], own: Tensor) -> Tensor:
        """Rows of all ranks in clip order."""
        rows: dict[int, Tensor] = {}
        for indices, tensor in gathered((clips, own)):
            rows |= dict(zip(indices, tensor, strict=True))
        return torch.stack([rows[i] for i in sorted(rows)])


def gathered(value: T) -> list[T]:
    """One object of every rank, in rank order."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def split(run: Run, work: list[Callable[[], T]]) -> list[T]:
    """Results of independent pieces of work, each done by one rank, all known to every rank."""
    own = {i: piece() for i, piece in enumerate(work) if i % run.ranks == run.rank}
    found: dict[int, T] = {}
    for part in gathered(own):
        found |= part
    return [found[i] for i in range(len(work))]


@dataclass
class Material:
    """Everything sampled, by name; arms by (name, seed)."""

    teacher: Samples
    start: Samples
    random: Samples
    arms: dict[tuple[str, int], Samples]
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
    random = studio.generator_samples(generator)
    _load(generator, by_stage[stage.parent])
    start, history = studio.generator_samples(generator), studio.history_errors(generator)
    arms = {}
    with place.console.stage("sampling", len(dmd)) as bar:
        for done, job in enumerate(dmd, start=1):
            _load(generator, job)
            arms[job.arm, job.seed] = studio.generator_samples(generator)
            bar.update(done)
    return Material(studio.teacher_samples(teacher), start, random, arms, history)


def _load(role: Role, job: Job) -> None:
    path = latest(job.directory / "checkpoints")
    assert path is not None, job.directory
    start_from(role, (path, "ema" if job.recipe.stages[job.stage].ema.decay > 0 else "raw"), role.name)


def quality(studio: Studio, material: Material, arms: list[str], seeds: list[int]) -> list[page.QualityRow]:
    """One row a measure: teacher, few-step start and every arm, with the paired difference of the first two arms."""
    recipe, count = studio.recipe, studio.recipe.evaluate.samples
    captions = studio.captions[:count]
    truth = studio.run.vae.decode(studio.run.clean_latents(studio.numbers, range(count))).cpu()
    columns: list[tuple[str, Tensor]] = [
        (GROUND_TRUTH, truth), (TEACHER, material.teacher.pixels), (START, material.start.pixels),
        *((arm, material.arms[arm, seed].pixels) for arm in arms for seed in seeds),
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
    named = [(arm, seed, material.arms[arm, seed]) for arm in arms for seed in seeds]
    named += [(RANDOM, seeds[0], material.random)]

    def readout(samples: Samples, k: int, seed: int) -> float:
        assert samples.states is not None
        rollouts = probe.Rollouts(samples.states, samples.pixels)
        return probe.readout_psnr(rollouts, video, k, recipe.evaluate.probe_updates, seed)

    tasks = [(name, seed, samples, k) for name, seed, samples in named for k in ks]
    results = split(studio.run, [lambda s=samples, k=k, n=seed: readout(s, k, n) for _, seed, samples, k in tasks])
    found: dict[str, dict[int, list[float]]] = {}
    for (name, _, _, k), value in zip(tasks, results, strict=True):
        found.setdefault(name, {}).setdefault(k, []).append(value)
    baseline = [material.arms[arms[0], seed] for seed in seeds]
    found[COPY] = {
        k: [probe.copy_current_psnr(probe.Rollouts(s.states, s.pixels), video, k) for s in baseline if s.states is not None]
        for k in ks if k > 0
    }
    return page.ProbeResult.measured(found, arms[1], [a for a in arms if a != arms[1]], material.history)


def videos(studio: Studio, material: Material, arms: list[str], seeds: list[int], run_dir: Path) -> page.VideoTable:
    """Write the side-by-side videos below RUN/samples: the first prompts, the first seed."""
    truth = studio.run.world.clips(studio.numbers[:SHOWN])
    columns = {GROUND_TRUTH: truth, TEACHER: material.teacher.pixels, START: material.start.pixels,
               **{arm: material.arms[arm, seeds[0]].pixels for arm in arms[:2]}}
    rows = []
    for i in range(min(SHOWN, studio.recipe.evaluate.samples)):
        paths = {}
        for column, pixels in columns.items():
            path = Path("samples") / column.replace(" ", "_") / f"{studio.captions[i].replace(' ', '_')}-{i}.mp4"
            video_files.write_mp4(run_dir / path, video_files.to_uint8(pixels[i]), studio.recipe.video.fps)
            paths[column] = str(path)
        rows.append(page.VideoRow(studio.captions[i], paths))
    return page.VideoTable(list(columns), rows, f"arms: seed {seeds[0]}; ground truth is the world's clip of the same caption")


def report(resolved: Resolved, place: Place) -> None:
    """Measure the finished run and write RUN/report.html and RUN/report.json."""
    every = list(jobs(resolved, place.run_dir))
    if not any(job.arm for job in every):
        place.console.say("no dmd stage: nothing to compare, no report")
        return
    started = time.time()
    recipe = resolved.recipe
    studio = Studio(make_run(every[0], place))
    arms, seeds = list(recipe.study.arms), list(recipe.study.seeds)
    material = sample_all(resolved, place, studio)
    place.console.say("measuring quality and future readout")
    rows = quality(studio, material, arms, seeds)
    readout = probes(studio, material, arms, seeds) if len(arms) > 1 else None
    if place.ranks.rank != 0:
        return
    document = page.Report(
        name=recipe.name, created=datetime.now(UTC).isoformat(timespec="seconds"), treatment=arms[min(1, len(arms) - 1)],
        baseline=arms[0], order=[GROUND_TRUTH, TEACHER, START, *arms, RANDOM, COPY], seeds=seeds,
        provenance=account.provenance(resolved, every, time.time() - started), quality=rows, probe=readout,
        videos=videos(studio, material, arms, seeds, place.run_dir), curves=account.curves(every),
        timing=account.timings(every), recipe_yaml=to_yaml(recipe),
        effective_yaml=(place.run_dir / "effective.yaml").read_text(),
    )
    path = page.write(place.run_dir, document)
    for sentence in page.summary(document):
        place.console.say(sentence)
    place.console.say(f"report: {path}")
