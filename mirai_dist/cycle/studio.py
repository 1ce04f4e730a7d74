"""Sampling with the sharded networks of a run: every rank makes its share, every rank gets everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mirai_dist.config.kinds import PRODUCES
from mirai_dist.cycle.roles import Builder, Role, causal, kv_cache, rollout_settings, teacher_forced, velocity_of
from mirai_dist.cycle.stages import Run
from mirai_dist.evaluate.report import Precondition
from mirai_dist.method.dmd import Conditioning, guided
from mirai_dist.method.flow import add_noise, clean_from_velocity, euler_grid
from mirai_dist.method.foresight import PRESETS, captured_blocks
from mirai_dist.method.ode import Integration, sample
from mirai_dist.method.rollout import RolloutInputs, rollout
from mirai_dist.method.sampling import euler_sample
from mirai_dist.models.wan import Capture, Clean
from mirai_dist.state.cursor import Cursor

T = TypeVar("T")
JUDGED_AT = 600.0  # timestep: much of a sample is gone, its composition is not
HISTORY_RATIO = 0.8  # error with the right history must be below this fraction of the error without


class Studio:
    """Samples networks of one run on all ranks; every rank ends up with everything."""

    def __init__(self, run: Run, count: int) -> None:
        self.run, self.recipe, self.count = run, run.recipe, count
        self.builder = Builder(run.recipe, run.engine, run.draws)
        cursor = Cursor(run.recipe.seed, "evaluate", run.conditions.size)
        self.numbers = [cursor.index(n) for n in cursor.take(self.count)]
        self.captions = run.conditions.captions(self.numbers)

    def own(self, most: int | None = None) -> list[int]:
        """Clips this rank samples: its stride of the first `most`, padded so that every rank makes as many passes."""
        count = self.count if most is None else min(self.count, most)
        per_rank = -(-count // self.run.ranks)
        return [(self.run.rank + i * self.run.ranks) % count for i in range(per_rank)]

    def text(self, clips: list[int]) -> Tensor:
        return self.run.encode(self.numbers, clips)

    def sampler(self, kind: str) -> Callable[[Role], Tensor]:
        """How what a stage of this kind has trained is sampled."""
        if kind == "bidirectional":
            return self.teacher_samples
        return self.ar_samples if PRODUCES[kind] == "ar" else self.generator_samples

    def generator_samples(self, role: Role) -> Tensor:
        """Pixels [N, T, 3, H, W] of rollouts through all denoising steps, of the clips quality is measured on."""
        clips = self.own(self.recipe.evaluate.samples)
        return self._pixels(clips, self._rollouts(role, clips))

    def causal_latents(self, kind: str, role: Role, at_once: int) -> tuple[list[int], Tensor]:
        """This rank's clips, and latents [n, F, C, H, W] of samples of a causal network of this kind of weights.

        At most `at_once` are sampled together; all ranks make as many passes.
        """
        sample = self._ar_latents if kind == "ar" else self._rollouts
        clips = self.own()
        parts = [sample(role, clips[first : first + at_once]) for first in range(0, len(clips), at_once)]
        return clips, torch.cat(parts)

    @torch.no_grad()
    def judged_samples(self, generator: Role, teacher: Role, critic: Role) -> dict[str, Tensor]:
        """The generator's pixels, and those of the x0 that guided teacher and critic see in its noised samples.

        Each [N, T, 3, H, W]. Where the two differ is where DMD pulls; all noise is fixed, so that grids of different
        cycles can be compared.
        """
        clips = self.own(self.recipe.evaluate.samples)
        latents = self._rollouts(generator, clips)
        at = torch.full((len(clips),), JUDGED_AT, device=latents.device)
        noise = self.run.draws.normal("evaluate/judged", 0, 0, clips, latents.shape[1:])
        noisy, text = add_noise(latents, noise, at), self.text(clips)

        def estimate(role: Role, prompts: Tensor) -> Tensor:
            return clean_from_velocity(noisy, velocity_of(role.network)(noisy, at, prompts), at)

        negative = self.run.negative.expand_as(text)
        real = guided(estimate(teacher, text), estimate(teacher, negative), self.recipe.dmd.guidance)
        judged = {"generator": latents, "teacher x0": real, "critic x0": estimate(critic, text)}
        return {name: self._pixels(clips, each) for name, each in judged.items()}

    def _pixels(self, clips: list[int], latents: Tensor) -> Tensor:
        return self._whole(clips, self.run.vae.decode(latents).cpu())

    @torch.no_grad()
    def _rollouts(self, role: Role, clips: list[int]) -> Tensor:
        """Latents of rollouts of some clips through all denoising steps."""
        recipe, video, settings = self.recipe, self.recipe.video, rollout_settings(self.recipe)
        last, last_of_first = settings.last_steps
        shape = (settings.noises, video.latent_frames, video.channels, video.latent_height, video.latent_width)
        noise = self.run.draws.normal("evaluate/rollout", 0, 0, clips, shape).transpose(0, 1)
        inputs = RolloutInputs(noise, self.text(clips), exit_step=last, first_exit_step=last_of_first)
        cache = kv_cache(recipe, len(clips), video.latent_frames, noise.device, streaming=True)
        return rollout(causal(role.network), settings, inputs, cache)[0]

    @torch.no_grad()
    def teacher_samples(self, role: Role) -> Tensor:
        """Pixels [N, T, 3, H, W] of many-step guided samples of the bidirectional teacher, same clips."""
        recipe = self.recipe
        clips = self.own(recipe.evaluate.samples)
        video = recipe.video
        shape = (video.latent_frames, video.channels, video.latent_height, video.latent_width)
        noise = self.run.draws.normal("evaluate/teacher", 0, 0, clips, shape)
        grid = euler_grid(recipe.evaluate.teacher_steps, recipe.flow.shift)
        prompts = Conditioning(self.text(clips), self.run.negative)
        latents = euler_sample(velocity_of(role.network), noise, prompts, grid, recipe.dmd.guidance)
        return self._pixels(clips, latents)

    def ar_samples(self, role: Role) -> Tensor:
        """Pixels [N, T, 3, H, W] of many-step guided samples of an AR teacher, segment by segment, same clips."""
        clips = self.own(self.recipe.evaluate.samples)
        return self._pixels(clips, self._ar_latents(role, clips))

    @torch.no_grad()
    def _ar_latents(self, role: Role, clips: list[int]) -> Tensor:
        recipe, video = self.recipe, self.recipe.video
        shape = (video.latent_frames, video.channels, video.latent_height, video.latent_width)
        noise = self.run.draws.normal("evaluate/ar", 0, 0, clips, shape)
        grid = euler_grid(recipe.evaluate.teacher_steps, recipe.flow.shift)
        settings = Integration(grid, (), video.frames_per_segment, recipe.dmd.guidance + 1.0)
        whole = replace(recipe, rollout=replace(recipe.rollout, window_frames=0, sink_frames=0))
        cache = kv_cache(whole, 2 * len(clips), video.latent_frames, noise.device, streaming=True)
        prompts = Conditioning(self.text(clips), self.run.negative)
        return sample(causal(role.network), settings, noise, prompts, cache)

    @torch.no_grad()
    def readout_states(self, role: Role) -> Tensor:
        """Mid-depth states [N, segments, S, dim] of the world's clips: each segment noised to the last denoising
        step, given its clean history, as the exit pass of a rollout that ends there would be."""
        recipe, clips = self.recipe, self.own()
        clean = self.run.clean_latents(self.numbers, clips)
        noise = self.run.draws.normal("evaluate/readout", 0, 0, clips, clean.shape[1:])
        at = torch.full(clean.shape[:2], rollout_settings(recipe).timesteps[-1], device=clean.device)
        depth = captured_blocks(recipe.generator.blocks, recipe.foresight.depth, PRESETS[recipe.foresight.preset])
        segment = recipe.video.frames_per_segment
        output = role.network(
            add_noise(clean, noise, at),
            at,
            self.text(clips),
            clean=Clean(clean),
            segment_frames=segment,
            capture=Capture(depth, stop=True),
        )
        states = output.hidden.unflatten(1, (clean.shape[1] // segment, -1))
        return self._whole(clips, states.float().cpu())

    @torch.no_grad()
    def history_errors(self, role: Role) -> Precondition:
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
        return Precondition(error(clean), references, HISTORY_RATIO)

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
