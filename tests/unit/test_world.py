"""The procedural world: reproducible, moving as captioned, inside its walls."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mirai_dist.config import schema
from mirai_dist.data.world import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    PILLAR_GREY,
    RGB,
    SHAPES,
    UNIT,
    VOCABULARY,
    World,
    parse_caption,
    pillar_columns,
)

VIDEO = schema.Video(latent_frames=12, frames_per_segment=3, latent_height=4, latent_width=4)
FREE = schema.World(speed=1.5, radius=4.0, radius_jitter=0.5)
BOUNCE = replace(FREE, level="bounce")


def test_a_clip_depends_on_seed_and_index_alone() -> None:
    world = World(FREE, VIDEO, seed=3)
    together = world.clips([5, 70_000_000_000, 2])
    torch.manual_seed(99)
    alone = World(FREE, VIDEO, seed=3).clips([2])
    assert torch.equal(together[2], alone[0])
    assert not torch.equal(together[2], World(FREE, VIDEO, seed=4).clips([2])[0])
    assert not torch.equal(together[0], together[1])
    assert world.captions([5, 2]) == [world.caption(5), world.caption(2)]


def test_the_hash_is_splitmix64_bit_for_bit() -> None:
    # An independent integer implementation: int64 wrap-around in torch must not drift between versions or machines.
    mask = (1 << 64) - 1

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    seed, colour_purpose = 11, 0
    key = mix((mix(seed) + colour_purpose) & mask)
    expected = [int((mix((key + index) & mask) >> 11) * 2.0**-53 * len(COLOURS)) for index in range(200)]
    assert World(FREE, VIDEO, seed).states(range(200)).colour.tolist() == expected


def test_captions_are_in_the_vocabulary_and_parse_back() -> None:
    world = World(FREE, VIDEO, seed=0)
    states = world.states(range(400))
    captions = world.captions(range(400))
    assert len(set(captions)) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS)
    for i, caption in enumerate(captions):
        assert set(caption.split()) <= set(VOCABULARY)
        assert parse_caption(caption) == (states.colour[i], states.shape[i], states.direction[i])
    with pytest.raises(ValueError, match="a pink circle moving left"):
        parse_caption("a pink circle moving left")


@pytest.mark.parametrize("name", ["colour", "shape", "direction"])
def test_words_are_drawn_evenly_and_independently(name: str) -> None:
    states = World(FREE, VIDEO, seed=0).states(range(4800))
    ids = getattr(states, name)
    expected = len(ids) / (int(ids.max()) + 1)
    assert (ids.bincount() - expected).abs().max() < 5 * math.sqrt(expected)
    joint = (ids * 16 + states.colour * 4 + states.direction).bincount()
    assert joint[joint > 0].max() < 1.5 * joint[joint > 0].float().mean()


def test_free_level_moves_straight_at_the_recipes_speed_and_stays_inside() -> None:
    states = World(FREE, VIDEO, seed=1).states(range(500))
    travelled = states.centres[:, -1] - states.centres[:, 0]
    expected = UNIT[states.direction] * 1.5 * 11
    assert torch.allclose(travelled, expected, atol=1e-9)
    steps = states.centres.diff(dim=1)
    assert torch.allclose(steps, steps[:, :1].expand_as(steps), atol=1e-9)
    edge = states.radius[:, None, None]
    assert (states.centres >= edge - 1e-9).all() and (states.centres <= 32 - edge + 1e-9).all()
    assert states.radius.min() >= 3.5 and states.radius.max() <= 4.5 and states.radius.std() > 0.2


def test_starts_are_random_along_and_across() -> None:
    # With no range the video would be a function of the caption, and distillation would have nothing to show.
    fixed = replace(FREE, radius_jitter=0.0)
    free = 32 - 2 * 4.0 - 11 * 1.5
    start = World(fixed, VIDEO, seed=1).states(range(2000))
    right = start.centres[start.direction == DIRECTIONS.index("right"), 0] - 4.0
    middle = torch.tensor([0.0, 11 * 1.5 / 2], dtype=torch.float64)
    assert (right - middle).amin(0).abs().max() < 0.2 and ((right - middle).amax(0) - free).abs().max() < 0.2
    left = start.centres[start.direction == DIRECTIONS.index("left"), 0, 0] - 4.0
    assert abs(float(left.min()) - (24 - free)) < 0.2 and abs(float(left.max()) - 24) < 0.2
    anywhere = World(replace(fixed, level="bounce"), VIDEO, seed=1).states(range(2000)).centres[:, 0] - 4.0
    assert anywhere.min() < 0.2 and anywhere.max() > 23.8


def test_long_clips_continue_the_short_ones_and_bounce() -> None:
    for recipe in (FREE, BOUNCE):
        world = World(recipe, VIDEO, seed=2)
        short, long = world.states(range(50)), world.states(range(50), latent_frames=60)
        assert torch.equal(short.centres, long.centres[:, :45])
        assert torch.equal(world.clips(range(3)), world.clips(range(3), latent_frames=60)[:, :45])
        edge = long.radius[:, None, None]
        assert (long.centres >= edge - 1e-9).all() and (long.centres <= 32 - edge + 1e-9).all()
        steps = long.centres.diff(dim=1).norm(dim=-1)
        assert torch.isclose(steps.median(), torch.tensor(0.375, dtype=torch.float64))
        moving = (long.centres.diff(dim=1) * UNIT[long.direction][:, None]).sum(-1)
        assert (moving > 0.3).any(1).all() and (moving < -0.3).any(1).all()


def test_pixels_show_the_state() -> None:
    world = World(FREE, VIDEO, seed=5)
    states, clips = world.states(range(60)), world.clips(range(60))
    assert clips.shape == (60, 45, 3, 32, 32) and clips.dtype == torch.float32
    assert clips.min() >= -0.8 - 1e-6 and clips.max() <= 0.9 + 1e-6
    cover = ((clips - BACKGROUND) / (RGB[states.colour] - BACKGROUND)[:, None, :, None, None])[:, :, 0].double()
    grid = torch.arange(32) + 0.5
    x = (cover.sum(2) * grid).sum(-1) / cover.sum(dim=(2, 3))
    y = (cover.sum(3) * grid).sum(-1) / cover.sum(dim=(2, 3))
    circle, triangle = states.shape == 0, states.shape == 2
    assert (x - states.centres[..., 0]).abs().max() < 0.15
    assert (y - states.centres[..., 1])[~triangle].abs().max() < 0.15
    lower = (y - states.centres[..., 1])[triangle] - states.radius[triangle, None] / 3
    assert lower.abs().max() < 0.25
    area = cover.sum(dim=(2, 3)) / states.radius[:, None].square()
    assert torch.allclose(area[circle], torch.tensor(math.pi, dtype=torch.float64), atol=0.12)
    assert (area[states.shape == 1] - 4).abs().max() < 0.3 and (area[triangle] - 2).abs().max() < 0.25


def test_occlusion_hides_the_middle() -> None:
    world = World(replace(FREE, level="occlusion"), VIDEO, seed=0)
    clips, open_clips = world.clips(range(4)), World(BOUNCE, VIDEO, seed=0).clips(range(4))
    hidden = pillar_columns(32)
    assert (clips[..., hidden] == PILLAR_GREY).all() and int(hidden.sum()) == 8
    assert torch.equal(clips[..., ~hidden], open_clips[..., ~hidden])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 2.5}, "no free start"),
        ({"radius": 16.0}, "do not fit"),
        ({"speed": 0.0}, "positive speed"),
        ({"radius_jitter": 4.0}, "radius_jitter"),
        ({"radius_jitter": 3.75}, "no free start"),
    ],
)
def test_impossible_worlds_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        World(replace(FREE, **change), VIDEO, seed=0)
