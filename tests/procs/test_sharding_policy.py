"""What is built is what the shard plan says: units, dtypes, gathers, reductions, recomputation, first weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mirai_dist.config import Resolved, schema
from mirai_dist.cycle.effective import effective
from mirai_dist.cycle.roles import Role, causal, velocity_of
from mirai_dist.method.rollout import RolloutInputs, rollout
from tests.procs import tiny
from tests.procs.tiny import TIMEOUT

GATHERS, SCATTERS = ("all_gather_single", "all_gather_into_tensor"), ("reduce_scatter_single", "reduce_scatter_tensor")


class Traffic:
    """Dtypes of what this rank gathered and reduced since the last look."""

    def __init__(self) -> None:
        self.by_rank: dict[int, tuple[list[torch.dtype], list[torch.dtype]]] = {}

    def look(self) -> tuple[list[torch.dtype], list[torch.dtype]]:
        return self.by_rank.pop(dist.get_rank(), ([], []))

    def counts(self) -> tuple[int, int]:
        gathers, scatters = self.look()
        return len(gathers), len(scatters)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """FSDP calls the first of each pair of names that its torch version has."""
        with ExitStack() as patches:
            for kind, names in enumerate((GATHERS, SCATTERS)):
                name = next(name for name in names if hasattr(dist, name))
                patches.enter_context(mock.patch.object(dist, name, self._counted(kind, getattr(dist, name))))
            yield

    def _counted(self, kind: int, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            tensor = next(value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor))
            self.by_rank.setdefault(dist.get_rank(), ([], []))[kind].append(tensor.dtype)
            return function(*arguments, **named)
        return call


def roles_of(stage: Any) -> dict[str, Role]:
    return {role.name: role for role in vars(stage).values() if isinstance(role, Role)}


class Sharding(NamedTuple):
    unit: str
    reshard: bool
    recompute: str
    dtype: str = "float32"
    preset: str = "paper"

    def recipe(self) -> schema.Recipe:
        return tiny.recipe(
            f"parallel.unit={self.unit}", f"parallel.reshard_after_forward={str(self.reshard).lower()}",
            f"parallel.recompute={self.recompute}", f"parallel.compute_dtype={self.dtype}",
            f"foresight.preset={self.preset}")


SHARDINGS = [
    Sharding("block", True, "block", "bfloat16", "release"), Sharding("block", False, "none"),
    Sharding("network", True, "none", "bfloat16"), Sharding("network", False, "block"),
]


def check_storage(stage: Any) -> None:
    """Units and stored dtypes are the plan's, and every parameter is sharded."""
    for role in roles_of(stage).values():
        found = {path for path, module in role.network.named_modules() if isinstance(module, FSDPModule)}
        assert found == {unit.path for unit in role.plan.units}, role.name
        for name, parameter in role.network.named_parameters():
            assert isinstance(parameter, DTensor), f"{role.name}.{name}"
            assert str(parameter.dtype) == f"torch.{role.plan.storage_dtype}", f"{role.name}.{name}"


def check_effective(stage: Any, recipe: schema.Recipe) -> None:
    """effective.yaml tells of the networks that were built."""
    written = effective(Resolved(recipe, {}, tiny.RECIPE, {}), dist.get_world_size(), "cpu")
    assert written["accumulation"]["distil"] == stage.layout.micro_batches
    names = {"teacher": "teacher and foresight encoder"}
    assert written["networks"].keys() == {names.get(name, name) for name in roles_of(stage)}
    for name, role in roles_of(stage).items():
        told = written["networks"][names.get(name, name)]
        assert told["storage"] == role.plan.storage_dtype and told["compute"] == role.plan.compute_dtype
        assert told["units"] == sum(isinstance(module, FSDPModule) for module in role.network.modules())
        assert told["recomputed blocks"] == len(role.plan.recompute)
        assert told["reduce"] == "float32"
    settings = written["foresight"]
    blocks = {"generator blocks": stage.generator_blocks, "encoder blocks": stage.encoder_blocks}
    assert settings == blocks | {"weights": {stage.name: recipe.foresight.weight}}
    assert tuple(written["denoising timesteps"]) == stage.rollout.timesteps


def check_score_traffic(stage: Any, traffic: Traffic) -> None:
    """A frozen network gathers in its compute dtype: once and for all, or at every forward."""
    role, recipe = stage.teacher, stage.recipe
    video = recipe.video
    latents = torch.zeros(1, video.latent_frames, video.channels, video.latent_height, video.latent_width)
    text = torch.zeros(1, recipe.text.length, recipe.text.dim)
    units = role.plan.units
    with torch.no_grad():
        for forward in (1, 2):
            velocity_of(role.network)(latents, torch.tensor([500.0]), text)
            gathers, scatters = traffic.look()
            again = forward == 1 or units[0].reshard_after_forward
            assert len(gathers) == (len(units) if again else 0) and not scatters
            assert {str(dtype) for dtype in gathers} <= {f"torch.{role.plan.compute_dtype}"}


