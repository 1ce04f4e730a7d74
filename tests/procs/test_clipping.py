"""The global norm and the clipped step of sharded networks; and what happens when a gradient is not finite."""

from __future__ import annotations

import math
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mirai_dist.cycle import phases
from mirai_dist.parallel.engine_fsdp import FsdpEngine, NonFiniteError
from mirai_dist.parallel.materialize import draw
from mirai_dist.parallel.mesh import build_mesh
from mirai_dist.plan.shards import ShardPlan, Unit
from mirai_dist.state.ema import local
from tests.procs import tiny
from tests.procs.tiny import TIMEOUT

BATCH = torch.linspace(-1, 1, 12 * 5, dtype=torch.float64).reshape(12, 5).sin()
# A unit inside, the rest at the root. No width divides by 2 and by 4; some parameters have fewer rows than ranks.
PLAN = ShardPlan((Unit("0", True), Unit("", True)), "float64", "float64", (), False)


def plain(meta: bool) -> nn.Module:
    with torch.device("meta" if meta else "cpu"):
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def initialise(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    parameter.normal_(generator=generator)


def seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


def sharded(replicas: int = 1) -> tuple[FsdpEngine, nn.Module]:
    engine = FsdpEngine(build_mesh(dist.get_world_size(), replicas, "cpu"), tiny.CPU)
    return engine, engine.build(plain(meta=True), PLAN, lambda network: draw(network, initialise, seeded))


class Step(NamedTuple):
    """Norm before clipping, and by how much one step of plain gradient descent at rate 1 moved each parameter."""

    norm: float
    moved: dict[str, Tensor]


def reference(clip: float) -> Step:
    network = plain(meta=False)
    for name, parameter in network.named_parameters():
        full = torch.empty(parameter.shape)
        initialise(name, full, seeded(name))
        parameter.data.copy_(full)
    network(BATCH).square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    return Step(norm, {name: -g * min(1.0, clip / (norm + 1e-6)) for name, g in gradients.items()})


NORM = reference(1.0).norm


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2)])
def test_norm_and_clipped_step_are_those_of_the_whole_network(threads, ranks: int, replicas: int) -> None:
    def body(rank: int) -> list[Step]:
        steps = []
        for clip in (NORM / 7, NORM * 7):
            engine, network = sharded(replicas)
            shards = ranks // replicas  # neighbouring ranks share one copy of the parameters
            rows = [len(chunk) for chunk in torch.arange(7).chunk(shards)]
            held = local(network[0].weight.detach()).shape[0]  # type: ignore[index]
            assert held == (rows[rank % shards] if rank % shards < len(rows) else 0)
            before = {name: tiny.whole(p) for name, p in network.named_parameters()}
            network(BATCH[rank :: dist.get_world_size()]).square().mean().backward()
            norm = engine.norm(network)
            engine.step(network, torch.optim.SGD(network.parameters(), lr=1.0), clip, norm)
            assert all(p.grad is None for p in network.parameters())
            after = {name: tiny.whole(p) for name, p in network.named_parameters()}
            steps.append(Step(norm.item(), {name: after[name] - before[name] for name in before}))
        return steps

    everyone = threads(ranks, timeout=TIMEOUT)(body)
    for steps in everyone:
        for step, clip in zip(steps, (NORM / 7, NORM * 7), strict=True):
            expected = reference(clip)
            assert step.norm == pytest.approx(expected.norm, rel=1e-12)
            assert not tiny.unequal(step.moved, expected.moved, 1e-12)
        assert [step.norm for step in steps] == [step.norm for step in everyone[0]], "not the same on all ranks"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_element_on_one_rank_stops_all(threads, value: float) -> None:
    """After the reduction: a shard that one rank alone holds, as a broken reduction or memory would leave it."""
    def body(rank: int) -> None:
        engine, network = sharded()
        network(BATCH).square().mean().backward()
        if rank == 1:
            gradient = network[0].weight.grad  # type: ignore[index]
            local(gradient)[-1, -1] = value
        with pytest.raises(NonFiniteError, match="gradient norm is (nan|inf)"):
            engine.norm(network)

    threads(3, timeout=TIMEOUT)(body)


class Poisoned(FsdpEngine):
    """Finds a NaN in one element of rank 1's shards of the networks it is told, when their norm is asked for."""

    victims: list[nn.Module] = []

    def norm(self, network: nn.Module) -> Tensor:
        if any(network is victim for victim in self.victims):
            gradients = [local(p.grad) for p in network.parameters() if p.grad is not None]
            next(g for g in gradients if g.numel()).view(-1)[0] = float("nan")
        return super().norm(network)


class Case(NamedTuple):
    """Whose gradient is poisoned at which position of the first cycle, in which phase, and what has moved before."""

    role: str
    position: int
    phase: str
    moved: tuple[str, ...] = ()


CASES = [Case("generator", 0, "generator"), Case("predictor", 0, "generator"), Case("critic", 1, "critic"),
         Case("predictor", 1, "replay", moved=("critic",))]


def stopped(stage: Any, case: Case) -> None:
    """The position raises, naming network and phase, and nothing that belongs to the phase has moved."""
    before, updates = tiny.shard_digests(stage), {name: role.updates for name, role in stage.roles.items()}
    where = f"phase {case.phase}, cycle 0, position {case.position}, timesteps \\["
    with pytest.raises(NonFiniteError, match=f"^{case.role}: gradient norm is nan at its update .*{where}") as raised:
        stage.step()
    assert raised.value.exit_code == 20 and "\n" not in str(raised.value)
    after = tiny.shard_digests(stage)
    assert {name.partition("/")[2] for name in after if after[name] != before.get(name)} == set(case.moved)
    assert [n for n, role in stage.roles.items() if role.updates != updates[n]] == list(case.moved)


def test_a_bad_gradient_stops_every_rank_before_any_optimizer_moves(threads) -> None:
    recipe = tiny.recipe()

    def body(rank: int) -> None:
        for case in CASES:
            stage = tiny.stage_of(recipe, "distil", Poisoned)
            tiny.train(stage, case.position)
            if rank == 1:
                Poisoned.victims.append(stage.roles[case.role].network)
            stopped(stage, case)

    with tiny.lively(), mock.patch.object(Poisoned, "victims", []):
        threads(2, timeout=TIMEOUT)(body)


def test_a_bad_loss_on_one_rank_stops_every_rank(threads) -> None:
    recipe, dmd_loss = tiny.recipe("parallel.unit=block"), phases.dmd_loss

    def broken_on_rank_one(*arguments: Any) -> Tensor:
        return dmd_loss(*arguments) * (float("nan") if dist.get_rank() == 1 else 1.0)

    with tiny.lively(), mock.patch.object(phases, "dmd_loss", broken_on_rank_one):
        threads(2, timeout=TIMEOUT)(lambda rank: stopped(tiny.stage_of(recipe, "distil"), CASES[0]))
