"""The generator's gradient, sharded, cached and recomputed, against one process with none of that.

The reference below keeps no cache: for every pass it runs the whole prefix again through plain modules, in one
sequence with explicit masks, all samples in one batch. It shares with the code under test the layers of a block,
the keyed draws and the schedule; rollout, cache, masks, positions, losses and accumulation are written anew.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mirai_dist.config import schema
from mirai_dist.cycle.roles import wan_shape
from mirai_dist.cycle.stages import Run
from mirai_dist.models import predictor as predictor_model
from mirai_dist.models.wan.model import BlockInputs, WanModel
from mirai_dist.models.wan.rope import rotary_table
from mirai_dist.parallel.engine_fsdp import FsdpEngine
from mirai_dist.state.cursor import Cursor
from mirai_dist.state.draws import Draws
from mirai_dist.state.ema import named_tensors
from tests import tiny_wan
from tests.procs import tiny
from tests.procs.conftest import run_threads
from tests.procs.tiny import TIMEOUT

CYCLES = (0, 3)  # whose exit steps are the first and the last
Gradients = dict[str, Tensor]


class KeptGradients(FsdpEngine):
    """Keeps the unsharded gradients it is asked to step with, and does not step."""

    kept: dict[int, Gradients] = {}

    def step(self, network: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, norm: Tensor) -> None:
        self.kept[id(network)] = {
            name: tiny.whole(tensor.grad) for name, tensor in named_tensors(network).items() if tensor.grad is not None
        }
        optimizer.zero_grad(set_to_none=True)


def gradients_of(stage: Any, cycle: int) -> Gradients:
    """Gradients of the generator update of a cycle as the real stage computes them on this rank and its peers."""
    stage.cycle, stage.cursors = cycle, {}
    stage.step()
    return {f"{role.name}.{name}": gradient for role in (stage.generator, stage.predictor)
            for name, gradient in KeptGradients.kept.pop(id(role.network)).items()}


def as_image(prefix: Tensor) -> Tensor:
    """In place of an autoencoder, which computes in float32: something that depends on all frames it gets."""
    return 0.5 * prefix[:, -1:].flip(-1) + 0.3 * prefix.mean(dim=1, keepdim=True)


# The reference.


class PrefixAttention:
    """Attention of [prefix | segment]: causal over segments; prefix keys and values carry no gradient of their own.

    prefix, segment: tokens. window: segments a token sees, its own included.
    stand_in: keys and values of the prefix from the exit passes that wrote them; the segment sees their gradient with
    the prefix's values (the leaky cache).
    """

    def __init__(self, prefix: int, segment: int, window: int, stand_in: list[tuple[Tensor, Tensor]]) -> None:
        self.prefix, self.segment, self.window, self.stand_in = prefix, segment, window, stand_in

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(q.shape[1]) // self.segment
        distance = position[:, None] - position[None, :]
        visible = (distance >= 0) & (distance < self.window)
        seen = []
        for part, tensor in enumerate((k, v)):
            past = tensor[:, : self.prefix].detach()
            if self.stand_in:
                exits = torch.cat([pair[part] for pair in self.stand_in], dim=1)
                past = exits + (past - exits).detach()
            seen.append(torch.cat((past, tensor[:, self.prefix :]), dim=1))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, seen[0]) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, seen[1])


def samples_of(recipe: schema.Recipe) -> list[int]:
    """Offsets of a global batch."""
    return list(range(recipe.stages["distil"].batch.global_size))


@dataclasses.dataclass
class Reference:
    """Plain float64 networks of one recipe and the numbers that an update draws."""

    recipe: schema.Recipe

    def __post_init__(self) -> None:
        self.context = self.recipe.rollout.context_timestep
        self.samples = samples_of(self.recipe)
        shapes = {"generator": self.recipe.generator, "critic": self.recipe.critic, "teacher": self.recipe.teacher}
        self.networks: dict[str, Any] = {n: WanModel(wan_shape(shape, self.recipe)) for n, shape in shapes.items()}
        self.networks["predictor"] = predictor_model.Predictor(
            self.recipe.generator.dim, self.recipe.teacher.dim, self.recipe.generator.heads, 1, gated=False)
        self.draws = Draws(tiny.SEED, tiny.CPU)
        for role, network in self.networks.items():
            for name, parameter in network.named_parameters():
                tiny.lively_initialise(name, parameter.data, self.draws.for_parameter(f"{role}.{name}"))
            network.double().requires_grad_(role in ("generator", "predictor"))

    def sigma(self, timesteps: Tensor) -> Tensor:
        return (timesteps / 1000).view(-1, 1, 1, 1, 1)

    def shifted(self, u: float) -> float:
        shift = self.recipe.flow.shift
        return 1000 * shift * u / (1 + (shift - 1) * u)

    def segment(self, prefix: list[Tensor], noisy: Tensor, timestep: float, text: Tensor,
                exits: list[list[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """(x0 of the segment, its state at mid-depth, its keys and values a block); the prefix runs along."""
        network, video = self.networks["generator"], self.recipe.video
        latent = torch.cat((*prefix, noisy), dim=1)
        past = latent.shape[1] - noisy.shape[1]
        timesteps = torch.tensor([self.context] * past + [timestep] * noisy.shape[1]).double().expand(len(noisy), -1)
        x, grid = network._embed_patches(latent)
        per_frame = grid[1] * grid[2]
        rotary = rotary_table(grid, 0, network.shape.dim // network.shape.heads, tiny.CPU, torch.float64)
        time = network._embed_time(timesteps, torch.float64)
        modulation = network.time_projection(time).unflatten(-1, (6, -1))
        embedded = network.text_embedding(text)
        keys_values, states = [], []
        for index, block in enumerate(network.blocks):
            stand_in = [blocks[index] for blocks in exits] if self.recipe.rollout.kv_grad == "leaky" else []
            window = (self.recipe.rollout.window_frames or latent.shape[1]) // video.frames_per_segment
            attention = PrefixAttention(past * per_frame, video.frames_per_segment * per_frame, window, stand_in)
            x, (k, v), _ = block(x, BlockInputs(modulation, rotary, attention, embedded))
            keys_values.append((k[:, past * per_frame :], v[:, past * per_frame :]))
            states.append(x[:, past * per_frame :])
        velocity = network._unpatchify(network.head(x, time), grid)[:, past:]
        return noisy - timestep / 1000 * velocity, states[len(states) // 2 - 1], keys_values

    def rollout(self, noise: Tensor, text: Tensor, exit_step: int, first_exit: int) -> tuple[Tensor, list[Tensor]]:
        """Latents with gradient through every exit pass of what is trained, and its states."""
        length, total = self.recipe.video.frames_per_segment, noise.shape[2]
        prefix: list[Tensor] = []
        finished, states, exits = [], [], []
        for first in range(0, total, length):
            own = noise[:, :, first : first + length]
            noisy, listed, last = own[0], self.recipe.rollout.steps, exit_step
            if first == 0 and self.recipe.rollout.first_steps:
                listed, last = self.recipe.rollout.first_steps, first_exit
            steps = [self.shifted(step / 1000) for step in listed]
            with torch.no_grad():
                for step in range(last):
                    clean = self.segment(prefix, noisy, steps[step], text, exits)[0]
                    sigma = steps[step + 1] / 1000
                    noisy = (1 - sigma) * clean + sigma * own[step + 1]
            trained = first >= total - self.recipe.video.latent_frames
            with torch.set_grad_enabled(trained):
                clean, state, keys_values = self.segment(prefix, noisy, steps[last], text, exits)
            finished.append(clean)
            states += [state] * trained
            exits.append(keys_values)
            sigma = self.context / 1000
            prefix.append((1 - sigma) * clean.detach() + sigma * own[-1])
        return torch.cat(finished, dim=1), states

    def loss(self, cycle: int, text: Tensor, negative: Tensor) -> Tensor:
        recipe, video = self.recipe, self.recipe.video
        shape = (video.channels, video.latent_height, video.latent_width)
        steps, first_steps = recipe.rollout.steps, recipe.rollout.first_steps
        exit_step = self.draws.integer("distil/exit", cycle, 0, 0, len(steps))
        first_exit = self.draws.integer("distil/first_exit", cycle, 0, 0, len(first_steps) or 1)
        total, later = recipe.rollout.total_frames or video.latent_frames, 0
        noises = 1 + max(len(steps), len(first_steps))
        noise = self.draws.normal("distil/rollout", cycle, 0, self.samples, (noises, total, *shape)).double()
        latents, states = self.rollout(noise.transpose(0, 1), text, exit_step, first_exit)
        if total > video.latent_frames:  # the clip begins with a picture, and its first segment is not trained
            context = latents[:, : total - video.latent_frames + 1].detach()
            latents = torch.cat((as_image(context), latents[:, context.shape[1] :]), dim=1)
            later = video.frames_per_segment
        integers = [self.integer(cycle, sample, [*steps, 0][exit_step : exit_step + 2]) for sample in self.samples]
        timesteps = torch.tensor([min(max(self.shifted(i / 1000), 20.0), 980.0) for i in integers]).double()
        score_noise = self.draws.normal("distil/score/noise", cycle, 0, self.samples, latents.shape[1:]).double()
        with torch.no_grad():
            sigma = self.sigma(timesteps)
            noisy = (1 - sigma) * latents + sigma * score_noise
            fake, conditional = (noisy - sigma * self.networks[role](noisy, timesteps, text).velocity
                                 for role in ("critic", "teacher"))
            plain = self.networks["teacher"](noisy, timesteps, negative.expand_as(text)).velocity
            unconditional = noisy - sigma * plain
            real = conditional + recipe.dmd.guidance * (conditional - unconditional)
            gradient = (fake - real) / (latents - real).abs().flatten(1).mean(dim=1).view(-1, 1, 1, 1, 1)
        dmd = (latents * gradient)[:, later:].sum() / latents[:, later:].numel()
        return dmd + recipe.foresight.weight * self.foresight(latents.detach(), states, text)

    def integer(self, cycle: int, sample: int, interval: list[int]) -> int:
        """The drawn integer of a sample's score timestep, after an exit step that goes from and to these."""
        schedule = self.recipe.dmd.score_schedule
        low = interval[1] if schedule in ("lower", "both") else 0
        high = interval[0] if schedule == "both" else 1000
        return low + self.draws.integer("distil/score/timestep", cycle, 0, sample, high - low)

    def foresight(self, latents: Tensor, states: list[Tensor], text: Tensor) -> Tensor:
        """1 - cosine, averaged over tokens, samples and segments; every segment has a target at offset 0."""
        teacher = self.networks["teacher"]
        heard: list[Tensor] = []
        middle = teacher.blocks[len(teacher.blocks) // 2 - 1]
        hook = middle.register_forward_hook(lambda *call: heard.append(call[2][0]))
        with torch.no_grad():
            teacher(latents, torch.zeros(len(latents)).double(), text)
        hook.remove()
        features = heard[0].chunk(len(states), dim=1)
        terms = []
        for i, state in enumerate(states):
            future = [features[i + k] for k in self.recipe.foresight.offsets if i + k < len(states)]
            target = torch.stack(future).mean(dim=0)
            predicted = tiny_wan.predicted(self.networks["predictor"], state)
            terms.append(1 - ((predicted * target).sum(-1) / (predicted.norm(dim=-1) * target.norm(dim=-1))).mean())
        return sum(terms, start=torch.zeros(())) / len(terms)

    def gradients(self, cycle: int, text: Tensor, negative: Tensor) -> Gradients:
        trained = {f"{role}.{name}": parameter for role in ("generator", "predictor")
                   for name, parameter in self.networks[role].named_parameters()}
        found = torch.autograd.grad(self.loss(cycle, text, negative), list(trained.values()))
        return dict(zip(trained, found, strict=True))


@functools.cache
def expected(overrides: tuple[str, ...], cycle: int) -> Gradients:
    recipe = tiny.recipe(*overrides)
    samples = samples_of(recipe)

    def body(rank: int) -> tuple[Tensor, Tensor]:
        run, cursor = tiny.run_of(recipe), Cursor(tiny.SEED, "distil/generator", size=None)
        return run.encode([cursor.index(n) for n in samples], samples).double(), run.negative.double()

    return Reference(recipe).gradients(cycle, *run_threads(1, body, timeout=TIMEOUT)[0])


def worst(found: Gradients, reference: Gradients) -> tuple[float, str]:
    """Largest relative error of a parameter's gradient, and whose it is."""
    assert found.keys() == reference.keys()
    errors = {n: ((found[n].double() - g).norm() / g.norm()).item() for n, g in reference.items()}
    return max((error, name) for name, error in errors.items())


# What is tested.

DETACHED, LEAKY = "rollout.kv_grad=detached", "rollout.kv_grad=leaky"
CONTEXT, WINDOW = "rollout.context_timestep=100", "rollout.window_frames=2"


class Case(NamedTuple):
    """A way to shard and recompute, and what the rollout computes."""

    unit: str
    reshard: bool
    recompute: str
    rollout: tuple[str, ...]
    replicas: int = 1

    def recipe(self, dtype: str) -> schema.Recipe:
        reshard = str(self.reshard).lower()
        return tiny.in_dtype(tiny.recipe(
            f"parallel.unit={self.unit}", f"parallel.reshard_after_forward={reshard}", *self.rollout,
            f"parallel.recompute={self.recompute}", f"parallel.replicas={self.replicas}"), dtype)


CASES = {
    1: [Case("block", True, "block", (LEAKY,))],
    2: [
        Case("block", True, "block", (DETACHED,)),
        Case("block", False, "none", (LEAKY, CONTEXT)),
        Case("network", True, "none", (DETACHED, WINDOW)),
        Case("network", False, "block", (LEAKY,)),
        Case("block", True, "selective", (DETACHED, CONTEXT)),
    ],
    4: [
        Case("block", True, "block", (LEAKY,)),
        Case("block", True, "block", (DETACHED,), replicas=2),
    ],
}


ONE, TWO, FOUR = "rollout.steps=[1000]", "rollout.steps=[1000,500]", "rollout.steps=[1000,750,500,250]"
CHUNKS = ("video.latent_frames=4", "video.frames_per_segment=2")
FIRST = "rollout.first_steps=[1000,750,500,250]"
VARIANTS = {
    "one step": Case("block", True, "block", (LEAKY, ONE)),
    "four steps, chunks": Case("network", False, "block", (DETACHED, FOUR, *CHUNKS)),
    "first frame in four steps": Case("block", True, "block", (DETACHED, TWO, FIRST)),
    "scores of the exit's interval": Case("block", True, "none", (DETACHED, FOUR, "dmd.score_schedule=both")),
    "longer": Case("block", True, "block", (
        DETACHED, FOUR, "rollout.first_steps=[1000,500]", WINDOW, "rollout.total_frames=6",
        "dmd.score_schedule=lower")),
    "longer, leaky, chunks": Case("network", True, "block", (
        LEAKY, TWO, CONTEXT, *CHUNKS, "rollout.window_frames=4", "rollout.total_frames=8")),
}


def errors_of(
    cases: list[Case], dtype: str, cycles: tuple[int, ...] = CYCLES
) -> Callable[[int], list[tuple[float, str, Case, int]]]:
    """Body of a rank: the worst error of each case and cycle."""
    def body(rank: int) -> list[tuple[float, str, Case, int]]:
        found = []
        for case in cases:
            stage = tiny.stage_of(case.recipe(dtype), "distil", KeptGradients)
            found += [(*worst(gradients_of(stage, cycle), references[case.rollout, cycle]), case, cycle)
                      for cycle in cycles]
        return found

    references = {(case.rollout, cycle): expected(case.rollout, cycle) for case in cases for cycle in cycles}
    return body


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_float64_gradient_is_the_reference(threads, ranks: int) -> None:
    with tiny.lively("float64"):
        for errors in threads(ranks, timeout=TIMEOUT)(errors_of(CASES[ranks], "float64")):
            assert max(errors)[0] < 1e-12, max(errors)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "steps" in name or "longer" in name])
