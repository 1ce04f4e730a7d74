"""Which network plays which part: a role is a sharded network with what trains it, if anything does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mirai_dist.config import schema
from mirai_dist.cycle.attending import backends_of
from mirai_dist.cycle.fusing import ops_of
from mirai_dist.method import health
from mirai_dist.method.dmd import Velocity
from mirai_dist.method.flow import warped_steps
from mirai_dist.method.rollout import Past, RolloutSettings, SegmentNetwork
from mirai_dist.method.teacher_forcing import (
    NoisedContextNetwork,
    SegmentCausalNetwork,
    StateNetwork,
    TeacherForcedNetwork,
)
from mirai_dist.models import predictor as predictor_model
from mirai_dist.models.wan import Capture, Clean, History, KVCache, WanModel, WanOutput, WanShape
from mirai_dist.models.wan import model as wan_model
from mirai_dist.models.wan.kv_cache import CacheShape
from mirai_dist.models.wan.model import PATCH
from mirai_dist.parallel.engine_fsdp import FsdpEngine, NonFiniteError
from mirai_dist.parallel.materialize import Initialise, draw
from mirai_dist.plan.shards import ShardPlan, predictor_plan, wan_plan
from mirai_dist.state.draws import Draws
from mirai_dist.state.ema import Ema, local

Fill = Callable[[nn.Module], None]  # gives an allocated network its first weights


@dataclass(frozen=True)
class Training:
    """How a role is trained: its optimizer's settings, how many updates the stage makes, its moving average."""

    optimizer: schema.Optimizer
    total_updates: int
    ema: schema.Ema | None = None


class Role:
    """A network, and for trained roles its optimizer, own update count and moving average."""

    def __init__(
        self, name: str, network: nn.Module, plan: ShardPlan, engine: FsdpEngine, training: Training | None
    ) -> None:
        self.name, self.network, self.plan, self.engine, self.training = name, network, plan, engine, training
        self.updates = 0
        self.average: Ema | None = None
        self.optimizer: torch.optim.AdamW | None = None
        if training is None:
            network.requires_grad_(False)
            return
        settings = training.optimizer
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def average_if_due(self) -> None:
        """Create the moving average once the network has made `ema.start_update` updates."""
        ema = self.training.ema if self.training else None
        if ema and ema.decay > 0 and self.average is None and self.updates >= ema.start_update:
            self.average = Ema(self.network, ema.decay)

    def norm(self, where: str) -> Tensor:
        """Global gradient norm. Raises NonFiniteError naming this network and `where` it happened."""
        try:
            return self.engine.norm(self.network)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{self.name}: {error} at its update {self.updates}, {where}; "
                "nothing was stepped; look at the data and rates, then resume"
            ) from error

    def step(self, norm: Tensor) -> dict[str, Tensor | float]:
        """One optimizer step at this network's own learning rate, clipped; returns what is worth logging, among it
        parts (method/health.py) of what it did to the weights."""
        assert self.optimizer is not None and self.training is not None
        settings = self.training.optimizer
        rate = learning_rate(settings, self.updates, self.training.total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        before = health.Moved([local(weight) for weight in self.network.parameters()])
        self.engine.step(self.network, self.optimizer, settings.clip_norm, norm)
        self.updates += 1
        if self.average is not None:
            self.average.update()
        self.average_if_due()
        return {f"grad_norm/{self.name}": norm.item(), f"lr/{self.name}": rate, **before.parts(self.name)}


def learning_rate(settings: schema.Optimizer, update: int, total: int) -> float:
    """Rate of a network's own update number `update` of `total`: linear warm-up, then constant or cosine to 3 %."""
    warm = min(1.0, (update + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.schedule == "constant":
        return settings.lr * warm
    return settings.lr * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * update / max(1, total))))


@dataclass(frozen=True)
class Builder:
    """Builds the roles of one stage from the recipe."""

    recipe: schema.Recipe
    engine: FsdpEngine
    draws: Draws

    def wan(self, name: str, network: schema.Network, training: Training | None, fill: Fill | None = None) -> Role:
        """A Wan DiT filled by `fill`, or with random weights keyed by the role's and each parameter's name."""
        backends = backends_of(self.recipe, self.draws.device)
        with torch.device("meta"):
            model = WanModel(wan_shape(network, self.recipe), backends, ops_of(self.recipe, self.draws.device))
        plan = wan_plan(self.recipe.parallel, network.blocks, trained=training is not None)
        self.engine.build(model, plan, fill or self._drawn(name, wan_model.initialise))
        role = Role(name, model, plan, self.engine, training)
        role.average_if_due()
        return role

    def _drawn(self, name: str, initialise: Initialise) -> Fill:
        return lambda network: draw(network, initialise, lambda key: self.draws.for_parameter(f"{name}.{key}"))

    def predictor(self, gated: bool, bf16_masters: bool, training: Training, answers: int = 1) -> Role:
        """The foresight predictor, from the generator's width to so many times the teacher's."""
        generator, teacher = self.recipe.generator, self.recipe.teacher
        backends = backends_of(self.recipe, self.draws.device)
        with torch.device("meta"):
            model = predictor_model.Predictor(
                generator.dim,
                answers * teacher.dim,
                generator.heads,
                self.recipe.foresight.predictor_blocks,
                gated,
                backends,
                ops_of(self.recipe, self.draws.device),
            )
        plan = predictor_plan(self.recipe.parallel, bf16_masters)
        self.engine.build(model, plan, self._drawn("predictor", predictor_model.initialise))
        return Role("predictor", model, plan, self.engine, training)


