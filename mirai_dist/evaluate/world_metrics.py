"""Quality of generated videos of the procedural world, measured against its known laws.

The object is found in each frame, its colour, shape and size are recognised, and its path is compared with the
path the world would have given it from where it starts. No reference video is needed, and a video may have any
length: after the training length the expected path bounces off the walls, as the world's does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirai_dist.config import schema
from mirai_dist.data.world import (
    BACKGROUND,
    FRAMES_PER_LATENT,
    PIXELS_PER_LATENT,
    RGB,
    SHAPES,
    UNIT,
    States,
    coverage,
    parse_caption,
    pixel_frames,
    render,
    walk,
)
from mirai_dist.models.vae import LinearVae

LEAST_FRAMES = 4  # latent frames below which a path is too short to measure
FAINT = 0.25  # coverage below this is background: ringing of the VAE and mild noise
CLIPPED = 0.99  # a value this close to -1 or 1 counts as clipped; no colour of the world is
OBEYED = 0.25  # share of the real displacement from which a direction counts as taken
SAME_PATH = 0.5  # mean distance, pixels, up to which two paths count as equal
SIZES = tuple(0.7 + 0.1 * i for i in range(7))  # tried radii, relative to the recipe's
RINGING = 4.0  # pixels around the largest shape that hold its decoded picture, ringing of the VAE included
FRINGE = 1.5  # pixels around it that still hold its foreground
# What real clips show of each deviation too, with and without the VAE: no fault, so not counted in the score.
FREE_IDENTITY, FREE_ROUGHNESS, FREE_JUMP, FREE_SHARPNESS = 0.08, 0.12, 0.1, 0.35


@dataclass(frozen=True)
class _Track:
    """The object found in B clips of T frames."""

    foreground: Tensor  # [B, T, H, W] coverage, 0 where faint
    mass: Tensor  # [B, T] pixels covered in the neighbourhood of the object
    colour: Tensor  # [B, T, 3] contrast of the object to the background, its mean scaled to 1
    states: States  # best explanation; centres are the box centres of the recognised shape


def measure(videos: Tensor, captions: Sequence[str], video: schema.Video, world: schema.World) -> dict[str, Tensor]:
    """Metrics [B] float32 of pixel videos [B, T, 3, H, W] in [-1, 1] with their captions.

    colour, shape, direction: 1 where the caption is obeyed. displacement: progress along the caption's path relative
    to the real one. motion: length of the path relative to the real one. smoothness: 1 less the mean second
    difference of the path, in real steps per latent frame, clamped to [0, 1]. boundary_jump: how far, in pixels, the
    steps across segment boundaries deviate from the clip's usual ones. identity: constancy of colour and size,
    [0, 1]. sharpness: gradient energy relative to the same object through the VAE; above 1 is noise. saturation:
    contrast of the object relative to the real colour. clipped: share of clipped values. presence: share of the
    picture's foreground that is one object of at least half the smallest area.

    score in [0, 1]: presence * mean(colour, shape, direction) * pace * smoothness * continuity * identity * look, with
    pace = 1 - |displacement - 1|, continuity = 1 / (1 + boundary_jump / speed) and look the product of sharpness
    and saturation, each inverted where above 1. Deviations that real clips show too (FREE_*) are not counted.

    ValueError: shapes that do not fit, foreign captions, non-finite pixels, level occlusion.
    """
    _check(videos, captions, video, world)
    wanted = torch.tensor([parse_caption(caption) for caption in captions])
    track = _find(videos.detach().cpu().float(), world)
    out = {
        "colour": track.states.colour == wanted[:, 0],
        "shape": track.states.shape == wanted[:, 1],
        "presence": _presence(track, world),
        "clipped": (videos.abs() >= CLIPPED).float().mean(dim=(1, 2, 3, 4)).cpu(),
        "identity": _identity(track),
        **_path(track, wanted[:, 2], video, world),
        **_picture(videos.detach().cpu().float(), track),
    }
    seen = track.foreground.flatten(1).sum(1) > 0
    out = {name: torch.where(seen, value.double(), 0.0).float() for name, value in out.items()}
    return {**out, "score": _score(out, world)}


def _check(videos: Tensor, captions: Sequence[str], video: schema.Video, world: schema.World) -> None:
    size = (3, PIXELS_PER_LATENT * video.latent_height, PIXELS_PER_LATENT * video.latent_width)
    frames = videos.shape[1] if videos.ndim == 5 else 0
    if tuple(videos.shape[2:]) != size or frames % FRAMES_PER_LATENT != 1 or frames < pixel_frames(LEAST_FRAMES):
        raise ValueError(
            f"videos of shape {tuple(videos.shape)} cannot be measured: need [B, T, {size[0]}, {size[1]}, {size[2]}] "
            "with T = 1 + 4 (F - 1) and at least 4 latent frames F"
        )
    if len(captions) != len(videos):
        raise ValueError(f"{len(videos)} videos but {len(captions)} captions")
    if world.level == "occlusion":
        raise ValueError("world_metrics cannot follow a shape behind the pillar: use world.level free or bounce")
    finite = videos.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"video {int((~finite).nonzero()[0])} holds non-finite pixels")


def _find(videos: Tensor, world: schema.World) -> _Track:
    """Locate and recognise the one object of each video."""
    contrast = RGB - BACKGROUND  # [4, 3]
    excess = videos - BACKGROUND  # [B, T, 3, H, W]
    bright = excess.mean(2)  # [B, T, H, W]
    foreground = torch.where(bright > FAINT * contrast.mean(), bright, 0.0)
    largest = world.radius + world.radius_jitter
    window = _window(_centre(foreground), largest + RINGING, bright.shape[-2:])
    # Inside the window nothing is thresholded: block means and first moments, and with them mass and centre,
    # survive the linear VAE, while a threshold would turn its ringing into jitter.
    inside = bright * window
    centre = _centre(inside)
    hue = (excess * window[:, :, None]).sum(dim=(3, 4))  # [B, T, 3]
    colour = torch.cosine_similarity(hue.sum(1)[:, None], contrast[None], dim=-1).argmax(1)
    full = contrast.mean(1)[colour]  # [B]
    shape, radius = _recognise(videos, centre, colour, world)
    states = States(_box(centre, shape, radius), colour, shape, torch.zeros_like(shape), radius)
    return _Track(
        foreground=foreground / full[:, None, None, None],
        mass=inside.sum(dim=(2, 3)) / full[:, None],
        colour=hue / hue.mean(-1, keepdim=True).clamp_min(1e-3),
        states=states,
    )


def _centre(weight: Tensor) -> Tensor:
    """[B, T, 2] float64 centre of mass (x, y), pixels, of [B, T, H, W]; the picture's middle without positive mass."""
    height, width = weight.shape[-2:]
    total = weight.sum(dim=(2, 3)).double()[..., None]
    x = (weight.sum(2).double() * (torch.arange(width) + 0.5)).sum(-1)
    y = (weight.sum(3).double() * (torch.arange(height) + 0.5)).sum(-1)
    size = torch.tensor([width, height], dtype=torch.float64)
    centre = torch.stack([x, y], -1) / total.clamp_min(1e-6)
    return torch.where(total > 1, torch.minimum(centre.clamp_min(0), size), size / 2)


