"""A cycle of DMD with foresight and replay by fused kernels is the cycle by plain torch."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor

from mirai_dist.cycle import fusing
from mirai_dist.cycle.fusing import Fusing
from mirai_dist.models.wan.token_ops import PLAIN, load
from tests.kernel_cases import relative
from tests.procs import tiny
from tests.procs.conftest import run_threads

SMALL = (
    *("video.latent_frames=2", "rollout.steps=[1000]", "stages.distil.batch.global_size=1", "dmd.critic_updates=1"),
    *("teacher.blocks=1", "generator.blocks=1", "critic.blocks=1", "foresight.depth=1", "foresight.weight=0.5"),
)
BOUND = 1e-5  # relative, between two ways of computing in float32


def cycle(chosen: Fusing) -> tuple[list[dict[str, Any]], dict[int, Tensor]]:
    """Metrics of the generator update, and of the critic update with its replay; the targets that are replayed. One
    rank: the interpreter knows one thread."""

    def body(rank: int) -> tuple[list[dict[str, Any]], dict[int, Tensor]]:
        stage = tiny.stage_of(tiny.in_dtype(tiny.recipe(*SMALL), "float32"), "distil")
        return tiny.train(stage, 2), stage.replay.targets

    with mock.patch.object(fusing, "fusing_of", lambda *_: chosen), tiny.lively():
        return run_threads(1, body, tiny.TIMEOUT)[0]


def test_losses_norms_and_replay_agree() -> None:
    (plain, targets), (fused, units) = cycle(Fusing(PLAIN, "reference")), cycle(Fusing(load(), "fused"))
    assert "cosine/replay" in plain[1] and "grad_norm/predictor" in plain[0]
    for found, wanted in zip(fused, plain, strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert abs(found[name] - value) <= BOUND * max(abs(value), 1.0), name
    direction = targets[0] / targets[0].norm(dim=-1, keepdim=True)
    assert relative(units[0], direction) <= BOUND < relative(targets[0], direction)
