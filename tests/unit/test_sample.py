"""The sampler: the same video as a rollout, as an iterator of frames; how long, through which window, and how fast."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mirai_dist import sample
from mirai_dist.config import RecipeError, load
from mirai_dist.config.schema import Recipe
from mirai_dist.cycle.roles import causal
from mirai_dist.method.rollout import RolloutInputs, RolloutSettings, SegmentNetwork, rollout
from mirai_dist.models.vae import LinearVae
from mirai_dist.models.wan import KVCache, WanShape
from mirai_dist.models.wan.kv_cache import CacheShape
from mirai_dist.sample import Request, Sampler, Timing, latent_frames, summary, window_of
from mirai_dist.state.draws import Draws
from tests import tiny_wan

SMALL = Path(__file__).parent / "data" / "small.yaml"
CPU = torch.device("cpu")
SHAPE = WanShape(dim=40, ffn_dim=48, heads=2, blocks=2, text_dim=10, channels=16, freq_dim=16)
STEPS = (1000.0, 700.0, 300.0)
LENGTH = 2  # frames a segment, unless a test says otherwise


def draws(seed: int) -> Draws:
    return Draws(seed, CPU)


def sampler(length: int = LENGTH, window: int = 0, sink: int = 0, frames: int = 6, **changed: Any) -> Sampler:
    """A sampler of a tiny random network; latents of 4 x 6, pictures of 32 x 48."""
    past = window - length if window else 0
    cache = CacheShape(SHAPE.blocks, 1, past or frames - length, length, 6, 2, 20, sink, past)
    parts: dict[str, Any] = {
        "generator": causal(tiny_wan.wan(3, torch.float32, SHAPE)),
        "settings": RolloutSettings(STEPS, length, 100.0),
        "cache": KVCache(cache, CPU, torch.float32),
        "vae": LinearVae(),
        "draws": draws,
        "latent_shape": (16, 4, 6),
        "latent_frames": frames,
        "device": CPU,
    }
    return Sampler(**{**parts, **changed})


def text(seed: int = 2) -> Tensor:
    return tiny_wan.prompts(seed, 1, torch.float32)


def whole_noise(seed: int, length: int, frames: int, noises: int = 4) -> Tensor:
    """The noise of a video in one tensor."""
    segments = [
        torch.stack([draws(seed).normal("sample", i, step, [0], (length, 16, 4, 6)) for step in range(noises)])
        for i in range(frames // length)
    ]
    return torch.cat(segments, dim=2)


@torch.no_grad()
@pytest.mark.parametrize(("length", "window", "sink"), [(1, 0, 0), (2, 0, 0), (2, 4, 2), (1, 3, 1)])
def test_frames_are_those_of_a_rollout_bit_for_bit(length: int, window: int, sink: int) -> None:
    ours = sampler(length, window, sink)
    frames = torch.stack(list(ours.frames(text(), seed=7)))
    inputs = RolloutInputs(whole_noise(7, length, 6), text(), exit_step=2)
    latents, _ = rollout(ours.generator, ours.settings, inputs, ours.cache)
    assert frames.shape == (21, 3, 32, 48)
    assert torch.equal(frames, ours.vae.decode(latents)[0])


@torch.no_grad()
@pytest.mark.parametrize("first", [(1000.0, 900.0, 700.0, 300.0), (1000.0,)])
def test_the_first_segment_goes_through_all_of_its_own_steps(first: tuple[float, ...]) -> None:
    settings = RolloutSettings((1000.0, 500.0), LENGTH, 100.0, first_timesteps=first)
    ours = sampler(settings=settings)
    frames = torch.stack(list(ours.frames(text(), seed=7)))
    noise = whole_noise(7, LENGTH, 6, max(2, len(first)) + 1)
    inputs = RolloutInputs(noise, text(), exit_step=1, first_exit_step=len(first) - 1)
    latents, _ = rollout(ours.generator, settings, inputs, ours.cache)
    assert torch.equal(frames, ours.vae.decode(latents)[0])
    plain, _ = rollout(
        ours.generator,
        RolloutSettings(first, LENGTH, 100.0),
        RolloutInputs(noise[[*range(len(first)), -1], :, :LENGTH], text(), exit_step=len(first) - 1),
        ours.cache,
    )
    assert torch.equal(latents[:, :LENGTH], plain)


@torch.no_grad()
def test_what_follows_a_given_image_uses_the_common_steps() -> None:
    settings = RolloutSettings(STEPS, 1, 100.0, first_timesteps=(1000.0,))
    ours, common = sampler(length=1, frames=4, settings=settings), sampler(length=1, frames=4)
    image = ours.vae.encode(torch.full((1, 1, 3, 32, 48), 0.5))
    one, other = (list(each.frames(text(), seed=3, given=image)) for each in (ours, common))
    assert all(map(torch.equal, one, other))


def test_pieces_come_segment_by_segment_and_noise_with_them() -> None:
    asked: list[tuple[int, int]] = []

    class Counting(Draws):
        def normal(self, purpose: str, cycle: int, position: int, *rest: Any) -> Tensor:
            asked.append((cycle, position))
            return super().normal(purpose, cycle, position, *rest)

    ours = sampler(draws=lambda seed: Counting(seed, CPU))
    pieces = ours.pieces(Request(text(), 7, 6))
    assert next(pieces).shape == (5, 3, 32, 48)  # 1 + 4
    assert asked == [(0, step) for step in range(4)]
    assert next(pieces).shape == (8, 3, 32, 48)
    assert {segment for segment, _ in asked} == {0, 1}
    assert [len(piece) for piece in pieces] == [8]


def test_a_stream_left_early_leaves_nothing_behind() -> None:
    ours = sampler(window=4, sink=2)
    alone = list(sampler(window=4, sink=2).frames(text(5), seed=1, latent_frames=20))
    for _ in itertools.islice(ours.frames(text(), seed=7, latent_frames=20), 30):
        pass
    after = list(ours.frames(text(5), seed=1, latent_frames=20))
    assert len(after) == 77 and all(map(torch.equal, after, alone))
    assert torch.is_grad_enabled()


def test_the_seed_and_nothing_else_makes_the_noise() -> None:
    ours = sampler()
    one, again, other = (torch.stack(list(ours.frames(text(), seed))) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert (one - other).abs().mean() > 0.01
    longer = torch.stack(list(sampler(frames=8).frames(text(), seed=1)))
    assert torch.equal(longer[:21], one)  # a longer video begins as a shorter one


@torch.no_grad()
def test_a_given_image_is_the_first_frame_and_changes_the_rest() -> None:
    ours = sampler(length=1, frames=4)
    images = [ours.vae.encode(torch.full((1, 1, 3, 32, 48), level)) for level in (-0.5, 0.5)]
    videos = [torch.stack(list(ours.frames(text(), seed=3, given=image))) for image in images]
    inputs = RolloutInputs(whole_noise(3, 1, 4), text(), exit_step=2, given=images[0])
    latents, _ = rollout(ours.generator, ours.settings, inputs, ours.cache)
    assert torch.equal(videos[0], ours.vae.decode(latents)[0])
    assert torch.equal(videos[0][0], ours.vae.decode(images[0])[0, 0])
    assert (videos[0][1:] - videos[1][1:]).abs().mean() > 1e-3


@pytest.mark.parametrize(
    ("frames", "window", "what"),
    [
        (0, 0, "a video of 0 latent frames is not a whole number of segments of 2"),
        (5, 0, "a video of 5 latent frames is not a whole number of segments of 2"),
        (-2, 0, "a video of -2 latent frames"),
        (8, 0, "8 latent frames need a window: the cache holds 4 and has none"),
        (1026, 4, "1026 latent frames are past Wan's 1024 rotary positions"),
    ],
)
def test_lengths_that_cannot_be_are_refused(frames: int, window: int, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        next(sampler(window=window).frames(text(), seed=1, latent_frames=frames))


def test_the_last_position_that_wan_has_is_reached() -> None:
    def still(latent: Tensor, timesteps: Tensor, text: Tensor, past: Any, capture: int) -> Any:
        return SimpleNamespace(velocity=latent, hidden=None, keys_values=None, text_keys_values=None)

    ours = sampler(length=512, window=1024, generator=still)
    assert sum(len(piece) for piece in ours.pieces(Request(text(), 1, 1024))) == 4093


# --- how long things take ------------------------------------------------------------------------------------

DENOISE, CONTEXT, DECODE, ENCODE, READER = 1.0, 10.0, 100.0, 1000.0, 1e6


class Clock:
    """Time that passes only in what a test lets take time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def generator(self, inner: SegmentNetwork) -> Callable[..., Any]:
        def call(latent: Tensor, timesteps: Tensor, *rest: Any) -> Any:
            self.now += CONTEXT if timesteps[0] == 100 else DENOISE
            return inner(latent, timesteps, *rest)

        return call

    def vae(self) -> Any:
        vae = LinearVae()
        decoder = vae.stream()

        def decode(latents: Tensor) -> Tensor:
            self.now += DECODE
            return decoder(latents)

        return SimpleNamespace(stream=lambda: decode)


