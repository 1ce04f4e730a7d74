"""Each phase changes the networks it declares and nothing else; foresight that is off leaves no trace.

Every stage runs once, on two ranks, in a module-wide fixture; the tests read what was digested there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest

from mirai_dist.cycle import phases
from mirai_dist.cycle.stages import Stage
from tests.procs import tiny
from tests.procs.conftest import run_threads
from tests.procs.tiny import TIMEOUT

RANKS, CYCLES = 2, 2
SCHEDULE = [f"{optimizer}.{key}" for key in ("schedule=cosine", "warmup=2")
            for optimizer in ("stages.distil.optimizer", "dmd.critic_optimizer", "foresight.optimizer")]
UPDATES = ("flow_update", "consistency_update", "generator_update", "critic_update", "replay_update")
# One phase a position; replay follows the critic within its position.
PHASES = {"teacher": ["bidirectional"], "ar_teacher": ["teacher_forcing"], "few_step": ["consistency"],
          "distil": ["generator", "critic", "replay", "critic", "replay"]}


class Seen(NamedTuple):
    """One phase: digests of this rank's shards before and after it, and the gradients it left lying about."""

    phase: str
    before: dict[str, str]
    after: dict[str, str]
    gradients: list[str]

    def changed(self) -> set[str]:
        assert self.before.keys() <= self.after.keys()
        return {name for name, digest in self.after.items() if self.before.get(name) != digest}


@contextmanager
def watching() -> Iterator[dict[tuple[int, str], list[Seen]]]:
    """Digest around every phase function; what each stage does is under its rank and name."""
    seen: dict[tuple[int, str], list[Seen]] = {}

    def watched(function: Any, phase: str) -> Any:
        def run(stage: Stage, *arguments: Any) -> None:
            before = tiny.shard_digests(stage)
            function(stage, *arguments)
            left = [f"{role}.{name}" for role, network in tiny.networks_of(stage).items()
                    for name, parameter in network.named_parameters() if parameter.grad is not None]
            name = phase if stage.stage.kind == "dmd" else stage.stage.kind
            after = tiny.shard_digests(stage)
            seen.setdefault((stage.run.rank, stage.name), []).append(Seen(name, before, after, left))
        return run

    with ExitStack() as patches:
        for name in UPDATES:
            function = watched(getattr(phases, name), name.removesuffix("_update"))
            patches.enter_context(mock.patch.object(phases, name, function))
        yield seen


@pytest.fixture(scope="module")
def watched() -> list[dict[str, tuple[list[Seen], list[dict[str, float]]]]]:
    """For each rank and stage: what its phases did, and the metrics of its positions."""
    recipe = tiny.recipe("stages.distil.cycles=2", *SCHEDULE)

    def body(rank: int) -> dict[str, tuple[list[Seen], list[dict[str, float]]]]:
        found = {}
        for name in recipe.stages:
            stage = tiny.stage_of(recipe, name)
            assert not any(p.requires_grad for role, network in tiny.networks_of(stage).items()
                           if role not in stage.roles for p in network.parameters())
            metrics = tiny.train(stage, CYCLES * len(stage.positions))
            found[name] = (seen[rank, name], metrics)
        return found

    with tiny.lively(), watching() as seen:
        return run_threads(RANKS, body, timeout=TIMEOUT)


@pytest.mark.parametrize("stage", PHASES)
def test_a_phase_changes_what_it_declares_and_nothing_else(watched, stage: str) -> None:
    for rank in watched:
        seen, _ = rank[stage]
        assert [each.phase for each in seen] == PHASES[stage] * CYCLES
        for each in seen:
            declared = {name for name in each.after if name.partition("/")[2] in phases.CHANGES[each.phase]}
            assert declared and each.changed() == declared, each.phase
            assert each.gradients == [], each.phase


def test_every_declared_phase_was_watched(watched) -> None:
    # Their stages hold a single network, so there is nothing else to change; an ode stage with foresight holds
    # three, and is watched in test_few_step_foresight.py, as is a consistency stage with foresight.
    alone = {"diffusion_forcing", "ode"}
    assert {each.phase for seen, _ in watched[0].values() for each in seen} | alone == set(phases.CHANGES)


def test_frozen_networks_have_no_optimizer_and_no_average(watched) -> None:
    trained = {"teacher": {"teacher"}, "ar_teacher": {"generator"}, "few_step": {"generator"},
               "distil": {"generator", "critic", "predictor"}}
    frozen = {"few_step": {"ar_teacher", "target"}, "distil": {"teacher"}}
    for stage, roles in trained.items():
        kinds = [name.split("/") for name in watched[0][stage][0][-1].after]
        assert {role for kind, role in kinds if kind == "optimizer"} == roles
        assert {role for kind, role in kinds if kind == "average"} == ({"generator"} & roles or roles)
        assert {role for kind, role in kinds if kind == "network"} == roles | frozen.get(stage, set())


def test_each_network_follows_its_own_schedule(watched) -> None:
    """Two cycles of one generator and two critic updates: 2, 4 and (replay follows every critic update) 6 updates."""
    metrics = watched[0]["distil"][1]
    for role, peak, total in (("generator", 1e-4, 2), ("critic", 5e-4, 4), ("predictor", 1e-3, 6)):
        rates = [position[f"lr/{role}"] for position in metrics if f"lr/{role}" in position]
        expected = [peak * min(1.0, (u + 1) / 2) * (0.03 + 0.97 * (1 + math.cos(math.pi * u / total)) / 2)
                    for u in range(total)]
        assert rates == pytest.approx(expected, rel=1e-12), role


# Foresight with weight 0.

OTHERWISE = ("foresight.preset=release", "foresight.offsets=[0,2]", "foresight.depth=1", "foresight.targets=shuffled",
             "foresight.encoder_attention=causal", "foresight.optimizer.lr=0.1", "foresight.predictor_blocks=2")


def test_weight_zero_is_bit_identical_to_no_foresight_at_all(threads) -> None:
    off, otherwise, on = (tiny.recipe("stages.distil.batch.micro_size=2", *overrides) for overrides in (
        ["foresight.weight=0"], ["foresight.weight=0", *OTHERWISE], ["foresight.weight=0.2"]))
    untouchable = mock.NonCallableMock(spec=[], name="foresight")
    absent = ("_foresight", "replay_update", "foresight_method", "features_of")

    def body(rank: int) -> list[dict[str, Any]]:
        found = []
        for recipe in (off, otherwise, on):
            stage = tiny.stage_of(recipe, "distil")
            tiny.train(stage, 4)
            if recipe is not on:
                assert stage.predictor is None and stage.generator_blocks == 0
                assert not stage.saved_samples()["replay_states"]
            found.append(tiny.everything(stage))
        return found

    def without(rank: int) -> dict[str, Any]:
        stage = tiny.stage_of(off, "distil")
        tiny.train(stage, 4)
        return tiny.everything(stage)

    with tiny.lively():
        found = threads(RANKS, timeout=TIMEOUT)(body)
        with ExitStack() as patches:
            for name in absent:
                patches.enter_context(mock.patch.object(phases, name, untouchable))
            missing = threads(RANKS, timeout=TIMEOUT)(without)
    for (first, second, different), third in zip(found, missing, strict=True):
        assert not tiny.unequal(first, second)
        assert not tiny.unequal(first, third)
        moved = tiny.unequal({name: different[name] for name in first}, first)
        assert {name.partition(".")[0] for name in moved} >= {"generator", "critic", "average"}
