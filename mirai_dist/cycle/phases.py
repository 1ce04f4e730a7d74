"""A function a phase: what each update of a cycle computes, micro-batch by micro-batch.

Every phase declares the roles it may change (`CHANGES`); tests digest all networks before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mirai_dist.cycle import measures
from mirai_dist.cycle.roles import (
    Role,
    causal,
    features_of,
    noised_context,
    segment_causal,
    teacher_forced,
    teacher_forced_states,
    velocity_of,
)
from mirai_dist.method import foresight as foresight_method
from mirai_dist.method import health
from mirai_dist.method.consistency import ConsistencyNetworks, Neighbours, consistency_loss
from mirai_dist.method.critic import critic_loss
from mirai_dist.method.dmd import Conditioning, dmd_loss, noised, score_difference, score_draws, score_timestep
from mirai_dist.method.flow import euler_grid, shifted
from mirai_dist.method.ode import OdePairs, ode_loss
from mirai_dist.method.rollout import RolloutInputs, rollout, scored_clip
from mirai_dist.method.stage_two_foresight import Clip, ground_truth_targets, segment_states
from mirai_dist.method.teacher_forcing import (
    Levels,
    bidirectional_loss,
    context_timestep,
    diffusion_forcing_loss,
    noised_context_loss,
    teacher_forcing_loss,
)

if TYPE_CHECKING:
    from mirai_dist.cycle.stages import ConsistencyStage, DmdStage, FewStepStage, FlowStage, Moment, OdeStage, Stage

CHANGES = {
    "bidirectional": ("teacher",),
    "teacher_forcing": ("generator",),
    "diffusion_forcing": ("generator",),
    "consistency": ("generator", "target", "predictor"),
    "ode": ("generator", "predictor"),
    "generator": ("generator", "predictor"),
    "critic": ("critic",),
    "replay": ("predictor",),
}


def update(
    stage: Stage, phase: str, roles: Sequence[Role], batch: Sequence[list[int]], loss_of: Callable[[list[int]], Tensor]
) -> None:
    """One optimizer update of `roles`: the mean loss over this rank's micro-batches of global sample offsets."""
    stage.timesteps.clear()
    for index, samples in enumerate(batch):
        for role in roles:
            stage.run.engine.accumulate(role.network, role.plan, last=index == len(batch) - 1)
        loss = loss_of(samples)
        with stage.ledger.phase("backward"):
            (loss / len(batch)).backward()
    where = f"phase {phase}, cycle {stage.cycle}, position {stage.position}, timesteps {stage.timesteps} on this rank"
    with stage.ledger.phase("optimizer"):
        norms = [role.norm(where) for role in roles]  # all are checked before any is stepped
        for role, norm in zip(roles, norms, strict=True):
            stage.metrics.add_all(role.step(norm))


def generator_update(stage: DmdStage, at: Moment) -> None:
    """One generator update: rollout with gradient, DMD, and foresight when it is on."""
    stage.replay.clear()
    batch, numbers = stage.take("generator")
    roles = [stage.generator, *([stage.predictor] if stage.predictor and stage.foresight_is_on else [])]
    capture = stage.generator_blocks if stage.foresight_is_on else 0

    def loss_of(samples: list[int]) -> Tensor:
        text = stage.run.encode(numbers, samples)
        rolled = _rollout(stage, at, samples, text, capture)
        with stage.ledger.phase("scores"):
            loss = _distribution_matching(stage, at, samples, rolled, text)
        if stage.foresight_is_on:
            loss = loss + stage.recipe.foresight.weight * _foresight(stage, samples, rolled, text)
        return loss

    update(stage, "generator", roles, batch, loss_of)
    if stage.predictor and stage.foresight_is_on:
        measures.gates(stage, stage.predictor.network)


def critic_update(stage: DmdStage, at: Moment) -> None:
    """One critic update on fresh rollouts of the current generator, without gradient into it."""
    batch, numbers = stage.take("critic")

    def loss_of(samples: list[int]) -> Tensor:
        text = stage.run.encode(numbers, samples)
        with torch.no_grad():
            rolled = _rollout(stage, at, samples, text, capture=0)
        with stage.ledger.phase("critic"):
            timesteps = _score_timesteps(stage, at, samples, rolled.exit_step)
            noise = stage.normal("critic/noise", at, samples, rolled.latents.shape[1:])
            loss = critic_loss(velocity_of(stage.critic.network), rolled.latents, noise, timesteps, text)
        stage.metrics.add("loss/critic", loss)
        return loss

    update(stage, "critic", [stage.critic], batch, loss_of)