def _window(centre: Tensor, half_extent: float, size: tuple[int, ...]) -> Tensor:
    """[B, T, H, W] in [0, 1]: a soft square around `centre`."""
    square = torch.full((len(centre),), SHAPES.index("square"))
    half = torch.full((len(centre),), half_extent, dtype=torch.float64)
    return coverage(States(centre, square, square, square, half), size[0], size[1])


def _box(centre: Tensor, shape: Tensor, radius: Tensor) -> Tensor:
    """Box centre from the centre of mass, which for a triangle lies a third of its half extent lower."""
    lower = torch.where(shape == SHAPES.index("triangle"), radius / 3, 0.0)
    return centre - torch.stack([torch.zeros_like(lower), lower], -1)[:, None]


def _recognise(videos: Tensor, centre: Tensor, colour: Tensor, world: schema.World) -> tuple[Tensor, Tensor]:
    """Shape id and radius [B] whose picture is nearest in one frame of every second latent frame.

    Pictures are compared as single-frame latents: outside the VAE's 16 channels a decoded shape differs from a
    drawn one more than two shapes differ from each other.
    """
    vae = LinearVae()
    height, width = videos.shape[-2:]
    stride = 2 * FRAMES_PER_LATENT
    frames, centre = videos[:, 2::stride], centre[:, 2::stride]
    batch = len(frames)
    seen = vae.encode(frames.flatten(0, 1)[:, None])
    errors = torch.empty(len(SHAPES), len(SIZES), batch)
    for kind in range(len(SHAPES)):
        for row, size in enumerate(SIZES):
            shape = torch.full((batch,), kind)
            radius = torch.full((batch,), world.radius * size, dtype=torch.float64)
            drawn = render(States(_box(centre, shape, radius), colour, shape, shape, radius), height, width)
            error = (vae.encode(drawn.flatten(0, 1)[:, None]) - seen).square()
            errors[kind, row] = error.reshape(batch, -1).mean(1)
    shape = errors.min(1).values.argmin(0)
    sizes = _valley(errors[shape, :, torch.arange(batch)].double())
    return shape, world.radius * (SIZES[0] + sizes * (SIZES[1] - SIZES[0]))


