"""Streaming causal sampling: a trained generator as an iterator of frames.

    from pathlib import Path
    from mirai_dist.commands.generator import Wish, opened

    made = opened(Wish(Path("runs/tiny-video-mirai"), seconds=30))
    text = made.text.encode(["a red circle moving left"])
    for frame in made.sampler.frames(text, seed=7):  # [3, H, W] in [-1, 1], as soon as its segment is finished
        show(frame)

The loop is training's own (`method.rollout.segments`): all denoising steps, stochastic re-noising, then the context
pass at `rollout.context_timestep` that fills the cache. The segment at frame 0 has its own step list where the
recipe gives one; a given image takes its place, and everything after it uses the common list. Noise is drawn when its
segment comes, keyed by (seed of the video, segment, step): which rank makes a video, in which order, after which
interruption, changes nothing.

What a segment attends to (frames are latent frames; L a segment, W the window, S the sinks, n the segment's first
frame, counted from 0):

- no window (W = 0): all frames 0 .. n - 1, and itself. The cache holds all frames.
- a window: W counts the present segment. While n + L <= W: all frames before, nothing differs from no window.
- once it has slid: the S first frames of the video (sinks), the newest W - L - S frames, and itself.
- positions: the segment and the newest frames keep their absolute positions in time. The sinks are shown at the S
  positions directly before the oldest of the newest frames, n - (W - L) .. n - (W - L) + S - 1, by rotating their
  stored keys again. So all of them lie where an unslid window has its frames, and no two tokens are ever further
  apart in time than W - 1 frames, as in a training rollout of W frames.
- the cache holds W frames whatever the length, the present segment among them: 2 x blocks x W x tokens a frame x
  width numbers.
- a video may have 1,024 latent frames (255 s at 16 fps): Wan's rotary table ends there, and so does ours.

A video that is longer than a training rollout slides a window by default: `rollout.window_frames`, else
`video.latent_frames`; sinks: `rollout.sink_frames`, else one segment. A shorter one uses the recipe's values.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mirai_dist.config import RecipeError, schema
from mirai_dist.method.rollout import DrawnNoise, RolloutInputs, RolloutSettings, SegmentNetwork, segments
from mirai_dist.models.vae import Vae
from mirai_dist.models.wan import KVCache
from mirai_dist.models.wan.rope import MAX_FRAMES


class Normal(Protocol):
    """Keyed standard normal noise (mirai_dist.state.draws.Draws)."""

    def normal(self, purpose: str, cycle: int, position: int, samples: Sequence[int], shape: Sequence[int]) -> Tensor:
        """[len(samples), *shape], a function of the arguments alone."""
        ...


@dataclass
class Timing:
    """Seconds that one video took. The device is idle at both ends of every interval.

    text: encoding the prompt. latency: the denoising steps of the first generated segment, nothing else.
    generation: all segments with their context passes (the last segment has none: nobody would read it).
    decoding: the VAE. first_frame: from the prompt to the first frame's pixels. Writing files is in none of them.
    """

    text: float = 0.0
    latency: float = 0.0
    generation: float = 0.0
    decoding: float = 0.0
    first_frame: float = 0.0
    pixel_frames: int = 0

    @property
    def fps(self) -> float:
        """Pixel frames a second of text encoding and all segments, VAE excluded."""
        return self.pixel_frames / (self.text + self.generation)

    @property
    def fps_with_vae(self) -> float:
        """Pixel frames a second with the VAE's time included."""
        return self.pixel_frames / (self.text + self.generation + self.decoding)


@dataclass(frozen=True)
class Request:
    """One video. text: [1, length, dim]; seed: of all its noise; given: latents [1, 1, C, h, w] of its first frame."""

    text: Tensor
    seed: int
    latent_frames: int
    given: Tensor | None = None


