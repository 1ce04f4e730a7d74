"""Self-forcing rollout: segment after segment, a few denoising steps each, with a cache of finished segments.

    given segments:    context pass alone, yielded as they are (image-to-video)
    for each segment:  x = noise
        for step < exit:  x0 = G(x, t); x = renoise(x0)       no gradient
        exit step:        x0 = G(x, t_exit)                    the only pass that may carry gradient
        context pass:     G(x0, t = context) -> keys, values   no gradient; what later segments attend to

Denoising passes read the cache and return their keys and values without writing them: only the context pass's
are kept. So recomputation in backward repeats no write, in whatever order backward visits the segments.
(Self-Forcing section 3; spec 3.4 and its "order hazard".)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mirai_dist.method.flow import add_noise, clean_from_velocity

KeysValues = tuple[tuple[Tensor, Tensor], ...]


class SegmentOutput(Protocol):
    """What a causal network returns for one segment."""

    @property
    def velocity(self) -> Tensor | None: ...
    @property
    def hidden(self) -> Tensor | None: ...
    @property
    def keys_values(self) -> Any: ...
    @property
    def text_keys_values(self) -> Any: ...


class Past(NamedTuple):
    """What a segment attends to beside itself: keys and values a block, cached text keys and values, its place."""

    keys_values: KeysValues
    text_keys_values: KeysValues | None
    first_frame: int


class SegmentNetwork(Protocol):
    """The causal generator: one segment [B, frames, C, H, W] at timesteps [B], given text and past."""

    def __call__(self, latent: Tensor, timesteps: Tensor, text: Tensor, past: Past, capture: int) -> SegmentOutput: ...


class Cache(Protocol):
    """Where context passes leave their keys and values (mirai_dist.models.wan.KVCache)."""

    def reset(self) -> None: ...
    def view(self) -> KeysValues: ...
    def visible_frames(self) -> list[int]: ...
    def placed(self, keys_values: KeysValues) -> KeysValues: ...
    def write(self, keys_values: KeysValues) -> None: ...


@dataclass(frozen=True)
class RolloutSettings:
    """Constants of a rollout: warped timesteps (descending), segment length, the context pass's timestep.

    leaky: gradient of later segments reaches earlier exit passes through their cached keys and values
    (value of the context pass, gradient of the exit pass), as the public releases do; default cut.
    """

    timesteps: tuple[float, ...]
    frames_per_segment: int
    context_timestep: float = 0.0
    leaky: bool = False


class Segment(NamedTuple):
    """One finished segment: latents [B, frames, C, H, W] and, if captured, the exit pass's state [B, S, dim]."""

    latents: Tensor
    state: Tensor | None


@dataclass(frozen=True)
class DrawnNoise:
    """Noise that is drawn when its segment comes, so that a long video never holds all of it.

    frames: latent frames of the video. draw(first_frame) -> [steps + 1, B, frames_per_segment, C, H, W].
    """

    frames: int
    draw: Callable[[int], Tensor]


class RolloutInputs(NamedTuple):
    """noise [steps + 1, B, F, C, H, W], or drawn as it is needed: index 0 starts, j > 0 re-noises before step j, the
    last one is for the context pass. text [B, length, text_dim]. exit_step: index of the last denoising step.
    capture: blocks after which the exit pass's residual stream is returned; 0 for none. given: clean latents
    [B, G, C, H, W] of the first frames, whole segments, which are not generated."""

    noise: Tensor | DrawnNoise
    text: Tensor
    exit_step: int
    capture: int = 0
    given: Tensor | None = None

    @property
    def frames(self) -> int:
        """Latent frames of the whole video, given ones included."""
        return self.noise.frames if isinstance(self.noise, DrawnNoise) else self.noise.shape[2]

    def segment_noise(self, first: int, frames: int) -> Tensor:
        """Noise [steps + 1, B, frames, C, H, W] of the segment that starts at frame `first`."""
        if isinstance(self.noise, DrawnNoise):
            return self.noise.draw(first)
        return self.noise[:, :, first : first + frames]


