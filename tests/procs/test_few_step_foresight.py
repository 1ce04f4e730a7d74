"""Foresight while a few-step start is distilled: its gradient against plain networks, and what it must leave alone.

The reference runs every segment with the clean ones before it as one causal sequence, all samples in one batch, and
reads states and features by hooks; losses, fusions and draws are written anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mirai_dist.config import schema
from mirai_dist.cycle import phases, pipeline
from mirai_dist.cycle.encoders import WorldClips
from mirai_dist.cycle.roles import wan_shape
from mirai_dist.cycle.saver import Saver
from mirai_dist.cycle.stages import Stage
from mirai_dist.method.stage_two_foresight import FUSIONS
from mirai_dist.models.predictor import Predictor
from mirai_dist.models.wan import WanModel
from mirai_dist.state.cursor import Cursor
from mirai_dist.state.draws import Draws
from tests import tiny_wan
from tests.procs import tiny
from tests.procs.conftest import run_threads
from tests.procs.test_gradient_oracle import KeptGradients, worst
from tests.procs.tiny import TIMEOUT

RANKS, SAMPLES = 2, [0, 1, 2, 3]
FORESIGHT = ("stages.few_step.teacher=teacher", "stages.few_step.foresight.weight=0.7",
             "stages.few_step.foresight.optimizer.lr=1e-3")
KINDS = {"consistency": (), "ode": ("stages.few_step.kind=ode", "stages.few_step.trajectories=6", "ode.points=4")}
ONE_BLOCK = ("teacher.blocks=1", "generator.blocks=1", "foresight.depth=1")  # half the tensors, of all kinds there are
CHUNKS = ("video.latent_frames=6", "video.frames_per_segment=2")


class HeldPairs:
    """Trajectories held in memory, in float64: states of entry n are keyed by n."""

    path, truth, size = Path("/held/in/memory"), True, 6

    def __init__(self, recipe: schema.Recipe) -> None:
        self.recipe = recipe
        self.timesteps = tuple(shifted(recipe, step / 1000) for step in recipe.rollout.steps)

    def states(self, numbers: Sequence[int]) -> Tensor:
        video = self.recipe.video
        shape = (len(self.timesteps) + 2, video.latent_frames, video.channels, video.latent_height, video.latent_width)
        return Draws(0, tiny.CPU).normal("pairs", 0, 0, numbers, shape).double()


def shifted(recipe: schema.Recipe, u: float) -> float:
    return 1000 * recipe.flow.shift * u / (1 + (recipe.flow.shift - 1) * u)


def recipe_of(kind: str, *overrides: str) -> schema.Recipe:
    return tiny.recipe(*KINDS[kind], *overrides)


@contextmanager
def in_memory(dtype: str = "") -> Iterator[None]:
    """Stages built inside read `HeldPairs`, start lively and, with float64, train on clips of float64."""
    latents = WorldClips.latents
    with ExitStack() as patches:
        patches.enter_context(tiny.lively(dtype))
        patches.enter_context(mock.patch.object(pipeline, "open_pairs", lambda job, place: HeldPairs(job.recipe)))
        if dtype:
            patches.enter_context(mock.patch.object(WorldClips, "latents", lambda *call: latents(*call).double()))
        yield


# The reference.


class Reference:
    """Plain float64 networks of one recipe's few-step stage and the loss of its first update."""

    def __init__(self, recipe: schema.Recipe) -> None:
        self.recipe, self.draws = recipe, Draws(tiny.SEED, tiny.CPU)
        self.settings, self.offsets = recipe.stages["few_step"].foresight, recipe.foresight.offsets
        dim, answers = recipe.generator.dim, 1 if self.settings.fusion == "offsets" else len(self.offsets)
        self.networks: dict[str, Any] = {
            "generator": WanModel(wan_shape(recipe.generator, recipe)),
            "ar_teacher": WanModel(wan_shape(recipe.generator, recipe)),
            "encoder": WanModel(wan_shape(recipe.teacher, recipe)),
            "predictor": Predictor(dim, answers * recipe.teacher.dim, recipe.generator.heads, 1, gated=False),
        }
        for role, network in self.networks.items():
            for name, parameter in network.named_parameters():
                tiny.lively_initialise(name, parameter.data, self.draws.for_parameter(f"{role}.{name}"))
            network.double().requires_grad_(role in ("generator", "predictor"))

    def forced(self, role: str, noisy: Tensor, at: Tensor, text: Tensor, clean: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x0 of noisy latents at timesteps [B], each segment after its clean past, and the segments' states."""
        length, network = self.recipe.video.frames_per_segment, self.networks[role]
        found, states = [], []
        for first in range(0, noisy.shape[1], length):
            own = noisy[:, first : first + length]
            timesteps = torch.cat((torch.zeros(len(at), first).double(), at[:, None].expand(-1, length)), dim=1)
            latent = torch.cat((clean[:, :first], own), dim=1)
            velocity, heard = self.heard(network, latent, timesteps, text, length)
            found.append(own - (at / 1000).view(-1, 1, 1, 1, 1) * velocity[:, first:])
            states.append(heard.unflatten(1, (latent.shape[1], -1))[:, first:])
        return torch.cat(found, dim=1), states

    def heard(self, network: WanModel, latent: Tensor, timesteps: Tensor, text: Tensor, causal: int
              ) -> tuple[Tensor, Tensor]:
        """Velocity, and the residual stream after half of the blocks."""
        outputs: list[Tensor] = []
        middle = network.blocks[len(network.blocks) // 2 - 1]
        hook = middle.register_forward_hook(lambda *call: outputs.append(call[2][0]))
        velocity = network(latent, timesteps, text, segment_frames=causal).velocity
        hook.remove()
        return velocity, outputs[0]

    def consistency(self, clean: Tensor, text: Tensor, negative: Tensor) -> tuple[Tensor, list[Tensor]]:
        recipe, points = self.recipe, self.recipe.consistency.points
        grid = torch.tensor([shifted(recipe, 1 - i / points) for i in range(points + 1)]).double()  # of float32 values
        index = torch.tensor([self.draws.integer("few_step/point", 0, 0, s, points) for s in SAMPLES])
        now, after = ((grid[index + k] / 1000).view(-1, 1, 1, 1, 1) for k in (0, 1))
        noise = self.draws.normal("few_step/noise", 0, 0, SAMPLES, clean.shape[1:]).double()
        noisy = (1 - now) * clean + now * noise
        with torch.no_grad():
            one, other = (self.forced("ar_teacher", noisy, grid[index], each, clean)[0]
                          for each in (text, negative.expand_as(text)))
            velocity = (noisy - other - recipe.consistency.guidance * (one - other)) / now
            nearer = noisy + (after - now) * velocity
            self.networks["target"] = WanModel(wan_shape(recipe.generator, recipe)).double()
            self.networks["target"].load_state_dict({  # the moving average is in float32
                name: tensor.float() for name, tensor in self.networks["generator"].state_dict().items()})
            goal, _ = self.forced("target", nearer, grid[index + 1], text, clean)
        estimate, states = self.forced("generator", noisy, grid[index], text, clean)
        return (estimate - goal).square().mean(), states

    def ode(self, trajectories: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        timesteps = torch.tensor([shifted(self.recipe, step / 1000) for step in self.recipe.rollout.steps],
                                 dtype=torch.float64)
        index = torch.tensor([self.draws.integer("few_step/state", 0, 0, s, len(timesteps)) for s in SAMPLES])
        estimate, states = self.forced("generator", trajectories[SAMPLES, index], timesteps[index], text,
                                       trajectories[:, -1])
        return (estimate - trajectories[:, -2]).square().mean(), states

    def foresight(self, clean: Tensor, states: list[Tensor], text: Tensor) -> Tensor:
        """1 - cosine, averaged over tokens, samples and (segment, offset) pairs."""
        length = self.recipe.video.frames_per_segment
        causal = length if self.settings.encoder_attention == "causal" else 0
        with torch.no_grad():
            _, features = self.heard(self.networks["encoder"], clean, torch.zeros(len(clean)).double(), text, causal)
        if self.settings.targets == "shuffled":
            features = features[[1, 0, 3, 2]]  # partners of micro-batches of two
        ahead = features.unflatten(1, (len(states), length, -1)).unbind(dim=1)
        width, terms = self.recipe.teacher.dim, []
        for i, state in enumerate(states):
            futures = [(n, ahead[i + k]) for n, k in enumerate(self.offsets) if i + k < len(states)]
            if self.settings.fusion == "offsets":
                futures = [(0, torch.stack([each for _, each in futures]).mean(dim=0))] if futures else []
            for n, target in futures:
                read = state
                if self.settings.fusion == "frames":
                    read, target = state.mean(dim=1, keepdim=True), target.mean(dim=1, keepdim=True)
                answers = tiny_wan.predicted(self.networks["predictor"], read.flatten(1, 2))
                predicted = answers[..., n * width : (n + 1) * width]
                target = target.flatten(1, 2)
                cosine = (predicted * target).sum(-1) / (predicted.norm(dim=-1) * target.norm(dim=-1))
                terms.append(1 - cosine.mean())
        return torch.stack(terms).mean()

    def gradients(self, run: Any) -> dict[str, Tensor]:
        """Of generator and predictor, at the first update of the stage."""
        cursor = Cursor(tiny.SEED, "few_step/data", run.conditions.size)
        numbers = [cursor.index(n) for n in SAMPLES]
        text, negative = run.encode(numbers, SAMPLES).double(), run.negative.double()
        if run.pairs is not None:
            trajectories = run.pairs.states(numbers)
            clean = trajectories[:, -1]
            loss, states = self.ode(trajectories, text)
        else:
            clean = run.clean_latents(numbers, SAMPLES)
            loss, states = self.consistency(clean, text, negative)
        loss = loss + self.settings.weight * self.foresight(clean, states, text)
        trained = {f"{role}.{name}": parameter for role in ("generator", "predictor")
                   for name, parameter in self.networks[role].named_parameters()}
        found = torch.autograd.grad(loss, list(trained.values()))
        return dict(zip(trained, found, strict=True))


CASES = {
    "none": ("foresight.fusion=none", "parallel.unit=network", "parallel.recompute=none"),
    "frames": ("foresight.fusion=frames", "parallel.unit=block", "parallel.recompute=block"),
    "offsets": ("foresight.fusion=offsets", "parallel.unit=block", "parallel.reshard_after_forward=true"),
    "causal encoder": ("foresight.encoder_attention=causal", "parallel.recompute=block"),
    "shuffled": ("foresight.targets=shuffled", "batch.micro_size=2", "parallel.unit=block"),
}


def case(kind: str, name: str) -> schema.Recipe:
    written = (each if each.startswith("parallel") else f"stages.few_step.{each}" for each in CASES[name])
    return tiny.in_dtype(recipe_of(kind, *FORESIGHT, *CHUNKS, *written), "float64")


@pytest.mark.parametrize(("kind", "name"), [
    *((kind, fusion) for kind in KINDS for fusion in FUSIONS), ("ode", "causal encoder"), ("consistency", "shuffled"),
])
def test_the_sharded_gradient_is_the_reference(threads, kind: str, name: str) -> None:
    recipe = case(kind, name)

    def body(rank: int) -> tuple[dict[str, Tensor], Any]:
        stage = tiny.stage_of(recipe, "few_step", KeptGradients)
        stage.step()
        assert stage.encoder.optimizer is None
        assert all(parameter.grad is None for parameter in stage.encoder.network.parameters())
        found = {f"{role}.{name}": gradient for role in ("generator", "predictor")
                 for name, gradient in KeptGradients.kept.pop(id(stage.roles[role].network)).items()}
        return found, stage.run

    with in_memory("float64"):
        for found, run in threads(RANKS, timeout=TIMEOUT)(body):
            error = worst(found, Reference(recipe).gradients(run))
            assert error[0] < 1e-12, error


# What it must leave alone, and what a checkpoint must hold.


def trained(recipe: schema.Recipe, ranks: int, updates: int) -> list[tuple[list[dict[str, float]], dict[str, Any]]]:
    def body(rank: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
        stage = tiny.stage_of(recipe, "few_step")
        return tiny.train(stage, updates), tiny.everything(stage)

    return run_threads(ranks, body, TIMEOUT)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_zero_is_bit_identical_to_no_foresight_at_all(kind: str) -> None:
    otherwise = [f"stages.few_step.foresight.{each}" for each in (
        "fusion=none", "targets=shuffled", "encoder_attention=causal", "optimizer.lr=0.1")]
    plain, off, on = (recipe_of(kind, *ONE_BLOCK, "stages.few_step.batch.micro_size=2", *each) for each in (
        (), [*otherwise, "foresight.weight=5", "foresight.preset=release"], FORESIGHT))
    with in_memory(), ExitStack() as patches:
        changed = trained(on, RANKS, 2)
        for name in ("_foresight_on_truth", "ground_truth_targets", "features_of"):
            patches.enter_context(mock.patch.object(phases, name, mock.NonCallableMock(spec=[], name=name)))
        for with_it, (first, second) in zip(changed, zip(trained(plain, RANKS, 2), trained(off, RANKS, 2), strict=True),
                                            strict=True):
            assert first[0] == second[0] and not tiny.unequal(first[1], second[1])
            assert not any("foresight" in key or "predictor" in key for update in first[0] for key in update)
            moved = tiny.unequal({name: with_it[1][name] for name in first[1]}, first[1])
            assert any(name.startswith("generator.") for name in moved)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_changes_what_it_declares_and_nothing_else(threads, kind: str) -> None:
    def body(rank: int) -> None:
        stage = tiny.stage_of(recipe_of(kind, *FORESIGHT), "few_step")
        for _ in range(2):
            before = tiny.shard_digests(stage)
            tiny.train(stage, 1)
            after = tiny.shard_digests(stage)
            declared = {name for name in after if name.partition("/")[2] in phases.CHANGES[kind]}
            assert {name for name in after if before.get(name) != after[name]} == declared
            assert {"network/encoder", "network/predictor", "optimizer/predictor"} <= after.keys()

    with in_memory():
        threads(RANKS, timeout=TIMEOUT)(body)


def saver(folder: Path, stage: Stage) -> Saver:
    return Saver(folder / "checkpoints", stage.recipe.checkpoint, "recipe", stage.run.rank, tiny.console(folder))


@pytest.mark.parametrize("kind", ["ode", pytest.param("consistency", marks=pytest.mark.slow)])
def test_resume_at_every_cycle_is_bit_exact(threads, tmp_path: Path, kind: str) -> None:
    """And on another number of ranks the same to rounding."""
    recipe, last = tiny.in_dtype(recipe_of(kind, *FORESIGHT, *ONE_BLOCK), "float64"), 3

    def straight(rank: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
        stage = tiny.stage_of(recipe, "few_step")
        metrics = []
        for cycle in range(last):
            if cycle:
                saver(tmp_path / str(cycle), stage).save(stage)
            metrics += tiny.train(stage, 1)
        return metrics, tiny.everything(stage)

    def resumed(cycle: int, ranks: int) -> list[tuple[list[dict[str, float]], dict[str, Any]]]:
        def body(rank: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
            stage = tiny.stage_of(recipe, "few_step")
            assert saver(tmp_path / str(cycle), stage).resume(stage) and stage.cycle == cycle
            return tiny.train(stage, last - cycle), tiny.everything(stage)

        return threads(ranks, timeout=TIMEOUT)(body)

    with in_memory("float64"):
        whole = threads(RANKS, timeout=TIMEOUT)(straight)
        assert "predictor.projection.weight.exp_avg_sq" in whole[0][1] and whole[0][1]["extras.updates"] == {
            "generator": last, "predictor": last}
        for cycle in (1, 2):
            for found, wanted in zip(resumed(cycle, RANKS), whole, strict=True):
                assert found[0] == wanted[0][cycle:]
                assert not tiny.unequal(found[1], wanted[1])
        metrics, end = resumed(1, 1)[0]
        assert not [name for one, other in zip(metrics, whole[0][0][1:], strict=True)
                    for name in tiny.unequal(one, other, 1e-9)]
        assert not tiny.unequal_run(end, whole[0][1])


def test_what_foresight_adds_is_seen() -> None:
    def body(rank: int) -> tuple[dict[str, float], dict[str, float]]:
        stage = tiny.stage_of(recipe_of("consistency", *FORESIGHT), "few_step")
        return tiny.train(stage, 1)[0], stage.ledger.close_cycle()

    with in_memory():
        metrics, seconds = run_threads(1, body, TIMEOUT)[0]
    assert metrics["loss/foresight"] == pytest.approx(1 - metrics["cosine/foresight"], abs=1e-6)
    assert {"grad_norm/predictor", "lr/predictor"} <= metrics.keys()
    assert {"encoder", "predictor", "forward", "backward"} <= seconds.keys()
