"""The world's metrics: real clips score near 1, and each kind of fault lowers what it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mirai_dist.config import schema
from mirai_dist.data.world import BACKGROUND, World
from mirai_dist.evaluate.world_metrics import _score, measure
from mirai_dist.models.vae import LinearVae

VIDEO = schema.Video(latent_frames=12, frames_per_segment=3, latent_height=4, latent_width=4)
RECIPE = schema.World(speed=1.5, radius=4.5)
WORLD = World(RECIPE, VIDEO, seed=8)
COUNT = 48
CLIPS = WORLD.clips(range(COUNT))
CAPTIONS = WORLD.captions(range(COUNT))
VAE = LinearVae()
DECODED = VAE.decode(VAE.encode(CLIPS))


def metrics(videos: Tensor, captions: list[str] = CAPTIONS) -> dict[str, Tensor]:
    return measure(videos, captions, VIDEO, RECIPE)


@pytest.fixture(scope="module")
def real() -> dict[str, Tensor]:
    return metrics(DECODED)


def swap_word(captions: list[str], words: tuple[str, ...]) -> list[str]:
    """Each caption with its word out of `words` replaced by the next one."""
    following = dict(zip(words, (*words[1:], words[0]), strict=True))
    return [" ".join(following.get(word, word) for word in caption.split()) for caption in captions]


@pytest.mark.parametrize(
    ("recipe", "frames"),
    [
        (RECIPE, 12),
        (replace(RECIPE, radius=4.0, radius_jitter=0.5), 12),
        (replace(RECIPE, level="bounce"), 24),
        (RECIPE, 24),
    ],
)
@pytest.mark.parametrize("decoded", [False, True])
def test_real_clips_score_near_one(recipe: schema.World, frames: int, decoded: bool) -> None:
    world = World(recipe, VIDEO, seed=8)
    clips = world.clips(range(24), frames)
    videos = VAE.decode(VAE.encode(clips)) if decoded else clips
    found = measure(videos, world.captions(range(24)), VIDEO, recipe)
    for name in ("colour", "shape", "direction", "presence", "displacement", "motion", "identity", "score"):
        assert found[name].mean() > 0.95, name
        assert found[name].min() > 0.85, name
    assert found["displacement"].max() < 1.05 and found["smoothness"].min() > 0.85
    assert found["boundary_jump"].max() < 0.25 and (found["saturation"] - 1).abs().max() < 0.1
    assert found["clipped"].max() < 0.02
    assert all(v.shape == (24,) and v.dtype == torch.float32 and v.isfinite().all() for v in found.values())


def test_static_video_scores_low(real: dict[str, Tensor]) -> None:
    still = metrics(DECODED[:, :1].expand_as(DECODED))
    assert still["score"].max() < 0.1
    assert still["direction"].sum() == 0 and still["motion"].max() < 0.05
    assert still["colour"].mean() == 1 and still["shape"].mean() > 0.9  # the fault is the motion's alone
    slow = DECODED[:, [0, *(1 + (i // 2) for i in range(44))]]
    half = metrics(slow)
    assert (half["displacement"] - 0.5).abs().max() < 0.1 and (half["motion"] - 0.5).abs().max() < 0.1
    assert half["score"].max() < 0.65


def test_time_reversed_video_goes_the_wrong_way() -> None:
    backwards = metrics(DECODED.flip(1))
    assert backwards["direction"].sum() == 0
    assert (backwards["displacement"] + 1).abs().max() < 0.1
    assert backwards["motion"].min() > 0.9 and backwards["score"].max() < 0.1


@pytest.mark.parametrize(
    ("name", "words"),
    [("colour", ("red", "green", "blue", "yellow")), ("shape", ("circle", "square", "triangle"))],
)
def test_wrong_word_lowers_its_own_metric(real: dict[str, Tensor], name: str, words: tuple[str, ...]) -> None:
    found = metrics(DECODED, swap_word(CAPTIONS, words))
    assert found[name].sum() == 0
    others = {"colour", "shape", "direction"} - {name}
    assert all(found[other].mean() == 1 for other in others)
    assert (found["score"] < 0.75 * real["score"]).all()


def test_wrong_direction_scores_nothing() -> None:
    found = metrics(DECODED, swap_word(CAPTIONS, ("left", "up", "right", "down")))
    assert found["direction"].sum() == 0 and found["displacement"].abs().max() < 0.1 and found["score"].max() < 0.1


def test_blurred_video_is_clearly_below(real: dict[str, Tensor]) -> None:
    padded = torch.nn.functional.pad(DECODED.flatten(0, 1), (1, 1, 1, 1), mode="replicate")
    blurred = metrics(torch.nn.functional.avg_pool2d(padded, 3, 1).view_as(DECODED))
    assert (blurred["sharpness"] < 0.85 * real["sharpness"]).all()
    assert blurred["score"].mean() < 0.8 * real["score"].mean()


def test_jump_at_a_segment_boundary_is_found_there_alone(real: dict[str, Tensor]) -> None:
    def shifted(first_latent: int) -> dict[str, Tensor]:
        videos = CLIPS.clone()
        start = 1 + 4 * (first_latent - 1)
        videos[:, start:] = videos[:, start:].roll(2, 4)
        videos = VAE.decode(VAE.encode(videos))
        near_wall = (CLIPS[:, :, :, :, -4:] > BACKGROUND + 0.1).flatten(1).any(1)  # rolled around the edge
        return {name: value[~near_wall] for name, value in metrics(videos).items()}

    at, off = shifted(6), shifted(7)
    assert (at["boundary_jump"] - 2 / 3).abs().max() < 0.2  # 2 pixels at one of three boundaries
    assert off["boundary_jump"].max() < 0.25
    assert at["smoothness"].mean() < 0.8 and at["score"].mean() < 0.75 * real["score"].mean()


def test_changing_identity_is_found(real: dict[str, Tensor]) -> None:
    recoloured = DECODED.clone()
    recoloured[:, 24:] = recoloured[:, 24:].roll(1, 2)
    assert metrics(recoloured)["identity"].max() < 0.8
    fading = BACKGROUND + (DECODED - BACKGROUND) * torch.linspace(1.1, 0.5, 45)[:, None, None, None]
    faded = metrics(fading)
    assert (faded["identity"] < real["identity"] - 0.1).all()


def test_oversaturation_and_noise_are_seen(real: dict[str, Tensor]) -> None:
    strong = metrics((BACKGROUND + 1.3 * (DECODED - BACKGROUND)).clamp(-1, 1))
    assert (strong["saturation"] > real["saturation"] + 0.03).all() and (strong["clipped"] > real["clipped"]).all()
    assert strong["score"].mean() < real["score"].mean() - 0.03
    noise = 0.15 * torch.randn(DECODED.shape, generator=torch.Generator().manual_seed(0))
    noisy = metrics((DECODED + noise).clamp(-1, 1))
    assert noisy["sharpness"].min() > 1.5 and noisy["score"].mean() < 0.6
    assert noisy["direction"].mean() > 0.95 and noisy["colour"].mean() == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence", 0.5),
        ("colour", 0.0),
        ("shape", 0.0),
        ("direction", 0.0),
        ("displacement", 0.5),
        ("displacement", 1.5),
        ("smoothness", 0.5),
        ("boundary_jump", 1.5),
        ("identity", 0.5),
        ("sharpness", 0.6),
        ("sharpness", 2.0),
        ("saturation", 0.6),
        ("saturation", 1.6),
    ],
)
def test_every_fault_lowers_the_score(real: dict[str, Tensor], name: str, value: float) -> None:
    faulty = {**real, name: torch.full_like(real[name], value)}
    assert (_score(faulty, RECIPE) < 0.8 * real["score"]).all()


def test_two_objects_are_not_one() -> None:
    start = WORLD.states(range(COUNT)).centres[:, 0]
    far = (start - start.roll(1, 0)).norm(dim=-1)
    both = metrics(torch.maximum(DECODED, DECODED.roll(1, 0)))
    assert both["presence"][far > 16].max() < 0.9
    assert both["score"][far > 16].mean() < 0.4


@pytest.mark.parametrize("value", [BACKGROUND, -1.0, 1.0])
def test_blank_videos_score_nothing_without_crashing(value: float) -> None:
    found = metrics(torch.full((2, 45, 3, 32, 32), value), CAPTIONS[:2])
    assert all(v.isfinite().all() for v in found.values())
    assert found["score"].max() == 0 and found["presence"].max() < 0.5


def test_pure_noise_scores_nothing() -> None:
    videos = torch.randn(4, 45, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    found = metrics(videos, CAPTIONS[:4])
    assert found["score"].max() < 0.05


def test_a_clip_is_measured_alone(real: dict[str, Tensor]) -> None:
    alone = metrics(DECODED[5:6], CAPTIONS[5:6])
    assert all(torch.allclose(alone[name], real[name][5:6], atol=1e-4) for name in real)


def test_refusals() -> None:
    broken = DECODED[:2].clone()
    broken[1, 3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="video 1 holds non-finite"):
        metrics(broken, CAPTIONS[:2])
    with pytest.raises(ValueError, match="2 videos but 1 captions"):
        metrics(DECODED[:2], CAPTIONS[:1])
    with pytest.raises(ValueError, match="cannot be measured"):
        metrics(DECODED[:2, :44], CAPTIONS[:2])
    with pytest.raises(ValueError, match="pillar"):
        measure(DECODED[:2], CAPTIONS[:2], VIDEO, replace(RECIPE, level="occlusion"))