@pytest.mark.parametrize("image", [False, True])
def test_what_counts_into_latency_and_throughput(monkeypatch: pytest.MonkeyPatch, image: bool) -> None:
    clock, inner = Clock(monkeypatch), sampler(length=1, frames=4)
    ours = sampler(length=1, frames=4, generator=clock.generator(inner.generator), vae=clock.vae())
    timing = Timing(text=ENCODE)
    given = inner.vae.encode(torch.zeros(1, 1, 3, 32, 48)) if image else None
    for _ in ours.pieces(Request(text(), 1, 4, given), timing):
        clock.now += READER  # whoever reads the stream takes his time
    denoised = 3 if image else 4
    assert timing.pixel_frames == 13
    assert timing.latency == 3 * DENOISE  # not the context pass of the image, not text, not the VAE
    assert timing.generation == denoised * 3 * DENOISE + 3 * CONTEXT  # the last segment has no context pass
    assert timing.decoding == 4 * DECODE
    assert timing.first_frame == ENCODE + (CONTEXT if image else 3 * DENOISE) + DECODE
    assert timing.fps == 13 / (ENCODE + timing.generation)
    assert timing.fps_with_vae == 13 / (ENCODE + timing.generation + timing.decoding)


def test_the_summary_is_the_median_without_the_warm_up() -> None:
    latencies = {"a": 90, "b": 3, "c": 1, "d": 2}
    videos = {name: Timing(1.0, latency, 9.0, 10.0, latency + 2, 20) for name, latency in latencies.items()}
    found = summary(videos, warm_up=["a"])
    assert found == {
        "latency_seconds": 2,
        "frames_per_second": 2.0,
        "first_frame_seconds": 4,
        "frames_per_second_with_vae": 1.0,
        "text_seconds": 1.0,
    }
    assert summary(videos)["latency_seconds"] == 2.5
    assert summary({"a": videos["a"]}, warm_up=["a"])["latency_seconds"] == 90  # the only one is better than none