@dataclass(frozen=True)
class Sampler:
    """A generator network, batch one, with all it needs to stream videos.

    latent_shape: channels, rows, columns. latent_frames: length of a video unless a request says otherwise.
    draws: noise of a seed. device: where the network is.
    """

    generator: SegmentNetwork
    settings: RolloutSettings
    cache: KVCache
    vae: Vae
    draws: Callable[[int], Normal]
    latent_shape: tuple[int, int, int]
    latent_frames: int
    device: torch.device

    def frames(
        self, text: Tensor, seed: int, latent_frames: int | None = None, given: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Frames [3, H, W] in [-1, 1] of one video, each as soon as its segment is finished.

        text: embedding [1, length, dim] of the prompt. latent_frames: 1 + 4 (n - 1) frames come; default: the
        sampler's. given: latents [1, 1, C, h, w] of a first frame (image-to-video, frame-wise generators).
        Stop iterating whenever you like. One stream at a time: all share the cache. ValueError as in `pieces`.
        """
        request = Request(text, seed, self.latent_frames if latent_frames is None else latent_frames, given)
        for piece in self.pieces(request):
            yield from piece.unbind()

    @torch.no_grad()
    def pieces(self, request: Request, timing: Timing | None = None) -> Iterator[Tensor]:
        """Pixels [T, 3, H, W] in [-1, 1], segment by segment: T is 1 + 4 (L - 1) for the first, 4 L for later ones.

        `timing` is filled as the video proceeds. ValueError when the length is no whole number of segments, past
        Wan's 1,024 positions, or longer than a cache without a window was made for.
        """
        self._check(request)
        timing = Timing() if timing is None else timing
        decode, done = self.vae.stream(), 0
        given = 0 if request.given is None else request.given.shape[1]
        stream = segments(self.generator, self.settings, self._inputs(request), self.cache)
        before = self._now()
        while (segment := next(stream, None)) is not None:
            finished = self._now()
            timing.generation += finished - before
            if done <= given < done + segment.latents.shape[1]:  # the first one that is not given
                timing.latency = finished - before
            pixels = decode(segment.latents)[0]
            before = self._now()
            timing.decoding += before - finished
            if not done:
                timing.first_frame = timing.text + timing.generation + timing.decoding
            done += segment.latents.shape[1]
            timing.pixel_frames += len(pixels)
            yield pixels
            before = self._now()  # what the reader of this stream did meanwhile is not ours

    def _inputs(self, request: Request) -> RolloutInputs:
        draws, settings = self.draws(request.seed), self.settings
        length = settings.frames_per_segment
        shape = (length, *self.latent_shape)

        def draw(first: int) -> Tensor:
            return torch.stack([draws.normal("sample", first // length, i, [0], shape) for i in range(settings.noises)])

        noise = DrawnNoise(request.latent_frames, draw)
        exit_step, first = settings.last_steps
        text = request.text.to(self.device)
        return RolloutInputs(noise, text, exit_step, given=request.given, first_exit_step=first)

    def _check(self, request: Request) -> None:
        frames, length, held = request.latent_frames, self.settings.frames_per_segment, self.cache.shape
        if frames < 1 or frames % length:
            raise ValueError(f"a video of {frames} latent frames is not a whole number of segments of {length}")
        if frames > MAX_FRAMES:
            raise ValueError(f"{frames} latent frames are past Wan's {MAX_FRAMES} rotary positions")
        if not held.window and frames - length > held.frames:
            raise ValueError(f"{frames} latent frames need a window: the cache holds {held.frames} and has none")

    def _now(self) -> float:
        """Seconds, once the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def latent_frames(seconds: float | None, video: schema.Video) -> int:
    """Latent frames, in whole segments, of the shortest video that lasts `seconds`; None: a training rollout's.

    16 fps, 5 s: 21 (81 pixel frames); 30 s: 123 in segments of 3 (489), 121 frame by frame (481). RecipeError for a
    length that is not positive or needs more than 1,024 latent frames.
    """
    if seconds is None:
        return video.latent_frames
    if not (math.isfinite(seconds) and seconds > 0):
        raise RecipeError("--seconds", f"{seconds:g} is no length of a video; use a positive number, such as 5")
    needed = math.ceil((math.ceil(seconds * video.fps) - 1) / 4) + 1
    frames = -(-needed // video.frames_per_segment) * video.frames_per_segment
    if frames > MAX_FRAMES:
        most = (1 + 4 * (MAX_FRAMES // video.frames_per_segment * video.frames_per_segment - 1)) / video.fps
        what = f"{seconds:g} s are {frames} latent frames, and Wan's positions end at {MAX_FRAMES}"
        raise RecipeError("--seconds", f"{what}; use at most {math.floor(most)}")
    return frames


def window_of(recipe: schema.Recipe, frames: int, window: int | None, sink: int | None) -> tuple[int, int]:
    """Window and sink frames for a video of `frames` latent frames; None where the command line leaves them open."""
    longer = frames > recipe.video.latent_frames
    if window is None:
        window = recipe.rollout.window_frames or (recipe.video.latent_frames if longer else 0)
    if sink is None:
        sink = recipe.rollout.sink_frames or (recipe.video.frames_per_segment if longer else 0)
        sink = sink if window else 0
    return window, sink


def summary(videos: Mapping[str, Timing], warm_up: Sequence[str] = ()) -> dict[str, float]:
    """Medians over videos, those in `warm_up` left out if others remain; see `Timing` for what is measured."""
    counted = [timing for name, timing in videos.items() if name not in warm_up] or list(videos.values())
    measures: dict[str, Callable[[Timing], float]] = {
        "latency_seconds": lambda timing: timing.latency,
        "frames_per_second": lambda timing: timing.fps,
        "first_frame_seconds": lambda timing: timing.first_frame,
        "frames_per_second_with_vae": lambda timing: timing.fps_with_vae,
        "text_seconds": lambda timing: timing.text,
    }
    return {name: statistics.median(map(measure, counted)) for name, measure in measures.items()}