def _valley(errors: Tensor) -> Tensor:
    """[B] float64 position of the smallest of errors [B, N], refined by the parabola through its neighbours."""
    rows = torch.arange(len(errors))
    lowest = errors.argmin(1).clamp(1, errors.shape[1] - 2)
    before, at, after = errors[rows, lowest - 1], errors[rows, lowest], errors[rows, lowest + 1]
    bend = (before - 2 * at + after).clamp_min(1e-12)
    return lowest + (0.5 * (before - after) / bend).clamp(-1, 1)


def _presence(track: _Track, world: schema.World) -> Tensor:
    """[B] mean over frames of (share of the foreground in one window) * (foreground there / least area, at most 1)."""
    size = track.foreground.shape[-2:]
    window = _window(track.states.centres, world.radius + world.radius_jitter + FRINGE, size)
    inside = (track.foreground * window).sum(dim=(2, 3))
    # Half the area of the smallest shape, a triangle: the size may be wrong, but something must be there.
    least = (world.radius - world.radius_jitter) ** 2
    share = inside / track.foreground.sum(dim=(2, 3)).clamp_min(1e-6)
    return (share * (inside / least).clamp_max(1)).mean(1)


def _identity(track: _Track) -> Tensor:
    """[B] one less the mean deviation over time of the object's colour and area from their medians."""
    colour, area = track.colour, track.mass
    usual_colour, usual_area = colour.median(1, keepdim=True).values, area.median(1, keepdim=True).values
    off_colour = (colour - usual_colour).norm(dim=-1) / usual_colour.norm(dim=-1).clamp_min(1e-6)
    off_area = (area - usual_area).abs() / usual_area.clamp_min(1e-6)
    return (1 - (off_colour + off_area).mean(1)).clamp(0, 1)


def _path(track: _Track, direction: Tensor, video: schema.Video, world: schema.World) -> dict[str, Tensor]:
    """Metrics of the path, against the four paths the world has from the measured start."""
    path = track.states.centres
    paths = torch.stack([_real_path(track, unit, video, world) for unit in UNIT])
    away, real_away = path - path[:, :1], paths - paths[:, :, :1]
    error = (real_away - away).norm(dim=-1).mean(-1)  # [4, B]
    real = paths[direction, torch.arange(len(path))]
    progress = _progress(path, real)
    steps, real_steps = _latent_means(path).diff(dim=1), _latent_means(real).diff(dim=1)
    bend = (steps.diff(dim=1) - real_steps.diff(dim=1)).norm(dim=-1).mean(1) / world.speed
    # Step i leads from latent frame i + 1 to i + 2; the clip's usual deviation (a wrong speed, say) is no jump.
    off = steps - real_steps
    off = off - off.median(1, keepdim=True).values
    opens = torch.arange(1, steps.shape[1] + 2)
    boundaries = (opens % video.frames_per_segment == 0)[1:]
    jump = off.norm(dim=-1)[:, boundaries]
    return {
        # A start at the wall it runs into makes two directions the same path: both are right.
        "direction": (error[direction, torch.arange(len(path))] <= error.amin(0) + SAME_PATH) & (progress >= OBEYED),
        "displacement": progress,
        "motion": steps.norm(dim=-1).sum(1) / real_steps.norm(dim=-1).sum(1),
        "smoothness": (1 - bend).clamp(0, 1),
        "boundary_jump": jump.mean(1) if jump.shape[1] else torch.zeros(len(path)),
    }


