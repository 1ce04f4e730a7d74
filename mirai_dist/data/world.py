"""The procedural video world: one coloured shape that moves in the direction its caption names.

It stands in for a data set where none can be downloaded. A clip is a function of (seed, index) alone, whatever
else is in the batch and on whichever rank it is drawn, and may be continued to any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirai_dist.config import schema
from mirai_dist.config.worlds import PIXELS_PER_LATENT as PIXELS_PER_LATENT
from mirai_dist.config.worlds import impossible

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
VOCABULARY = ("a", "moving", *COLOURS, *SHAPES, *DIRECTIONS)

# All values keep clear of -1 and 1, so that a clipped pixel in a generated video is always the model's doing.
BACKGROUND = -0.8
PILLAR_GREY = 0.0
# Bright with moderate chroma: the linear VAE can then spend most of its 16 channels on the outline, in luma.
RGB = torch.tensor([[0.90, -0.25, -0.25], [-0.25, 0.80, -0.25], [-0.25, -0.10, 0.90], [0.80, 0.70, -0.40]])
# Unit vectors of DIRECTIONS in (x, y); y grows downwards.
UNIT = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]], dtype=torch.float64)

FRAMES_PER_LATENT = 4
PILLAR_WIDTH = 8.0
EDGE_WIDTH = 1.5  # pixels over which coverage falls from 1 to 0

_COLOUR, _SHAPE, _DIRECTION, _ALONG, _ACROSS, _RADIUS = range(6)  # purposes of the hash


@dataclass(frozen=True)
class States:
    """Ground truth of B clips of T pixel frames; ids index COLOURS, SHAPES and DIRECTIONS."""

    centres: Tensor  # [B, T, 2] float64, (x, y) in pixels; pixel i covers [i, i + 1)
    colour: Tensor  # [B] int64
    shape: Tensor  # [B] int64
    direction: Tensor  # [B] int64: of the first frame; a clip that bounces turns round later
    radius: Tensor  # [B] float64, half extent in pixels


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of a clip of `latent_frames`: the first latent frame holds one, each other one four."""
    return 1 + FRAMES_PER_LATENT * (latent_frames - 1)


def parse_caption(caption: str) -> tuple[int, int, int]:
    """(colour, shape, direction) ids of a caption of this world. ValueError if it is not one."""
    words = caption.split()
    if len(words) == 5 and words[0] == "a" and words[3] == "moving":
        _, colour, shape, _, direction = words
        if colour in COLOURS and shape in SHAPES and direction in DIRECTIONS:
            return COLOURS.index(colour), SHAPES.index(shape), DIRECTIONS.index(direction)
    raise ValueError(f"caption {caption!r} is not one of the world's: expected 'a <colour> <shape> moving <direction>'")


def coverage(states: States, height: int, width: int) -> Tensor:
    """Share of each pixel that the shape covers, [B, T, height, width] float32, softened over EDGE_WIDTH pixels."""
    x = torch.arange(width)[None, None, None, :] + 0.5 - states.centres[:, :, 0, None, None].float()
    y = torch.arange(height)[None, None, :, None] + 0.5 - states.centres[:, :, 1, None, None].float()
    distance = _signed_distance(x, y, states.shape, states.radius.float())
    return (0.5 - distance / EDGE_WIDTH).clamp(0, 1)


def render(states: States, height: int, width: int, pillar: bool = False) -> Tensor:
    """Pictures [B, T, 3, height, width] in [-1, 1] of `states`, antialiased, with or without the pillar."""
    contrast = RGB[states.colour] - BACKGROUND
    video = BACKGROUND + coverage(states, height, width)[:, :, None] * contrast[:, None, :, None, None]
    if pillar:
        video[..., pillar_columns(width)] = PILLAR_GREY
    return video


def walk(start: Tensor, unit: Tensor, speed: float, room: Tensor, frames: int) -> Tensor:
    """Paths [B, frames, 2] from `start` [B, 2] along `unit` [B, 2], mirrored by walls at 0 and `room` [B, 2].

    `speed` is in pixels per latent frame, `frames` counts pixel frames.
    """
    time = torch.arange(frames, dtype=torch.float64) / FRAMES_PER_LATENT
    path = start[:, None, :] + speed * time[None, :, None] * unit[:, None, :]
    phase = torch.remainder(path, 2 * room[:, None, :])
    return torch.minimum(phase, 2 * room[:, None, :] - phase)


def pillar_columns(width: int) -> Tensor:
    """[width] bool: the columns that the pillar of level `occlusion` hides."""
    return ((torch.arange(width) + 0.5) - width / 2).abs() < PILLAR_WIDTH / 2


