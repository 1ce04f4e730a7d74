"""FLOPs by phase as planned, and as an operator counter sees them in the run's own updates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mirai_dist.config import schema
from mirai_dist.cycle.stages import Run
from mirai_dist.plan import flops, passes
from tests.procs import tiny

aten: Any = torch.ops.aten
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class Counter:
    """FLOPs that the stages' phases ran, by phase. Ranks that are threads: made and read on one of them."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    @contextmanager
    def counting(self, stage: Any) -> Iterator[None]:
        enter = stage.ledger.phase

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            with enter(name), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                yield
            self.found[name] = self.found.get(name, 0.0) + counter.get_total_flops()

        with mock.patch.object(stage.ledger, "phase", phase):
            yield


def planned(recipe: schema.Recipe, name: str) -> dict[str, float]:
    """FLOPs of one cycle on one rank, under the ledger's names of phases."""
    found: dict[str, float] = {}
    for update in passes.updates(recipe, recipe.stages[name], ranks=1):
        for phase, count in flops.of_update(recipe, update).items():
            phase = "backward" if phase == "recompute" else phase
            found[phase] = found.get(phase, 0.0) + count.total * update.times
    return found


def measured(recipe: schema.Recipe, name: str, exits: list[tuple[int, int | None]]) -> dict[str, float]:
    """The same, counted: the mean over cycles with each of the exit steps."""
    counter = Counter()
    stage = tiny.stage_of(recipe, name)
    # The autoencoder has no part in the plan: a long rollout's clip begins with a frame instead of its picture.
    frame = mock.patch.object(Run, "as_image", lambda _, latents: latents[:, -1:])
    with counter.counting(stage), frame:
        for exit_steps in exits:
            with mock.patch.object(stage, "exit_steps", lambda *_, chosen=exit_steps: chosen, create=True):
                tiny.train(stage, len(stage.positions))
    return {phase: count / len(exits) for phase, count in counter.found.items() if count}


def compare(threads: Any, recipe: schema.Recipe, name: str) -> None:
    steps, first = len(recipe.rollout.steps), len(recipe.rollout.first_steps)
    exits: list[Any] = list(itertools.product(range(steps), range(first) if first else [None]))
    wanted = planned(recipe, name)
    (found,) = threads(1, tiny.TIMEOUT)(lambda _: measured(recipe, name, exits if name == "distil" else exits[:1]))
    found.pop("data", None)  # clips of the world, which nobody plans
    assert found.keys() == wanted.keys()
    for phase, count in found.items():
        assert wanted[phase] == pytest.approx(count, rel=0.01), phase


DMD = [
    [],
    ["parallel.recompute=block", "parallel.unit=block", "parallel.reshard_after_forward=true"],
    ["foresight.preset=release", "stages.distil.batch.micro_size=2"],
    ["foresight.weight=0"],
    ["foresight.encoder_attention=causal", "foresight.offsets=[1]"],
    ["rollout.first_steps=[1000]", "rollout.kv_grad=leaky"],
    ["video.latent_frames=4", "rollout.window_frames=3", "rollout.sink_frames=1"],
    ["video.latent_frames=3", "rollout.total_frames=5", "rollout.window_frames=2"],
]


@pytest.mark.parametrize("overrides", DMD, ids=lambda o: ",".join(o) or "defaults")
def test_a_cycle_of_dmd(threads: Any, overrides: list[str]) -> None:
    batch = "2" if "stages.distil.batch.micro_size=2" in overrides else "1"
    compare(threads, tiny.recipe(f"stages.distil.batch.global_size={batch}", *overrides), "distil")


@pytest.mark.parametrize("fusion", ["none", "frames", "offsets"])
def test_foresight_of_a_few_step_start(threads: Any, fusion: str) -> None:
    own = ["weight=0.5", f"fusion={fusion}", f"encoder_attention={'causal' if fusion == 'none' else 'bidirectional'}"]
    settings = [f"stages.few_step.foresight.{each}" for each in own]
    clip = ["video.latent_frames=4", "video.frames_per_segment=2"]
    recipe = tiny.recipe(*settings, *clip, "stages.few_step.teacher=teacher", "stages.few_step.batch.global_size=1")
    compare(threads, recipe, "few_step")


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
@pytest.mark.parametrize("kind", ["bidirectional", "teacher_forcing", "diffusion_forcing", "consistency"])
def test_an_update_of_an_earlier_stage(threads: Any, kind: str, recompute: str) -> None:
    name = {"bidirectional": "teacher", "consistency": "few_step"}.get(kind, "ar_teacher")
    compare(threads, tiny.recipe(f"stages.{name}.kind={kind}", f"parallel.recompute={recompute}"), name)