def replay_update(stage: DmdStage) -> None:
    """One predictor update on the cached pairs of the last generator update; nothing else moves."""
    assert stage.predictor is not None
    predictor, comparison = stage.predictor, stage.comparison

    def loss_of(samples: list[int]) -> Tensor:
        with stage.ledger.phase("replay"):
            states, targets = stage.replay.pairs(samples)
            loss, cosine = foresight_method.foresight_loss(predictor.network, states, [targets], comparison)
        stage.metrics.add("cosine/replay", cosine)
        return stage.recipe.foresight.weight * loss

    update(stage, "replay", [predictor], stage.replay.batches(stage.stage.batch.micro_size), loss_of)


def flow_update(stage: FlowStage, at: Moment) -> None:
    """One flow-matching update of a teacher, bidirectional or teacher-forced."""
    batch, numbers = stage.take("data")

    def loss_of(samples: list[int]) -> Tensor:
        with stage.ledger.phase("data"):
            clean, text = stage.run.clean_latents(numbers, samples), _prompts(stage, at, numbers, samples)
            noise = stage.normal("noise", at, samples, clean.shape[1:])
        with stage.ledger.phase("forward"):
            loss = _flow_loss(stage, at, samples, clean, noise, text)
        stage.metrics.add("loss/flow", loss)
        return loss

    update(stage, stage.stage.kind, [stage.trained], batch, loss_of)


def _flow_loss(stage: FlowStage, at: Moment, samples: list[int], clean: Tensor, noise: Tensor, text: Tensor) -> Tensor:
    kind, network = stage.stage.kind, stage.trained.network
    shift, segment = stage.recipe.flow.shift, stage.recipe.video.frames_per_segment
    if kind == "bidirectional":
        draws = [stage.run.draws.uniform(stage.purpose("timestep"), *at, s) for s in samples]
        stage.timesteps += [shifted(1.0 - u, shift) for u in draws]
        timesteps = torch.tensor(stage.timesteps[-len(samples) :], device=clean.device)
        return bidirectional_loss(velocity_of(network), clean, noise, timesteps, text)
    timesteps = _segment_timesteps(stage, at, samples)
    if kind == "diffusion_forcing":
        return diffusion_forcing_loss(segment_causal(network, segment), clean, noise, timesteps, text, shift)
    if not stage.stage.context_noise:
        return teacher_forcing_loss(teacher_forced(network, segment), clean, noise, timesteps, text, shift)
    levels = Levels(timesteps, _context_timesteps(stage, at, samples))
    return noised_context_loss(noised_context(network, segment), clean, noise, levels, text, shift)


def consistency_update(stage: ConsistencyStage, at: Moment) -> None:
    """One consistency update of the student, then of its target network."""
    batch, numbers = stage.take("data")
    settings, segment = stage.recipe.consistency, stage.recipe.video.frames_per_segment
    grid = euler_grid(settings.points, stage.recipe.flow.shift)
    student = teacher_forced_states(stage.trained.network, segment, stage.generator_blocks)
    frozen = (teacher_forced(role.network, segment) for role in (stage.target, stage.teacher))
    networks = ConsistencyNetworks(student, *frozen)

    def loss_of(samples: list[int]) -> Tensor:
        with stage.ledger.phase("data"):
            clean = stage.run.clean_latents(numbers, samples)
            prompts = Conditioning(stage.run.encode(numbers, samples), stage.run.negative)
            noise = stage.normal("noise", at, samples, clean.shape[1:])
        draws = [stage.run.draws.integer(stage.purpose("point"), *at, s, settings.points) for s in samples]
        stage.timesteps += [grid[i] for i in draws]
        first, second = (torch.tensor([grid[i + k] for i in draws], device=clean.device) for k in (0, 1))
        frames = clean.shape[1]
        neighbours = Neighbours(first[:, None].expand(-1, frames), second[:, None].expand(-1, frames))
        with stage.ledger.phase("forward"):
            loss, states = consistency_loss(networks, clean, noise, neighbours, prompts, settings.guidance)
        stage.metrics.add("loss/consistency", loss)
        if states is not None:
            loss = loss + stage.stage.foresight.weight * _foresight_on_truth(stage, clean, states, prompts.text)
        return loss

    update(stage, "consistency", list(stage.roles.values()), batch, loss_of)
    stage.refresh_target()