def segments(
    generator: SegmentNetwork, settings: RolloutSettings, inputs: RolloutInputs, cache: Cache
) -> Iterator[Segment]:
    """Generate a video segment by segment; the caller's grad mode decides whether exit passes carry gradient.

    A segment is yielded before its own context pass runs: the wall time to a segment holds its denoising steps and
    the context pass of the segment before it, except for given segments, which are yielded after theirs.
    ValueError unless the given frames are whole segments and leave some to generate.
    """
    frames, total = settings.frames_per_segment, inputs.frames
    given = 0 if inputs.given is None else inputs.given.shape[1]
    if given % frames or given >= total:
        raise ValueError(f"{given} given frames are not whole segments of {frames} before the end of {total} frames")
    cache.reset()
    text_keys_values: KeysValues | None = None
    leaked: list[KeysValues] = []
    for first in range(0, total, frames):
        noise = inputs.segment_noise(first, frames)
        held = cache.placed(_joined(leaked, cache.visible_frames(), frames)) if leaked else cache.view()
        past = Past(held, text_keys_values, first)
        if first < given:
            assert inputs.given is not None
            clean, output = inputs.given[:, first : first + frames], None
        else:
            clean, output, past = _denoised(generator, settings, inputs, past, noise)
            yield Segment(clean, output.hidden)
        if first + frames < total:  # nobody reads the last segment's cache
            context, text_keys_values = _context_pass(generator, settings, inputs, past, (clean.detach(), noise[-1]))
            cache.write(context)
            if settings.leaky and torch.is_grad_enabled():
                leaked.append(_straight_through(context, output.keys_values) if output else context)
        if first < given:
            yield Segment(clean, None)


def _denoised(
    generator: SegmentNetwork, settings: RolloutSettings, inputs: RolloutInputs, past: Past, noise: Tensor
) -> tuple[Tensor, SegmentOutput, Past]:
    """A segment from its noise [steps + 1, B, frames, C, H, W]: x0, the exit pass's output, past with cached text."""
    noisy = noise[0]
    with torch.no_grad():
        for step in range(inputs.exit_step):
            output = generator(noisy, _at(settings.timesteps[step], noisy), inputs.text, past, 0)
            clean = _clean(output, noisy, settings.timesteps[step])
            past = past._replace(text_keys_values=output.text_keys_values)
            noisy = add_noise(clean, noise[step + 1], _at(settings.timesteps[step + 1], noisy))
    exit_timestep = settings.timesteps[inputs.exit_step]
    # the text's keys and values carry gradient in a gradient pass, so that pass computes its own
    text_cache = None if torch.is_grad_enabled() else past.text_keys_values
    output = generator(
        noisy, _at(exit_timestep, noisy), inputs.text, past._replace(text_keys_values=text_cache), inputs.capture
    )
    return _clean(output, noisy, exit_timestep), output, past


def rollout(
    generator: SegmentNetwork, settings: RolloutSettings, inputs: RolloutInputs, cache: Cache
) -> tuple[Tensor, list[Tensor]]:
    """A whole rollout: latents [B, F, C, H, W] and the captured states, [B, S, dim] a segment."""
    finished = list(segments(generator, settings, inputs, cache))
    return torch.cat([s.latents for s in finished], dim=1), [s.state for s in finished if s.state is not None]


@torch.no_grad()
def _context_pass(
    generator: SegmentNetwork, settings: RolloutSettings, inputs: RolloutInputs, past: Past, own: tuple[Tensor, Tensor]
) -> tuple[KeysValues, KeysValues]:
    """Keys and values of a finished segment, and the text's; own: its clean latents and noise, [B, frames, C, H, W]."""
    clean, noise = own
    timesteps = _at(settings.context_timestep, clean)
    past = past._replace(keys_values=tuple((k.detach(), v.detach()) for k, v in past.keys_values))
    output = generator(add_noise(clean, noise, timesteps), timesteps, inputs.text, past, 0)
    return output.keys_values, output.text_keys_values


def _clean(output: SegmentOutput, noisy: Tensor, timestep: float) -> Tensor:
    assert output.velocity is not None
    return clean_from_velocity(noisy, output.velocity, _at(timestep, noisy))


def _at(timestep: float, latent: Tensor) -> Tensor:
    dtype = torch.promote_types(latent.dtype, torch.float32)
    return torch.full((latent.shape[0],), timestep, device=latent.device, dtype=dtype)


def _straight_through(value: KeysValues, gradient: KeysValues) -> KeysValues:
    """Exactly the values of the one, with the graph of the other."""
    return tuple(
        (k.to(graph_k.dtype) + (graph_k - graph_k.detach()), v.to(graph_v.dtype) + (graph_v - graph_v.detach()))
        for (k, v), (graph_k, graph_v) in zip(value, gradient, strict=True)
    )


def _joined(segments: list[KeysValues], frames: list[int], per_segment: int) -> KeysValues:
    """Keys and values of the given absolute frames, out of those of all segments so far."""

    def part(block: int, which: int) -> Tensor:
        framed = [segments[f // per_segment][block][which].unflatten(1, (per_segment, -1)) for f in frames]
        return torch.cat([each[:, f % per_segment] for f, each in zip(frames, framed, strict=True)], dim=1)

    return tuple((part(block, 0), part(block, 1)) for block in range(len(segments[0])))
