"""What the planner counts without torch is what torch counts: parameters, and what a segment sees of its cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mirai_dist.config import load
from mirai_dist.cycle.roles import kv_cache, wan_shape
from mirai_dist.method.arithmetic import PRESETS
from mirai_dist.models.predictor import Predictor
from mirai_dist.models.wan import WanModel
from mirai_dist.plan import passes, shapes
from tests.tiny_wan import write

RECIPES = Path(__file__).parents[2] / "recipes"
WAN = RECIPES / "wan" / "causal-forcing-chunkwise-mirai-8x8.yaml"
TINY = RECIPES / "tiny" / "video_mirai.yaml"


def meta_shapes(network: torch.nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(parameter.shape) for parameter in network.parameters())


def planned_shapes(parameters: shapes.Parameters) -> list[tuple[int, ...]]:
    return sorted((*parameters.block * parameters.blocks, *parameters.rest))


@pytest.mark.parametrize("path", [WAN, TINY])
@pytest.mark.parametrize("role", ["teacher", "generator", "critic"])
def test_parameters_are_those_of_the_module(path: Path, role: str) -> None:
    recipe = load(path).recipe
    with torch.device("meta"):
        model = WanModel(wan_shape(getattr(recipe, role), recipe))
    planned = shapes.of_role(role, recipe)
    assert planned_shapes(planned) == meta_shapes(model)
    assert planned.count == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("path", [WAN, TINY])
@pytest.mark.parametrize("answers", [1, 3])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_parameters_of_the_predictor(path: Path, preset: str, answers: int) -> None:
    recipe = load(path, [f"foresight.preset={preset}"]).recipe
    with torch.device("meta"):
        model = Predictor(
            recipe.generator.dim,
            answers * recipe.teacher.dim,
            recipe.generator.heads,
            recipe.foresight.predictor_blocks,
            PRESETS[preset].gated_predictor,
        )
    assert planned_shapes(shapes.predictor(recipe, answers)) == meta_shapes(model)


def test_the_published_counts() -> None:
    recipe = load(WAN).recipe
    assert shapes.of_role("generator", recipe).count == 1_418_996_800
    assert shapes.of_role("teacher", recipe).count == 14_288_491_584
    assert shapes.text_encoder().count == 5_680_910_336


CACHES = [
    ["video.latent_frames=8"],
    ["video.latent_frames=8", "rollout.window_frames=4"],
    ["video.latent_frames=8", "rollout.window_frames=6", "rollout.sink_frames=2"],
    ["video.latent_frames=8", "rollout.total_frames=16", "rollout.window_frames=4"],
    ["video.latent_frames=8", "rollout.total_frames=16", "rollout.window_frames=8", "rollout.sink_frames=2"],
    ["video.latent_frames=8", "rollout.total_frames=12", "rollout.window_frames=4", "rollout.sink_frames=2"],
]


@pytest.mark.parametrize("overrides", CACHES, ids=lambda o: ",".join(o))
def test_a_segment_sees_what_the_cache_shows(overrides: list[str]) -> None:
    recipe = load(TINY, overrides).recipe
    length, total = recipe.video.frames_per_segment, passes.rollout_frames(recipe)
    held = passes.rollout_cache_frames(recipe)
    cache = kv_cache(recipe, 1, held + length, torch.device("cpu"))
    assert (cache.shape.frames, cache.shape.room) == (held, length)
    heads, dim = recipe.generator.heads, recipe.generator.dim
    own = torch.zeros(1, length * shapes.frame_tokens(recipe), heads, dim // heads)
    for first in range(0, total, length):
        assert passes.visible_frames(recipe, first, held) == len(cache.visible_frames()), f"frame {first}"
        if first + length < total:
            write(cache, ((own, own),) * recipe.generator.blocks)


SINKS = ["video.latent_frames=8", "rollout.window_frames=6", "rollout.sink_frames=2"]


@pytest.mark.parametrize(
    "overrides",
    [
        *CACHES,
        [*SINKS, "rollout.total_frames=10"],
        [*SINKS, "rollout.total_frames=14"],
        [*SINKS, "rollout.window_frames=4", "rollout.total_frames=10"],
    ],
    ids=lambda o: ",".join(o),
)
def test_the_past_is_copied_as_often_as_the_cache_copies_it(overrides: list[str]) -> None:
    recipe = load(TINY, overrides).recipe
    length, total = recipe.video.frames_per_segment, passes.rollout_frames(recipe)
    cache = kv_cache(recipe, 1, passes.rollout_cache_frames(recipe) + length, torch.device("cpu"))
    start, size = cache._store.data_ptr(), cache._store.nbytes
    copies = 0
    for first in range(0, total, length):
        shown = [cache.view()] if first >= total - recipe.video.latent_frames else []
        views = cache.view(room=length)
        copies += sum(not start <= seen[0].keys.data_ptr() < start + size for seen in (*shown, views))
        cache.keep(views)
    rolled = passes.rollout(recipe, 1, gradient=True)
    assert sum(each.count * each.copies for each in rolled if each.gradient) == pytest.approx(copies)