def ode_update(stage: OdeStage, at: Moment) -> None:
    """One update on trajectories: from a state drawn for each sample to the end of its trajectory."""
    batch, numbers = stage.take("data")
    pairs, segment = stage.pairs, stage.recipe.video.frames_per_segment
    network = teacher_forced_states(stage.trained.network, segment, stage.generator_blocks)

    def loss_of(samples: list[int]) -> Tensor:
        with stage.ledger.phase("data"):
            states = pairs.states([numbers[s] for s in samples]).to(stage.run.draws.device)
            text = stage.run.encode(numbers, samples)
        draws = [stage.run.draws.integer(stage.purpose("state"), *at, s, len(pairs.timesteps)) for s in samples]
        stage.timesteps += [pairs.timesteps[i] for i in draws]
        with stage.ledger.phase("forward"):
            index = torch.tensor(draws, device=states.device)
            found = OdePairs(states, tuple(pairs.timesteps))
            loss, hidden = ode_loss(network, found, index, text)
        stage.metrics.add("loss/ode", loss)
        if hidden is not None:
            loss = loss + stage.stage.foresight.weight * _foresight_on_truth(stage, states[:, -1], hidden, text)
        return loss

    update(stage, "ode", list(stage.roles.values()), batch, loss_of)


def _foresight_on_truth(stage: FewStepStage, clean: Tensor, states: Tensor, text: Tensor) -> Tensor:
    """Foresight of the states [B, tokens, dim] of noisy segments on the ground truth [B, F, C, H, W] they are forced
    on. There is no replay: predictor and generator have as many updates, each on new states."""
    assert stage.encoder is not None and stage.predictor is not None
    settings, offsets, video = stage.stage.foresight, stage.recipe.foresight.offsets, stage.recipe.video
    clip = Clip(video.latent_frames // video.frames_per_segment, video.frames_per_segment)
    causal_frames = video.frames_per_segment if settings.encoder_attention == "causal" else 0
    with stage.ledger.phase("encoder"):
        features = features_of(stage.encoder.network, stage.encoder_blocks, causal_frames)(clean, text)
        targets = ground_truth_targets(features, clip, offsets, settings.fusion, stage.comparison)
    if settings.targets == "shuffled":
        targets = [each.roll(1, dims=0) for each in targets]
    with stage.ledger.phase("predictor"):
        read = segment_states(states, clip, offsets, settings.fusion)
        loss, cosine = foresight_method.foresight_loss(stage.predictor.network, read, targets, stage.comparison)
    stage.metrics.add("loss/foresight", loss)
    stage.metrics.add("cosine/foresight", cosine)
    return loss


class Rolled(NamedTuple):
    """A rollout as it is scored: latents [B, F, C, H, W], captured states a segment, exit step of all segments but a
    first one with its own list, and the frames [F] that get gradient (None: all)."""

    latents: Tensor
    states: list[Tensor]
    exit_step: int
    trained: Tensor | None


def _rollout(stage: DmdStage, at: Moment, samples: list[int], text: Tensor, capture: int) -> Rolled:
    video, total = stage.recipe.video, stage.total_frames
    shape = (stage.rollout.noises, total, video.channels, video.latent_height, video.latent_width)
    noise = stage.normal("rollout", at, samples, shape).transpose(0, 1)
    exit_step, first_exit = stage.exit_steps(at, samples)
    stage.metrics.add("exit_step", float(exit_step))
    measures.step_lists(stage)
    with stage.ledger.phase("rollout"):
        inputs = RolloutInputs(
            noise, text, exit_step, capture, first_exit_step=first_exit, gradient_from=total - video.latent_frames
        )
        cache = stage.cache(len(samples))
        latents, states = rollout(causal(stage.generator.network), stage.rollout, inputs, cache)
        clip = scored_clip(latents, video.latent_frames, video.frames_per_segment, stage.run.as_image)
    return Rolled(clip.latents, states, exit_step, clip.gradient_mask)


def _distribution_matching(stage: DmdStage, at: Moment, samples: list[int], rolled: Rolled, text: Tensor) -> Tensor:
    latents, timesteps = rolled.latents, _score_timesteps(stage, at, samples, rolled.exit_step)
    noisy = noised(latents, stage.normal("score/noise", at, samples, latents.shape[1:]), timesteps)
    scores = (velocity_of(stage.teacher.network), velocity_of(stage.critic.network))
    prompts = Conditioning(text, stage.run.negative)
    scored = score_difference(latents, noisy, timesteps, prompts, scores, stage.recipe.dmd.guidance)
    loss = dmd_loss(latents, scored.gradient, rolled.trained)
    stage.metrics.add("loss/dmd", loss)
    stage.metrics.add("dmd_gradient", scored.gradient.abs().mean())
    with stage.ledger.phase("measures"):
        stage.metrics.add_all(health.measures(scored, stage.recipe.video.frames_per_segment))
    return loss


def _foresight(stage: DmdStage, samples: list[int], rolled: Rolled, text: Tensor) -> Tensor:
    assert stage.predictor is not None
    settings, segments = stage.recipe.foresight, len(rolled.states)
    causal_frames = stage.recipe.video.frames_per_segment if settings.encoder_attention == "causal" else 0
    with stage.ledger.phase("encoder"):
        encode = features_of(stage.teacher.network, stage.encoder_blocks, causal_frames)
        targets = stage.comparison.fuse(encode(rolled.latents.detach(), text), segments, settings.offsets)
    if settings.targets == "shuffled":
        targets = targets.roll(1, dims=0)
    with stage.ledger.phase("predictor"):
        supervised = foresight_method.supervised_segments(segments, settings.offsets)
        pairs = torch.stack([rolled.states[i] for i in supervised], dim=1)
        loss, cosine = foresight_method.foresight_loss(stage.predictor.network, pairs, [targets], stage.comparison)
    stage.replay.store(samples, pairs, targets)
    stage.metrics.add("loss/foresight", loss)
    stage.metrics.add("cosine/foresight", cosine)
    return loss


def _score_timesteps(stage: DmdStage, at: Moment, samples: list[int], exit_step: int) -> Tensor:
    dmd, shift = stage.recipe.dmd, stage.recipe.flow.shift
    among = score_draws(stage.recipe.rollout.steps, exit_step, dmd.score_schedule)
    draws = [among[stage.run.draws.integer(stage.purpose("score/timestep"), *at, s, len(among))] for s in samples]
    values = [score_timestep(u, shift, dmd.min_timestep, dmd.max_timestep) for u in draws]
    stage.timesteps += values
    measures.timesteps(stage, values, among)
    return torch.tensor(values, device=stage.run.draws.device)


def _segment_timesteps(stage: FlowStage, at: Moment, samples: list[int]) -> Tensor:
    """Timesteps [B, F], one independent draw a segment."""
    video = stage.recipe.video
    rows = []
    for sample in samples:
        per_segment = []
        for segment in range(video.latent_frames // video.frames_per_segment):
            u = stage.run.draws.uniform(stage.purpose(f"timestep/{segment}"), *at, sample)
            per_segment += [shifted(1.0 - u, stage.recipe.flow.shift)] * video.frames_per_segment
        rows.append(per_segment)
        stage.timesteps += per_segment[:: video.frames_per_segment]
    return torch.tensor(rows, device=stage.run.draws.device)


def _context_timesteps(stage: FlowStage, at: Moment, samples: list[int]) -> Tensor:
    """Timesteps [B, F] of the past in teacher forcing, one independent draw a segment."""
    video, highest, shift = stage.recipe.video, stage.stage.context_noise, stage.recipe.flow.shift

    def level(sample: int, segment: int) -> float:
        return context_timestep(
            stage.run.draws.uniform(stage.purpose(f"context/{segment}"), *at, sample), highest, shift
        )

    segments = range(video.latent_frames // video.frames_per_segment)
    rows = [[level(s, i) for i in segments for _ in range(video.frames_per_segment)] for s in samples]
    return torch.tensor(rows, device=stage.run.draws.device)


def _prompts(stage: Stage, at: Moment, numbers: list[int], samples: list[int]) -> Tensor:
    """Text embeddings with a fraction replaced by the negative prompt's, so that guidance has both sides."""
    text = stage.run.encode(numbers, samples)
    dropped = [
        stage.run.draws.uniform(stage.purpose("prompt_dropout"), *at, s) < stage.stage.prompt_dropout for s in samples
    ]
    return torch.where(torch.tensor(dropped, device=text.device)[:, None, None], stage.run.negative, text)