# --- how many frames, seen through which window --------------------------------------------------------------


def recipe(*overrides: str) -> Recipe:
    return load(SMALL, list(overrides)).recipe


@pytest.mark.parametrize(
    ("seconds", "length", "frames"),
    [(5, 3, 21), (30, 3, 123), (5, 1, 21), (30, 1, 121), (0.01, 1, 1), (0.01, 3, 3), (81 / 16, 1, 21), (5.1, 1, 22)],
)
def test_the_shortest_whole_number_of_segments_that_lasts(seconds: float, length: int, frames: int) -> None:
    sizes = "video.latent_frames=21", f"video.frames_per_segment={length}", "video.fps=16"
    video = recipe("world.level=bounce", *sizes).video
    assert latent_frames(seconds, video) == frames
    assert latent_frames(None, video) == 21


def test_lengths_in_seconds_that_cannot_be_are_refused() -> None:
    video = recipe("video.fps=16").video  # segments of three
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="--seconds: .* is no length of a video"):
            latent_frames(seconds, video)
    with pytest.raises(RecipeError, match="300 s are 1203 latent frames, and Wan's positions end at 1024; use at most"):
        latent_frames(300, video)
    assert latent_frames(255, video) == 1023


@pytest.mark.parametrize(
    ("overrides", "frames", "asked", "expected"),
    [
        ([], 21, (None, None), (0, 0)),
        ([], 24, (None, None), (21, 3)),
        ([], 24, (None, 0), (21, 0)),
        ([], 24, (9, None), (9, 3)),
        ([], 24, (0, None), (0, 0)),
        ([], 21, (12, 6), (12, 6)),
        ([], 21, (12, None), (12, 0)),
        (["rollout.window_frames=12"], 21, (None, None), (12, 0)),
        (["rollout.window_frames=12"], 24, (None, None), (12, 3)),
        (["rollout.window_frames=12", "rollout.sink_frames=6"], 24, (None, None), (12, 6)),
        (["rollout.window_frames=12", "rollout.sink_frames=6"], 21, (0, None), (0, 0)),
    ],
)
def test_windows_of_long_videos(
    overrides: list[str], frames: int, asked: tuple[int | None, int | None], expected: tuple[int, int]
) -> None:
    assert window_of(recipe("world.level=bounce", "video.latent_frames=21", *overrides), frames, *asked) == expected