def wan_shape(network: schema.Network, recipe: schema.Recipe) -> WanShape:
    """Sizes of a recipe's network for `WanModel`."""
    return WanShape(
        network.dim,
        network.ffn_dim,
        network.heads,
        network.blocks,
        recipe.text.dim,
        recipe.video.channels,
        network.freq_dim,
    )


def rollout_settings(recipe: schema.Recipe) -> RolloutSettings:
    """Constants of a rollout, with the step list warped by the flow's shift."""
    return RolloutSettings(
        timesteps=warped_steps(recipe.rollout.steps, recipe.flow.shift),
        frames_per_segment=recipe.video.frames_per_segment,
        context_timestep=recipe.rollout.context_timestep,
        leaky=recipe.rollout.kv_grad == "leaky",
        first_timesteps=warped_steps(recipe.rollout.first_steps, recipe.flow.shift),
    )


def kv_cache(recipe: schema.Recipe, batch: int, frames: int, device: torch.device, streaming: bool = False) -> KVCache:
    """A cache for rollouts of `frames` latent frames, with room for the segment that runs.

    A streaming cache holds the window alone and overwrites what leaves it; one for training holds all frames
    but the last segment and shows the window, because recomputation in backward reads what each segment saw.
    """
    rollout, network, segment = recipe.rollout, recipe.generator, recipe.video.frames_per_segment
    past = rollout.window_frames - segment if rollout.window_frames else 0
    held = min(past, frames - segment) if past and streaming else frames - segment
    tokens = (recipe.video.latent_height // PATCH[1]) * (recipe.video.latent_width // PATCH[2])
    shape = CacheShape(
        network.blocks,
        batch,
        held,
        segment,
        tokens,
        network.heads,
        network.dim // network.heads,
        rollout.sink_frames,
        past,
    )
    return KVCache(shape, device, getattr(torch, recipe.parallel.compute_dtype))


def velocity_of(network: nn.Module) -> Velocity:
    """A network as a bidirectional score."""

    def velocity(latent: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return _velocity(network(latent, timesteps, text))

    return velocity


def teacher_forced(network: nn.Module, segment_frames: int) -> TeacherForcedNetwork:
    """A network as an AR model that sees clean earlier segments."""

    def velocity(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> Tensor:
        return _velocity(network(latent, timesteps, text, clean=Clean(clean), segment_frames=segment_frames))

    return velocity


def teacher_forced_states(network: nn.Module, segment_frames: int, blocks: int) -> StateNetwork:
    """The same, with the states [B, tokens, dim] of its noisy segments after `blocks` blocks (0: None)."""

    def velocity(latent: Tensor, timesteps: Tensor, text: Tensor, clean: Tensor) -> tuple[Tensor, Tensor | None]:
        capture = Capture(blocks)
        output = network(latent, timesteps, text, clean=Clean(clean), segment_frames=segment_frames, capture=capture)
        return _velocity(output), output.hidden

    return velocity


def noised_context(network: nn.Module, segment_frames: int) -> NoisedContextNetwork:
    """A network as an AR model that sees earlier segments slightly noised."""

    def velocity(latent: Tensor, timesteps: Tensor, text: Tensor, context: Tensor, context_timesteps: Tensor) -> Tensor:
        past = Clean(context, context_timesteps)
        return _velocity(network(latent, timesteps, text, clean=past, segment_frames=segment_frames))

    return velocity


def segment_causal(network: nn.Module, segment_frames: int) -> SegmentCausalNetwork:
    """A network as an AR model that sees earlier segments at their own noise levels."""

    def velocity(latent: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return _velocity(network(latent, timesteps, text, segment_frames=segment_frames))

    return velocity


def causal(network: nn.Module) -> SegmentNetwork:
    """A network as the cached causal generator of a rollout."""

    def segment(latent: Tensor, timesteps: Tensor, text: Tensor, past: Past, capture: int) -> WanOutput:
        return network(latent, timesteps, text, history=History(*past), capture=Capture(capture))

    return segment


def features_of(network: nn.Module, blocks: int, segment_frames: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A network as foresight encoder: finished rollout and text -> residual stream [B, N, D] after `blocks` blocks,
    at timestep 0, with early exit. segment_frames > 0 hides the future (the causal control)."""

    @torch.no_grad()
    def encode(latents: Tensor, text: Tensor) -> Tensor:
        zero = torch.zeros(latents.shape[0], device=latents.device)
        output = network(latents, zero, text, segment_frames=segment_frames, capture=Capture(blocks, stop=True))
        return output.hidden

    return encode


def _velocity(output: WanOutput) -> Tensor:
    assert output.velocity is not None
    return output.velocity