def _real_path(track: _Track, unit: Tensor, video: schema.Video, world: schema.World) -> Tensor:
    """[B, T, 2] centres the world would give along `unit` from the measured start, moved inside the legal starts."""
    path, radius = track.states.centres, track.states.radius[:, None]
    size = torch.tensor([video.latent_width, video.latent_height]) * PIXELS_PER_LATENT
    room = size - 2 * radius
    low, high = torch.zeros_like(room), room
    if world.level == "free":
        travel = world.speed * (video.latent_frames - 1) * unit
        low, high = low - travel.clamp_max(0), high - travel.clamp_min(0)
    start = torch.minimum(torch.maximum(path[:, 0] - radius, low), high)
    return radius[:, None] + walk(start, unit.expand(len(path), 2), world.speed, room, path.shape[1])


def _progress(path: Tensor, real: Tensor) -> Tensor:
    """[B] signed length of `path` along the momentary direction of `real`, relative to the length of `real`."""
    steps = real.diff(dim=1)
    unit = torch.nn.functional.normalize(steps, dim=-1)
    return (path.diff(dim=1) * unit).sum(dim=(1, 2)) / steps.norm(dim=-1).sum(1)


def _latent_means(path: Tensor) -> Tensor:
    """[B, F - 1, 2] mean centre of each whole group of four frames: even in time, with less pixel noise."""
    return path[:, 1:].unflatten(1, (-1, FRAMES_PER_LATENT)).mean(2)


def _picture(videos: Tensor, track: _Track) -> dict[str, Tensor]:
    """Sharpness and saturation relative to the recognised object as the world draws it and the VAE shows it."""
    height, width = videos.shape[-2:]
    vae = LinearVae()
    drawn = render(track.states, height, width)
    area = coverage(track.states, height, width).sum(dim=(1, 2, 3))
    strength = track.mass.sum(1) / area
    real = _gradient_energy(vae.decode(vae.encode(drawn)))
    # Relative to its own contrast: a pale but crisp object is sharp.
    sharpness = (_gradient_energy(videos) / real).sqrt() / strength.clamp_min(1e-3)
    return {"sharpness": sharpness, "saturation": strength}


def _gradient_energy(videos: Tensor) -> Tensor:
    """[B] sum of squared differences of neighbouring pixels; blur lowers it, unlike the sum of absolute ones."""
    rows, columns = videos.diff(dim=3).square(), videos.diff(dim=4).square()
    return rows.sum(dim=(1, 2, 3, 4)) + columns.sum(dim=(1, 2, 3, 4))


def _score(m: dict[str, Tensor], world: schema.World) -> Tensor:
    """[B] in [0, 1]; the formula is in `measure`."""
    text = (m["colour"] + m["shape"] + m["direction"]) / 3
    pace = (1 - (m["displacement"] - 1).abs()).clamp(0, 1)
    smoothness = (m["smoothness"] + FREE_ROUGHNESS).clamp_max(1)
    continuity = 1 / (1 + (m["boundary_jump"] - FREE_JUMP).clamp_min(0) / world.speed)
    identity = (m["identity"] + FREE_IDENTITY).clamp_max(1)
    strength, sharp = m["saturation"].clamp_min(0), m["sharpness"]
    # Up to FREE_SHARPNESS above 1 is a clip that never went through the VAE.
    sharp = torch.where(sharp > 1, (sharp - FREE_SHARPNESS).clamp_min(1), sharp)
    look = torch.minimum(sharp, 1 / sharp.clamp_min(1e-6)) * torch.minimum(strength, 1 / strength.clamp_min(1e-6))
    return m["presence"] * text * pace * smoothness * continuity * identity * look
