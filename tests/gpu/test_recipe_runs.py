"""The tiny recipe on a real card, trained with the fused kernels and in plain torch: they agree as roundings let them.

    python -m pytest -m gpu tests/gpu/test_recipe_runs.py -s        one GPU; seconds a run
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mirai_dist.config import load
from tests.short_runs import Distance, Trained, trained

pytestmark = pytest.mark.gpu

DEVICE, BACKEND = torch.device("cuda", 0), "nccl"
RECIPE = Path(__file__).parents[2] / "recipes" / "tiny" / "video_mirai.yaml"
OVERRIDES = ("dmd.critic_updates=2",)  # of five that are alike
POSITIONS = {"ar_teacher": 2, "distil": 6}  # two cycles

# Kernels that round once where plain torch rounds each step, tried in plain torch on a CPU with five seeds, come to
# 1.0, 1.0 and 1.0 times plain torch's distance in float32, and in bfloat16 at most to 1.32, 1.01 and 1.31 times; a
# position that is wrong for later segments to 1.6, 1.4 and 1.6 times in bfloat16, and hundreds of times in float32.
TIMES = {"float32": Distance(3.0, 3.0, 3.0), "bfloat16": Distance(metric=2.0, role=1.2, parameter=2.0)}
# A control that is further from the exact run than this shows nothing. There it was a tenth of it in float32 and a
# half in bfloat16.
LIMITS = {"float32": Distance(1e-4, 1e-3, 1e-2), "bfloat16": Distance(2e-2, 0.2, 0.5)}


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    """A run of one rank."""
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@cache
def run(stage: str, dtype: str, kernels: str) -> Trained:
    return trained(load(RECIPE, OVERRIDES).recipe, stage, POSITIONS[stage], dtype, kernels, DEVICE)


@pytest.mark.parametrize("dtype", TIMES)
@pytest.mark.parametrize("stage", POSITIONS)
def test_a_fused_run_is_the_plain_one(stage: str, dtype: str) -> None:
    exact = run(stage, "float64", "reference")
    control, found = (Distance.of(run(stage, dtype, kernels), exact) for kernels in ("reference", "fused"))
    print(f"{stage} in {dtype}: fused {found}, plain {control}")
    assert control.at_most(LIMITS[dtype]), control
    assert found.at_most(control.times(TIMES[dtype])), f"{found}; in plain torch {control}"
