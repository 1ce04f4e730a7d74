"""Self-forcing rollout: segment after segment, a few denoising steps each, with a cache of finished segments.

    given segments:    context pass alone, yielded as they are (image-to-video)
    for each segment:  x = noise
        for step < exit:  x0 = G(x, t); x = renoise(x0)       no gradient
        exit step:        x0 = G(x, t_exit)                    the only pass that may carry gradient
        context pass:     G(x0, t = context) -> keys, values   no gradient; what later segments attend to

The first segment has nothing to attend to and may have a longer step list of its own. A rollout may be longer than
what is trained: its segments before `gradient_from` have no graph, and `scored_clip` is what the scores see of it.

Passes without gradient write their keys and values into the cache's room for the segment, one over the other: what
the context pass leaves is kept. The pass with gradient writes nothing, and reads nothing that is written later. So
recomputation in backward repeats no write, in whatever order backward visits the segments.
(Self-Forcing section 3; spec 3.4 and its "order hazard".)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mirai_dist.method.arithmetic import kept_frames as kept_frames
from mirai_dist.method.flow import add_noise, clean_from_velocity

KeysValues = tuple[tuple[Tensor, Tensor], ...]


class SegmentOutput(Protocol):
    """What a causal network returns for one segment; keys_values: its own, if it was given no room to write them."""

    @property
    def velocity(self) -> Tensor | None: ...
    @property
    def hidden(self) -> Tensor | None: ...
    @property
    def keys_values(self) -> Any: ...
    @property
    def text_keys_values(self) -> Any: ...


class Past(NamedTuple):
    """What a segment attends to beside itself, and where it writes itself, for each block (mirai_dist.models.wan.Held);
    cached text keys and values; its place."""

    held: tuple[Any, ...]
    text_keys_values: KeysValues | None
    first_frame: int


class SegmentNetwork(Protocol):
    """The causal generator: one segment [B, frames, C, H, W] at timesteps [B], given text and past."""

    def __call__(self, latent: Tensor, timesteps: Tensor, text: Tensor, past: Past, capture: int) -> SegmentOutput: ...


class Cache(Protocol):
    """Where context passes leave their keys and values (mirai_dist.models.wan.KVCache)."""

    def reset(self) -> None: ...
    def view(self, room: int = 0) -> tuple[Any, ...]: ...
    def keep(self, views: Any) -> None: ...
    def visible_frames(self) -> list[int]: ...
    def placed(self, keys_values: KeysValues) -> tuple[Any, ...]: ...


@dataclass(frozen=True)
class RolloutSettings:
    """Constants of a rollout: warped timesteps (descending), segment length, the context pass's timestep.

    leaky: gradient of later segments reaches earlier exit passes through their cached keys and values
    (value of the context pass, gradient of the exit pass), as the public releases do; default cut.
    first_timesteps: those of the segment at frame 0, where they differ (Causal-Forcing's one- and two-step
    generators); a segment after a given one uses `timesteps`, as it does in training.
    """

    timesteps: tuple[float, ...]
    frames_per_segment: int
    context_timestep: float = 0.0
    leaky: bool = False
    first_timesteps: tuple[float, ...] = ()

    @property
    def noises(self) -> int:
        """Noise tensors a segment has: one for each step of the longer list, and the context pass's."""
        return max(len(self.timesteps), len(self.first_timesteps)) + 1

    @property
    def last_steps(self) -> tuple[int, int | None]:
        """(exit_step, first_exit_step) of a rollout through all steps: what sampling does."""
        return len(self.timesteps) - 1, len(self.first_timesteps) - 1 if self.first_timesteps else None


class Segment(NamedTuple):
    """One finished segment: latents [B, frames, C, H, W] and, if captured, the exit pass's state [B, S, dim]."""

    latents: Tensor
    state: Tensor | None


@dataclass(frozen=True)
class DrawnNoise:
    """Noise that is drawn when its segment comes, so that a long video never holds all of it.

    frames: latent frames of the video. draw(first_frame) -> [settings.noises, B, frames_per_segment, C, H, W].
    """

    frames: int
    draw: Callable[[int], Tensor]


class RolloutInputs(NamedTuple):
    """noise [settings.noises, B, F, C, H, W], or drawn as it is needed: index 0 starts, j > 0 re-noises before step
    j, the last one is for the context pass. text [B, length, text_dim]. exit_step: index of the last denoising step.
    capture: blocks after which the exit pass's residual stream is returned; 0 for none. given: clean latents
    [B, G, C, H, W] of the first frames, whole segments, which are not generated. first_exit_step: exit step of the
    first segment, where it has its own list. gradient_from: first frame, of a segment, that may have a graph and is
    captured; what comes before is context."""

    noise: Tensor | DrawnNoise
    text: Tensor
    exit_step: int
    capture: int = 0
    given: Tensor | None = None
    first_exit_step: int | None = None
    gradient_from: int = 0

    @property
    def frames(self) -> int:
        """Latent frames of the whole video, given ones included."""
        return self.noise.frames if isinstance(self.noise, DrawnNoise) else self.noise.shape[2]

    def segment_noise(self, first: int, frames: int) -> Tensor:
        """Noise [settings.noises, B, frames, C, H, W] of the segment that starts at frame `first`."""
        if isinstance(self.noise, DrawnNoise):
            return self.noise.draw(first)
        return self.noise[:, :, first : first + frames]