class World:
    """Clips, captions and ground truth of one seed.

    Raises ValueError when the picture is too small for the shape, or, at level `free`, when no start exists from
    which the largest shape stays clear of the wall for `video.latent_frames`. As `Captions` it is endless.
    """

    size = None

    def __init__(self, world: schema.World, video: schema.Video, seed: int) -> None:
        self.world = world
        self.video = video
        self.seed = seed
        self.height = PIXELS_PER_LATENT * video.latent_height
        self.width = PIXELS_PER_LATENT * video.latent_width
        self._travel = world.speed * (video.latent_frames - 1)
        problem = impossible(world, video)
        if problem:
            raise ValueError(problem)

    def caption(self, index: int) -> str:
        """Caption of clip `index`, such as 'a red circle moving left'."""
        return self.captions([index])[0]

    def captions(self, numbers: Sequence[int] | Tensor) -> list[str]:
        """One caption an index."""
        colour, shape, direction = (ids.tolist() for ids in self._words(torch.as_tensor(numbers, dtype=torch.int64)))
        return [
            f"a {COLOURS[c]} {SHAPES[s]} moving {DIRECTIONS[d]}"
            for c, s, d in zip(colour, shape, direction, strict=True)
        ]

    def vocabulary(self) -> tuple[str, ...]:
        """Every word a caption may hold."""
        return VOCABULARY

    def states(self, indices: Sequence[int] | Tensor, latent_frames: int | None = None) -> States:
        """Ground truth of the clips `indices`; `latent_frames` defaults to the recipe's."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        colour, shape, direction = self._words(index)
        jitter = self.world.radius_jitter
        radius = self.world.radius + jitter * (2 * self._uniform(index, _RADIUS) - 1)
        size = torch.tensor([self.width, self.height], dtype=torch.float64)
        room = size[None, :] - 2 * radius[:, None]  # [B, 2]: how far a centre can go on each axis
        unit = UNIT[direction]
        moves = unit.abs()
        # Along the motion, measured from the wall the shape comes from. At level `free` starts vary as much across
        # the motion as along it, around the middle: no run with the whole width learned directions (benchmarks/LOG.md).
        travel = self._travel if self.world.level == "free" else 0.0
        along = self._uniform(index, _ALONG)[:, None] * (room - travel)
        along = torch.where(unit < 0, room - along, along)
        across = travel / 2 + self._uniform(index, _ACROSS)[:, None] * (room - travel)
        start = torch.where(moves > 0, along, across)
        frames = pixel_frames(self.video.latent_frames if latent_frames is None else latent_frames)
        centres = radius[:, None, None] + walk(start, unit, self.world.speed, room, frames)
        return States(centres, colour, shape, direction, radius)

    def clips(self, indices: Sequence[int] | Tensor, latent_frames: int | None = None) -> Tensor:
        """Pixel videos [B, T, 3, H, W] in [-1, 1], float32, T = 1 + 4 (latent_frames - 1)."""
        pillar = self.world.level == "occlusion"
        return render(self.states(indices, latent_frames), self.height, self.width, pillar)

    def _words(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = {_COLOUR: len(COLOURS), _SHAPE: len(SHAPES), _DIRECTION: len(DIRECTIONS)}
        colour, shape, direction = ((self._uniform(index, p) * n).long() for p, n in sizes.items())
        return colour, shape, direction

    def _uniform(self, index: Tensor, purpose: int) -> Tensor:
        key = _mix(_mix(torch.full_like(index, self.seed)) + purpose)
        return _top_bits(_mix(key + index))


def _signed_distance(x: Tensor, y: Tensor, shape: Tensor, radius: Tensor) -> Tensor:
    """Distance of points [B, T, H, W] to the outline, negative inside; each shape fills [-radius, radius]^2."""
    r = radius[:, None, None, None]
    circle = (x.square() + y.square()).sqrt() - r
    square = torch.maximum(x.abs(), y.abs()) - r
    # Apex (0, -r), base from (-r, r) to (r, r).
    triangle = torch.maximum(y - r, (2 * x.abs() - (y + r)) / 5**0.5)
    pick = shape[:, None, None, None]
    return torch.where(pick == 0, circle, torch.where(pick == 1, square, triangle))


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's >> copies the sign)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """One splitmix64 step (Steele et al. 2014) on int64, whose products wrap modulo 2^64."""
    value = value - 0x61C8864680B583EB  # + 0x9E3779B97F4A7C15 modulo 2^64
    value = (value ^ _shift(value, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    value = (value ^ _shift(value, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return value ^ _shift(value, 31)


def _top_bits(value: Tensor) -> Tensor:
    """Uniform float64 in [0, 1) from the upper 53 bits."""
    return _shift(value, 11).double() * 2.0**-53
