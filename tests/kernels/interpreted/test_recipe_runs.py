"""The tiny recipe, trained with the fused kernels and in plain torch: metrics and weights agree as roundings let them.

At the recipe's widths, with fewer tokens, samples and blocks: an interpreted kernel takes milliseconds a token. The
whole recipe, and in bfloat16, on a GPU: tests/gpu/test_recipe_runs.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mirai_dist.config import load
from tests.procs.conftest import run_threads
from tests.short_runs import Distance, trained

RECIPE = Path(__file__).parents[3] / "recipes" / "tiny" / "video_mirai.yaml"
TIMEOUT = 300.0  # seconds; thirty where nothing else runs
SMALL = (
    *("video.latent_frames=4", "video.latent_height=2", "video.latent_width=4", "world.speed=1", "world.radius=3"),
    *("teacher.blocks=2", "foresight.predictor_blocks=1", "dmd.critic_updates=1", "rollout.steps=[1000,500]"),
    *(f"stages.{stage}.batch.{size}=1" for stage in ("ar_teacher", "distil") for size in ("global_size", "micro_size")),
    "study.arms.shuffled-targets=[]",  # which one sample cannot be
)
POSITIONS = {"ar_teacher": 2, "distil": 4}  # two cycles; of distil, each with a replay after the critic's update

# What float32 costs these runs in plain torch comes to half of it, at most.
FLOAT32 = Distance(metric=2e-5, role=2e-4, parameter=1e-3)
TIMES = Distance(3.0, 3.0, 3.0)  # a few weights whose gradients cancel decide how far either is from the exact run


@pytest.mark.parametrize("stage", POSITIONS)
def test_a_fused_run_is_the_plain_one(stage: str) -> None:
    recipe = load(RECIPE, SMALL).recipe
    exact, plain, fused = (
        run_threads(1, lambda _, how=how: trained(recipe, stage, POSITIONS[stage], *how), TIMEOUT)[0]
        for how in (("float64", "reference"), ("float32", "reference"), ("float32", "fused"))
    )
    control, found = Distance.of(plain, exact), Distance.of(fused, exact)
    assert control.at_most(FLOAT32), control
    assert found.at_most(control.times(TIMES)), f"{found}; in plain torch {control}"