def segments(
    generator: SegmentNetwork, settings: RolloutSettings, inputs: RolloutInputs, cache: Cache
) -> Iterator[Segment]:
    """Generate a video segment by segment; the caller's grad mode decides whether exit passes carry gradient.

    A segment is yielded before its own context pass runs: the wall time to a segment holds its denoising steps and
    the context pass of the segment before it, except for given segments, which are yielded after theirs.

    The cache must show each segment its window, and must not overwrite before backward what a segment with a graph
    saw (`kept_frames`); without gradient, the window is enough.

    ValueError unless given frames are whole segments and leave some to generate, gradient begins with a segment,
    there is a first exit step just where there is a first step list, and noise for every step of both lists.
    """
    frames, total = settings.frames_per_segment, inputs.frames
    given = _checked_given(settings, inputs)
    cache.reset()
    text_keys_values: KeysValues | None = None
    leaked: dict[int, KeysValues] = {}  # by first frame; those that a later segment may still see
    for first in range(0, total, frames):
        noise = inputs.segment_noise(first, frames)
        if len(noise) != settings.noises:
            raise ValueError(f"{len(noise)} noises of frame {first}, where the step lists need {settings.noises}")
        with_gradient = torch.is_grad_enabled() and first >= inputs.gradient_from
        seen = None
        if with_gradient:
            seen = cache.placed(_joined(leaked, cache.visible_frames(), frames)) if leaked else cache.view()
        past = Past(cache.view(room=frames), text_keys_values, first)
        if first < given:
            assert inputs.given is not None
            clean, own = inputs.given[:, first : first + frames], None
        else:
            with torch.set_grad_enabled(with_gradient):
                clean, output, past = _denoised(generator, settings, inputs, past, seen, noise)
            state, own = output.hidden, output.keys_values if settings.leaky else None
            del output  # and with it the keys and values of all blocks
            yield Segment(clean, state)
        if first + frames < total:  # nobody reads the last segment's cache
            text_keys_values = _context_pass(generator, settings, inputs, past, (clean.detach(), noise[-1]))
            if settings.leaky and torch.is_grad_enabled():
                context = _written(past.held)
                leaked[first] = _straight_through(context, own) if own is not None else context
            cache.keep(past.held)
            visible = {frame - frame % frames for frame in cache.visible_frames()}
            leaked = {start: each for start, each in leaked.items() if start in visible}
        del past, seen  # they may be copies
        if first < given:
            yield Segment(clean, None)


def _checked_given(settings: RolloutSettings, inputs: RolloutInputs) -> int:
    """Number of given frames; raises what `segments` says."""
    frames, total, start = settings.frames_per_segment, inputs.frames, inputs.gradient_from
    given = 0 if inputs.given is None else inputs.given.shape[1]
    if given % frames or given >= total:
        raise ValueError(f"{given} given frames are not whole segments of {frames} before the end of {total} frames")
    if start % frames or not 0 <= start < total:
        raise ValueError(f"gradient from frame {start} begins with no segment of {frames} of the {total} frames")
    if bool(settings.first_timesteps) != (inputs.first_exit_step is not None):
        what = f"first exit step {inputs.first_exit_step} does not go with first timesteps {settings.first_timesteps}"
        raise ValueError(f"{what}; the first segment has both or neither")
    return given


def _schedule(settings: RolloutSettings, inputs: RolloutInputs, first: int) -> tuple[tuple[float, ...], int]:
    """Timesteps of the segment that starts at frame `first`, up to its exit step, and the exit step."""
    if first or inputs.first_exit_step is None:
        return settings.timesteps, inputs.exit_step
    return settings.first_timesteps, inputs.first_exit_step


def _denoised(
    generator: SegmentNetwork,
    settings: RolloutSettings,
    inputs: RolloutInputs,
    past: Past,
    seen: tuple[Any, ...] | None,
    noise: Tensor,
) -> tuple[Tensor, SegmentOutput, Past]:
    """A segment from its noise [settings.noises, B, frames, C, H, W]: x0, the exit pass's output, past with cached
    text. seen: what the exit pass reads if it has a graph, and so must not write."""
    timesteps, exit_step = _schedule(settings, inputs, past.first_frame)
    noisy = noise[0]
    with torch.no_grad():
        for step in range(exit_step):
            output = generator(noisy, _at(timesteps[step], noisy), inputs.text, past, 0)
            clean = _clean(output, noisy, timesteps[step])
            past = past._replace(text_keys_values=output.text_keys_values)
            noisy = add_noise(clean, noise[step + 1], _at(timesteps[step + 1], noisy))
    # the text's keys and values carry gradient in a gradient pass, so that pass computes its own
    text_cache = None if torch.is_grad_enabled() else past.text_keys_values
    capture = inputs.capture if past.first_frame >= inputs.gradient_from else 0
    exit_past = past._replace(held=past.held if seen is None else seen, text_keys_values=text_cache)
    output = generator(noisy, _at(timesteps[exit_step], noisy), inputs.text, exit_past, capture)
    return _clean(output, noisy, timesteps[exit_step]), output, past