def check_rollout_traffic(stage: Any, traffic: Traffic, exit_step: int) -> None:
    """Gathers and reductions of one generator rollout and its backward, and blocks that backward runs again.

    Forward: every pass gathers every unit, or (kept gathered) the first one does. Backward: the root once, and each
    block once an exit pass, because FSDP frees it after each of its backwards; a kept block is still there for the
    first of them. Recomputation gathers nothing: it runs inside the unit, between its hooks.
    """
    plan, recipe = stage.generator.plan, stage.recipe
    segments = recipe.video.latent_frames // recipe.video.frames_per_segment
    passes = segments * (exit_step + 1) + segments - 1
    blocks, kept = len(plan.units) - 1, not plan.units[0].reshard_after_forward
    runs: list[int] = []
    hooks = [block.ffn.register_forward_hook(lambda *_: runs.append(1)) for block in stage.generator.network.blocks]
    latents, states = _rollout(stage, exit_step)
    assert traffic.counts() == (len(plan.units) * (1 if kept else passes), 0)
    assert len(runs) == passes * len(hooks)
    runs.clear()
    (latents.sum() + sum(state.sum() for state in states)).backward()
    gathers, scatters = traffic.look()
    assert len(gathers) == (blocks * (segments - 1) if kept else 1 + blocks * segments)
    assert len(scatters) == len(plan.units) and set(scatters) == {torch.float32}
    assert len(runs) == segments * len(plan.recompute)
    for hook in hooks:
        hook.remove()


def _rollout(stage: Any, exit_step: int) -> Any:
    recipe, video = stage.recipe, stage.recipe.video
    shape = (len(stage.rollout.timesteps) + 1, 1, video.latent_frames, video.channels, video.latent_height)
    noise = torch.ones(*shape, video.latent_width)
    text = torch.ones(1, recipe.text.length, recipe.text.dim)
    inputs = RolloutInputs(noise, text, exit_step, stage.generator_blocks)
    return rollout(causal(stage.generator.network), stage.rollout, inputs, stage.cache(1))


def test_networks_are_sharded_as_planned_and_reported(threads) -> None:
    recipes, traffic = [sharding.recipe() for sharding in SHARDINGS], Traffic()

    def body(rank: int) -> None:
        for recipe in recipes:
            stage = tiny.stage_of(recipe, "distil")
            check_storage(stage)
            check_effective(stage, recipe)
            traffic.look()
            check_score_traffic(stage, traffic)
            for exit_step in (0, 1):
                check_rollout_traffic(stage, traffic, exit_step)

    with tiny.lively(), traffic.listening():
        threads(2, timeout=TIMEOUT)(body)


@pytest.mark.parametrize("every", [False, True])
def test_accumulation_reduces_at_the_end_unless_asked(threads, every: bool) -> None:
    """Two micro-batches, of a generator update and of a critic update with replay.

    A block of the generator runs once a segment. In the last micro-batch FSDP reduces what earlier ones left when it
    comes back through a block for the first time, and the rest when all segments are through: twice, however many
    micro-batches there were.
    """
    recipe = tiny.recipe("parallel.unit=block", f"parallel.sync_every_micro_batch={str(every).lower()}")
    traffic = Traffic()

    def body(rank: int) -> None:
        stage = tiny.stage_of(recipe, "distil")
        assert stage.layout.micro_batches == 2
        units = {name: len(role.plan.units) for name, role in roles_of(stage).items()}
        generator, critic, predictor = units["generator"], units["critic"], units["predictor"]
        traffic.look()
        stage.step()
        assert traffic.counts()[1] == (2 * (generator + predictor) if every else generator + predictor + generator - 1)
        stage.advance()
        stage.step()
        assert traffic.counts()[1] == (critic + predictor) * (2 if every else 1)

    with tiny.lively(), traffic.listening():
        threads(2, timeout=TIMEOUT)(body)


def test_first_weights_do_not_depend_on_the_world_size(threads) -> None:
    """Without `lively`: the initialisation that runs use, in the dtype that each network is stored in."""
    recipe = tiny.recipe("parallel.unit=block", "parallel.compute_dtype=bfloat16",
                         *(f"stages.{name}.batch.global_size=12" for name in ("distil", "few_step")))

    def body(rank: int) -> dict[str, torch.Tensor]:
        stages = [tiny.stage_of(recipe, name) for name in ("distil", "few_step")]
        return {f"{stage.name}.{name}": tensor for stage in stages for name, tensor in tiny.weights(stage).items()}

    alone, *others = [threads(ranks, timeout=TIMEOUT)(body)[-1] for ranks in (1, 2, 3)]
    assert alone["distil.teacher.blocks.0.ffn.0.weight"].dtype == torch.bfloat16
    for other in others:
        assert not tiny.unequal(alone, other)
    first = [alone[f"distil.{role}.blocks.0.ffn.0.weight"].float() for role in ("critic", "teacher")]
    assert (first[0] - first[1]).abs().max() > 0.01, "roles draw their own weights"