def test_float64_gradient_of_a_variant_is_the_reference(threads, name: str) -> None:
    with tiny.lively("float64"), mock.patch.object(Run, "as_image", staticmethod(as_image)):
        for errors in threads(2, timeout=TIMEOUT)(errors_of([VARIANTS[name]], "float64", CYCLES[1:])):
            assert max(errors)[0] < 1e-12, max(errors)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_float64_gradient_of_a_variant_is_the_reference_on_any_world(threads, ranks: int, name: str) -> None:
    shardings = itertools.product(("block", "network"), (True, False), ("block", "none"))
    cases = [Case(*sharding, VARIANTS[name].rollout) for sharding in shardings]
    with tiny.lively("float64"), mock.patch.object(Run, "as_image", staticmethod(as_image)):
        for errors in threads(ranks, timeout=TIMEOUT)(errors_of(cases, "float64")):
            assert max(errors)[0] < 1e-12, max(errors)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_float64_gradient_is_the_reference_in_every_combination(threads, ranks: int) -> None:
    rollouts = [(DETACHED,), (LEAKY,), (DETACHED, WINDOW, CONTEXT)]
    shardings = itertools.product(("block", "network"), (True, False), ("block", "none"), rollouts)
    replicas = [count for count in (1, 2) if ranks % count == 0]
    cases = [Case(*sharding, replicas=count) for sharding in shardings for count in replicas]
    with tiny.lively("float64"):
        for errors in threads(ranks, timeout=TIMEOUT)(errors_of(cases, "float64")):
            assert max(errors)[0] < 1e-12, max(errors)


def test_float32_gradient_is_the_reference_to_its_precision(threads) -> None:
    cases = [Case("block", True, "block", (LEAKY,)), Case("network", False, "none", (DETACHED,))]
    with tiny.lively():
        for errors in threads(2, timeout=TIMEOUT)(errors_of(cases, "float32")):
            assert max(errors)[0] < 1e-5, max(errors)


def test_bfloat16_recomputation_changes_no_bit(threads) -> None:
    """Autocast-like policies break this: FSDP casts inputs in forward but not when a block is recomputed."""
    def body(rank: int) -> list[Gradients]:
        cases = [Case("block", True, how, (LEAKY,)) for how in ("block", "none")]
        return [gradients_of(tiny.stage_of(case.recipe("bfloat16"), "distil", KeptGradients), 3) for case in cases]

    with tiny.lively():
        for recomputed, kept in threads(2, timeout=TIMEOUT)(body):
            assert not tiny.unequal(recomputed, kept)
            assert all(g.dtype == torch.float32 and g.isfinite().all() for g in kept.values())
            error, name = worst(kept, expected((LEAKY,), 3))
            assert 1e-5 < error < 0.5, f"{name}: {error}"  # bfloat16 was really used, for the same gradient