def rollout(
    generator: SegmentNetwork, settings: RolloutSettings, inputs: RolloutInputs, cache: Cache
) -> tuple[Tensor, list[Tensor]]:
    """A whole rollout: latents [B, F, C, H, W] and the captured states, [B, S, dim] a segment.

    Of the latents, frames before `inputs.gradient_from` carry no gradient, and there are no states of them.
    ValueError as in `segments`.
    """
    finished = list(segments(generator, settings, inputs, cache))
    return torch.cat([s.latents for s in finished], dim=1), [s.state for s in finished if s.state is not None]


class ScoredClip(NamedTuple):
    """Latents [B, F, C, H, W] that score networks see, and which frames [F] the generator's loss is taken over (None:
    all of them)."""

    latents: Tensor
    gradient_mask: Tensor | None


def scored_clip(
    latents: Tensor, frames: int, frames_per_segment: int, as_image: Callable[[Tensor], Tensor]
) -> ScoredClip:
    """The last `frames` frames of a rollout [B, M, C, H, W], made to begin as a video does.

    The first latent frame of a video is a single picture, and every later one is four. So the clip's first frame is
    replaced by `as_image` of all frames up to it, [B, M - frames + 1, C, H, W] without graph: the image latent
    [B, 1, C, H, W] of the last picture they decode to. The clip's first segment is not trained on, because it holds
    that latent. A rollout of just `frames` frames is returned as it is. (Self-Forcing's rollouts beyond 21 frames;
    spec 3.4.) ValueError for a shorter one.
    """
    if latents.shape[1] < frames:
        raise ValueError(f"a rollout of {latents.shape[1]} frames has no last {frames} frames")
    if latents.shape[1] == frames:
        return ScoredClip(latents, None)
    later = latents.shape[1] - frames + 1
    with torch.no_grad():
        image = as_image(latents[:, :later].detach()).to(latents.dtype)
    trained = torch.arange(frames, device=latents.device) >= frames_per_segment
    return ScoredClip(torch.cat((image, latents[:, later:]), dim=1), trained)


@torch.no_grad()
def _context_pass(
    generator: SegmentNetwork, settings: RolloutSettings, inputs: RolloutInputs, past: Past, own: tuple[Tensor, Tensor]
) -> KeysValues:
    """Write the keys and values of a finished segment; returns the text's. own: its clean latents and noise,
    [B, frames, C, H, W]."""
    clean, noise = own
    timesteps = _at(settings.context_timestep, clean)
    return generator(add_noise(clean, noise, timesteps), timesteps, inputs.text, past, 0).text_keys_values


def _clean(output: SegmentOutput, noisy: Tensor, timestep: float) -> Tensor:
    assert output.velocity is not None
    return clean_from_velocity(noisy, output.velocity, _at(timestep, noisy))


def _at(timestep: float, latent: Tensor) -> Tensor:
    dtype = torch.promote_types(latent.dtype, torch.float32)
    return torch.full((latent.shape[0],), timestep, device=latent.device, dtype=dtype)


def _written(held: tuple[Any, ...]) -> KeysValues:
    """Copies of what lies in the room of each block."""
    pieces = (zip(*each.slots(), strict=True) for each in held)
    return tuple((torch.cat(keys, dim=1), torch.cat(values, dim=1)) for keys, values in pieces)


def _straight_through(value: KeysValues, gradient: KeysValues) -> KeysValues:
    """Exactly the values of the one, with the graph of the other."""
    return tuple(
        (k.to(graph_k.dtype) + (graph_k - graph_k.detach()), v.to(graph_v.dtype) + (graph_v - graph_v.detach()))
        for (k, v), (graph_k, graph_v) in zip(value, gradient, strict=True)
    )


def _joined(segments: dict[int, KeysValues], frames: list[int], per_segment: int) -> KeysValues:
    """Keys and values of the given absolute frames, out of those of segments by their first frame."""

    def part(block: int, which: int) -> Tensor:
        framed = [segments[f - f % per_segment][block][which].unflatten(1, (per_segment, -1)) for f in frames]
        return torch.cat([each[:, f % per_segment] for f, each in zip(frames, framed, strict=True)], dim=1)

    return tuple((part(block, 0), part(block, 1)) for block in range(len(next(iter(segments.values())))))
