"""Self-forcing rollout: which passes run, what they see, and gradients that equal those of recomputed prefixes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache as remembered
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ref

import pytest
import torch
from torch import Tensor

from mirai_dist.config import load
from mirai_dist.cycle.roles import causal, kv_cache, rollout_settings
from mirai_dist.method import rollout as rollout_module
from mirai_dist.method.rollout import (
    DrawnNoise,
    Past,
    RolloutInputs,
    RolloutSettings,
    kept_frames,
    rollout,
    scored_clip,
    segments,
)
from mirai_dist.models.vae import LinearVae
from mirai_dist.models.wan import Capture, Clean, History, KVCache, WanModel
from mirai_dist.models.wan.kv_cache import CacheShape
from mirai_dist.parallel.recompute import recompute
from tests.tiny_wan import (
    SHAPE,
    TOKENS,
    KeysValues,
    fill_room,
    generator,
    gradients,
    held,
    largest_difference,
    latents,
    prompts,
    wan,
    write,
)

SMALL = Path(__file__).parent / "data" / "small.yaml"
CPU = torch.device("cpu")
TIMESTEPS = (1000.0, 937.5, 625.0)
FOUR = (1000.0, 937.5, 2500 / 3, 625.0)  # 1000, 750, 500, 250 at shift 5
TWO = (1000.0, 2500 / 3)

# --- which passes run: a network that only takes notes -------------------------------------------------------


class Call(NamedTuple):
    """One pass of the recording network."""

    first_frame: int
    timestep: float
    latent: Tensor
    with_gradient: bool
    text_cached: bool
    capture: int
    past_frames: int


class Output(NamedTuple):
    velocity: Tensor
    hidden: Tensor | None
    keys_values: Any
    text_keys_values: Any


@dataclass
class Recorder:
    """velocity = latent / 2; keys and values of one token a frame that hold the call's number."""

    calls: list[Call] = field(default_factory=list)

    def __call__(self, latent: Tensor, timesteps: Tensor, text: Tensor, past: Past, capture: int) -> Output:
        assert (timesteps == timesteps[0]).all() and timesteps.shape == latent.shape[:1]
        cached = past.text_keys_values is not None
        (seen,) = past.held
        frames = sum(seen.past[1::2]) - sum(seen.past[::2])
        assert bool(seen.room) != torch.is_grad_enabled()
        self.calls.append(
            Call(past.first_frame, timesteps[0].item(), latent, torch.is_grad_enabled(), cached, capture, frames)
        )
        own = torch.full((latent.shape[0], latent.shape[1], 1, 1), len(self.calls), dtype=latent.dtype)
        hidden = latent.flatten(2) if capture else None
        if seen.room:
            fill_room([seen], ((own, own),))
        return Output(latent / 2, hidden, None if seen.room else ((own, own),), ((text, text),))


def notes_of(exit_step: int, with_gradient: bool, settings: RolloutSettings, **more: Any) -> tuple[Recorder, Tensor]:
    """A rollout of the recorder over 6 frames: its notes and the noise it got."""
    network = Recorder()
    noise = torch.randn(settings.noises, 2, 6, 3, 2, 2, generator=generator(0), dtype=torch.float64)
    cache = KVCache(CacheShape(1, 2, 6, settings.frames_per_segment, 1, 1, 1), CPU, torch.float64)
    with torch.set_grad_enabled(with_gradient):
        rollout(network, settings, RolloutInputs(noise, torch.zeros(2, 1, 1), exit_step, capture=7, **more), cache)
    return network, noise


@pytest.mark.parametrize("exit_step", [0, 1, 2])
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("per_segment", [1, 2, 3])
def test_passes_of_a_rollout(exit_step: int, with_gradient: bool, per_segment: int) -> None:
    network, _ = notes_of(exit_step, with_gradient, RolloutSettings(TIMESTEPS, per_segment))
    count = 6 // per_segment
    expected = []
    for segment in range(count):
        expected += [(segment * per_segment, timestep) for timestep in TIMESTEPS[: exit_step + 1]]
        if segment + 1 < count:  # nobody would read the last segment's context
            expected.append((segment * per_segment, 0.0))
    assert [(call.first_frame, call.timestep) for call in network.calls] == expected
    assert len(expected) == count * (exit_step + 1) + count - 1
    exits = [call for call in network.calls if call.timestep == TIMESTEPS[exit_step]]
    assert [call.capture for call in exits] == [7] * count
    assert all(call.capture == 0 for call in network.calls if call not in exits)
    assert [call for call in network.calls if call.with_gradient] == (exits if with_gradient else [])
    # a segment sees all frames before it, and none of its own denoising passes
    assert all(call.past_frames == call.first_frame for call in network.calls)


@pytest.mark.parametrize("exit_step", [0, 2])
def test_text_keys_and_values_are_reused_where_no_gradient_needs_them(exit_step: int) -> None:
    settings = RolloutSettings(TIMESTEPS, 2)
    calls = notes_of(exit_step, False, settings)[0].calls
    first_segment = [call.text_cached for call in calls if call.first_frame == 0]
    assert not first_segment[0] and all(call.text_cached for call in calls if call.first_frame > 0)
    assert all(first_segment[1:]) or exit_step == 0
    calls = notes_of(exit_step, True, settings)[0].calls
    assert not any(call.text_cached for call in calls if call.with_gradient)
    assert all(call.text_cached for call in calls if not call.with_gradient and call.first_frame > 0)


def test_every_input_by_hand() -> None:
    """x0 = x - sigma v; fresh noise before each step; another one for the context pass."""
    settings = RolloutSettings((1000.0, 800.0), 3, context_timestep=100.0)
    network, noise = notes_of(1, False, settings)
    for segment in range(2):
        own = slice(3 * segment, 3 * segment + 3)
        calls = [call.latent for call in network.calls if call.first_frame == 3 * segment]
        assert torch.equal(calls[0], noise[0][:, own])
        second = 0.2 * (calls[0] / 2) + 0.8 * noise[1][:, own]  # sigma 1 and velocity x / 2 leave x0 = x / 2
        torch.testing.assert_close(calls[1], second, rtol=0, atol=1e-15)
        if segment == 0:
            context = 0.9 * (second - 0.8 * second / 2) + 0.1 * noise[2][:, own]
            torch.testing.assert_close(calls[2], context, rtol=0, atol=1e-15)


# --- a first segment with its own steps ----------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "first"), [(TWO, FOUR), ((1000.0,), FOUR), (FOUR, TWO), (TWO, (1000.0, 500.0))])
def test_the_first_segment_runs_through_its_own_steps(steps: tuple[float, ...], first: tuple[float, ...]) -> None:
    for exit_step, first_exit in [(0, 0), (0, len(first) - 1), (len(steps) - 1, 0), (len(steps) - 1, len(first) - 1)]:
        settings = RolloutSettings(steps, 2, 50.0, first_timesteps=first)
        network, noise = notes_of(exit_step, True, settings, first_exit_step=first_exit)
        assert len(noise) == max(len(steps), len(first)) + 1
        expected = [(0, timestep, i == first_exit) for i, timestep in enumerate(first[: first_exit + 1])]
        for segment in (2, 4):
            expected.append((segment - 2, 50.0, False))
            expected += [(segment, timestep, i == exit_step) for i, timestep in enumerate(steps[: exit_step + 1])]
        assert [(call.first_frame, call.timestep, call.with_gradient) for call in network.calls] == expected
        assert [call.capture for call in network.calls] == [7 * graph for _, _, graph in expected]
        for call in network.calls:
            own = slice(call.first_frame, call.first_frame + 2)
            if call.timestep == 1000.0:
                assert torch.equal(call.latent, noise[0][:, own])
        # before step j comes noise j, and before the context pass the last one, however short the list was
        clean = network.calls[first_exit].latent * (1 - first[first_exit] / 1000 / 2)
        context = next(call.latent for call in network.calls if call.timestep == 50.0)
        torch.testing.assert_close(context, 0.95 * clean + 0.05 * noise[-1][:, :2], rtol=0, atol=1e-15)
        if first_exit:
            again = first[1] / 1000
            renoised = (1 - again) * network.calls[0].latent / 2 + again * noise[1][:, :2]
            torch.testing.assert_close(network.calls[1].latent, renoised, rtol=0, atol=1e-15)


def test_after_a_given_segment_the_common_steps_are_used() -> None:
    settings = RolloutSettings(TWO, 2, first_timesteps=FOUR)
    given = torch.zeros(2, 2, 3, 2, 2, dtype=torch.float64)
    calls = notes_of(1, False, settings, first_exit_step=3, given=given)[0].calls
    assert [call.timestep for call in calls if call.first_frame == 2] == [*TWO, 0.0]
    assert [call.timestep for call in calls if call.first_frame == 0] == [0.0]


@pytest.mark.parametrize(("first", "exit_step"), [(FOUR, None), ((), 0)])
def test_a_first_step_list_and_a_first_exit_step_come_together(first: tuple[float, ...], exit_step: int | None) -> None:
    with pytest.raises(ValueError, match="the first segment has both or neither"):
        notes_of(0, False, RolloutSettings(TWO, 2, first_timesteps=first), first_exit_step=exit_step)


def test_noise_that_misses_a_step_of_the_longer_list_is_refused() -> None:
    """With two steps' noise the context pass would get that of the second step again."""
    settings = RolloutSettings(TWO, 2, first_timesteps=FOUR)
    inputs = RolloutInputs(torch.zeros(3, 2, 6, 3, 2, 2), torch.zeros(2, 1, 1), 1, first_exit_step=3)
    drawn = inputs._replace(noise=DrawnNoise(6, lambda first: torch.zeros(3, 2, 2, 3, 2, 2)))
    for each in (inputs, drawn):
        with pytest.raises(ValueError, match="3 noises of frame 0, where the step lists need 5"):
            next(segments(Recorder(), settings, each, KVCache(CacheShape(1, 2, 6, 2, 1, 1, 1), CPU, torch.float32)))


def test_all_steps_of_each_list() -> None:
    assert RolloutSettings(FOUR, 3).last_steps == (3, None)
    assert RolloutSettings(TWO, 3, first_timesteps=FOUR).last_steps == (1, 3)
    assert RolloutSettings((1000.0,), 1, first_timesteps=FOUR).last_steps == (0, 3)


# --- rollouts longer than what is trained --------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 2, 4])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_segments_before_the_gradient_run_as_context_does(start: int, with_gradient: bool) -> None:
    settings = RolloutSettings(TWO, 2)
    network, _ = notes_of(1, with_gradient, settings, gradient_from=start)
    whole, _ = notes_of(1, with_gradient, settings)
    assert [(c.first_frame, c.timestep) for c in network.calls] == [(c.first_frame, c.timestep) for c in whole.calls]
    assert all(torch.equal(one.latent, other.latent) for one, other in zip(network.calls, whole.calls, strict=True))
    exits = [call for call in network.calls if call.timestep == TWO[1]]
    assert [call.capture for call in exits] == [7 if call.first_frame >= start else 0 for call in exits]
    graphs = [call.first_frame for call in network.calls if call.with_gradient]
    assert graphs == ([first for first in (0, 2, 4) if first >= start] if with_gradient else [])
    # the text's keys and values are computed again where they have a graph, and nowhere else
    assert all(call.text_cached != call.with_gradient for call in network.calls[1:])


@pytest.mark.parametrize("start", [-2, 1, 3, 6, 8])
def test_gradient_begins_with_a_segment_of_the_rollout(start: int) -> None:
    with pytest.raises(ValueError, match=f"gradient from frame {start} begins with no segment of 2 of the 6 frames"):
        notes_of(0, True, RolloutSettings(TWO, 2), gradient_from=start)


def test_a_leaky_rollout_lets_go_of_what_left_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts, written = [], rollout_module._written

    def watched(seen: tuple[Any, ...]) -> KeysValues:
        copies = written(seen)
        contexts.append(ref(copies[0][0]))
        return copies

    monkeypatch.setattr(rollout_module, "_written", watched)
    cache = KVCache(CacheShape(1, 1, 5, 1, 1, 1, 1, window=2), CPU, torch.float64)
    inputs = RolloutInputs(torch.zeros(2, 1, 6, 3, 2, 2, dtype=torch.float64), torch.zeros(1, 1, 1), 0, gradient_from=5)
    alive = []
    for _ in segments(Recorder(), RolloutSettings((1000.0,), 1, leaky=True), inputs, cache):
        alive.append([i for i, context in enumerate(contexts) if context() is not None])
    assert alive == [[], [0], [0, 1], [1, 2], [2, 3], [3, 4]]


# --- what is kept --------------------------------------------------------------------------------------------


def test_only_the_context_pass_is_cached() -> None:
    cache = KVCache(CacheShape(1, 2, 4, 2, 1, 1, 1), CPU, torch.float64)
    noise = torch.zeros(4, 2, 6, 3, 2, 2, dtype=torch.float64)
    rollout(Recorder(), RolloutSettings(TIMESTEPS, 2), RolloutInputs(noise, torch.zeros(2, 1, 1), 2), cache)
    # calls 1 2 3 denoise the first segment, 4 is its context pass; 8 is the second one's; the third has none
    assert cache.view()[0].together(None)[0][0].flatten().tolist() == [4, 4, 8, 8]


# --- the real network ----------------------------------------------------------------------------------------

FRAMES = 6


@dataclass(frozen=True)
class Case:
    """One rollout of the tiny network. held: frames of its cache; 0 for all that are ever written."""

    per_segment: int = 2
    exit_step: int = 1
    context_timestep: float = 0.0
    leaky: bool = False
    window: int = 0
    sink: int = 0
    frames: int = FRAMES
    timesteps: tuple[float, ...] = TIMESTEPS
    first: tuple[float, ...] = ()
    first_exit: int | None = None
    gradient_from: int = 0
    held: int = 0

    @property
    def count(self) -> int:
        return self.frames // self.per_segment

    @property
    def trained(self) -> range:
        """Segments with a graph."""
        return range(self.gradient_from // self.per_segment, self.count)

    def schedule(self, segment: int) -> tuple[tuple[float, ...], int]:
        """Timesteps and exit step of a segment."""
        if segment == 0 and self.first_exit is not None:
            return self.first, self.first_exit
        return self.timesteps, self.exit_step

    @property
    def settings(self) -> RolloutSettings:
        return RolloutSettings(self.timesteps, self.per_segment, self.context_timestep, self.leaky, self.first)

    def cache(self, frames: int = 0) -> KVCache:
        """A cache that holds `frames` frames (else as many as the case says) and shows the window."""
        heads, frames = SHAPE.heads, frames or self.held or self.frames - self.per_segment
        sizes = SHAPE.blocks, 1, frames, self.per_segment, TOKENS, heads, SHAPE.dim // heads
        shape = CacheShape(*sizes, self.sink, self.window)
        return KVCache(shape, CPU, torch.float64)

    def inputs(self) -> RolloutInputs:
        noise = torch.stack([latents(10 + i, 1, self.frames) for i in range(self.settings.noises)])
        return RolloutInputs(noise, prompts(2, 1), self.exit_step, 2, None, self.first_exit, self.gradient_from)

    def visible(self, first: int) -> list[int]:
        if not self.window:
            return list(range(first))
        return [f for f in range(first) if f < self.sink or f >= first - (self.window - self.sink)]

    def positions(self, first: int) -> list[int]:
        """Frames at which the visible ones are shown: once the window has slid, the last before the segment."""
        count = len(self.visible(first))
        return list(range(first - count, first))


def tensor(noise: Tensor | DrawnNoise) -> Tensor:
    """The noise of inputs that hold all of it."""
    assert isinstance(noise, Tensor)
    return noise


def moved(keys: Tensor, later: list[int]) -> Tensor:
    """Rotated keys [B, frames * TOKENS, heads, 20] with frame i turned by later[i] more frames: 8 time channels."""
    angles = torch.tensor([[frames * 10000.0 ** (-j / 4) for j in range(4)] for frames in later], dtype=torch.float64)
    cos, sin = (part.repeat_interleave(TOKENS, 0)[None, :, None] for part in (angles.cos(), angles.sin()))
    even, odd = keys[..., 0:8:2], keys[..., 1:8:2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((turned, keys[..., 8:]), dim=-1)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, graph: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient[0]


class Reference:
    """The rollout without a cache and without recomputation: every segment computes all of its prefix anew."""

    def __init__(self, network: WanModel, case: Case, inputs: RolloutInputs) -> None:
        self.network, self.case, self.inputs = network, case, inputs
        self.latents: list[Tensor] = []
        self.states: list[Tensor] = []
        self.exits: list[KeysValues] = []
        for segment in range(case.count):
            self._segment(segment)

    def _pass(self, segment: int, latent: Tensor, timestep: float, past: KeysValues | None) -> Any:
        at = torch.full((1,), timestep, dtype=torch.float64)
        history = History(held(past), None, segment * self.case.per_segment)
        return self.network(latent, at, self.inputs.text, history=history, capture=Capture(2))

    def _noise(self, index: int, segment: int) -> Tensor:
        first = segment * self.case.per_segment
        return tensor(self.inputs.noise)[index][:, first : first + self.case.per_segment]

    def _segment(self, segment: int) -> None:
        past = self._prefix(segment)
        noisy = self._noise(0, segment)
        timesteps, exit_step = self.case.schedule(segment)
        with torch.no_grad():
            for step in range(exit_step):
                sigma, following = timesteps[step] / 1000, timesteps[step + 1] / 1000
                clean = noisy - sigma * self._pass(segment, noisy, timesteps[step], past).velocity
                noisy = (1 - following) * clean + following * self._noise(step + 1, segment)
        with torch.set_grad_enabled(segment in self.case.trained and torch.is_grad_enabled()):
            output = self._pass(segment, noisy, timesteps[exit_step], past)
            self.latents.append(noisy - timesteps[exit_step] / 1000 * output.velocity)
        self.states += [output.hidden] * (segment in self.case.trained)
        self.exits.append(output.keys_values)

    def _prefix(self, segment: int) -> KeysValues | None:
        """Keys and values of the visible frames, from context passes run one after the other from the first."""
        contexts: list[KeysValues] = []
        for earlier in range(segment):
            with torch.no_grad():
                clean, sigma = self.latents[earlier].detach(), self.case.context_timestep / 1000
                noisy = (1 - sigma) * clean + sigma * self._noise(-1, earlier)
                past = self._select(contexts, earlier * self.case.per_segment)
                contexts.append(self._pass(earlier, noisy, self.case.context_timestep, past).keys_values)
        if self.case.leaky:
            contexts = [self._leak(context, graph) for context, graph in zip(contexts, self.exits, strict=True)]
        return self._select(contexts, segment * self.case.per_segment)

    def _select(self, contexts: list[KeysValues], first: int) -> KeysValues | None:
        """The visible frames out of the contexts, by frame index, each key at the frame it is shown at."""
        if not contexts:
            return None
        frames = self.case.visible(first)
        tokens = torch.tensor([f * TOKENS + i for f in frames for i in range(TOKENS)])
        later = [at - f for f, at in zip(frames, self.case.positions(first), strict=True)]
        return tuple(
            (
                moved(torch.cat([c[b][0] for c in contexts], 1)[:, tokens], later),
                torch.cat([c[b][1] for c in contexts], 1)[:, tokens],
            )
            for b in range(SHAPE.blocks)
        )

    @staticmethod
    def _leak(context: KeysValues, graph: KeysValues) -> KeysValues:
        return tuple(
            (_StraightThrough.apply(k, graph_k), _StraightThrough.apply(v, graph_v))  # type: ignore[misc]
            for (k, v), (graph_k, graph_v) in zip(context, graph, strict=True)
        )


def loss_of(segment: int, video: Tensor, state: Tensor) -> Tensor:
    """A random linear functional of a segment's latents and state, another one for each segment."""
    draws = generator(100 + segment)
    weights = [torch.randn(part.shape, generator=draws, dtype=torch.float64) for part in (video, state)]
    return (weights[0] * video).sum() + (weights[1] * state).sum()


@remembered
def reference_gradients(case: Case) -> tuple[dict[str, Tensor], Reference]:
    network = wan()
    reference = Reference(network, case, case.inputs())
    losses = [loss_of(i, reference.latents[i], state) for i, state in zip(case.trained, reference.states, strict=True)]
    torch.stack(losses).sum().backward()
    return gradients(network), reference


def saving_network() -> WanModel:
    network = wan()
    recompute(network, [f"blocks.{i}" for i in range(SHAPE.blocks)])
    return network


GRADIENT_CASES = [
    Case(),
    Case(per_segment=1, exit_step=0, frames=4),
    Case(context_timestep=100.0, exit_step=2),
    Case(per_segment=1, window=2, sink=1, frames=5),
    # one, two and four steps, and a first segment with more of them
    Case(timesteps=(1000.0,), exit_step=0),
    Case(timesteps=FOUR, exit_step=3, frames=4),
    Case(timesteps=TWO, exit_step=1, first=FOUR, first_exit=2, frames=4, context_timestep=50.0),
    Case(per_segment=1, timesteps=(1000.0,), exit_step=0, first=FOUR, first_exit=3, frames=3),
    Case(timesteps=FOUR, exit_step=2, first=TWO, first_exit=0, frames=4),
    # longer than what is trained; caches that hold no more than backward reads, rings that overwrote the rest
    Case(gradient_from=2),
    Case(timesteps=TWO, first=FOUR, first_exit=1, gradient_from=4),
    Case(per_segment=1, exit_step=1, frames=6, gradient_from=3, window=2, held=4),
    Case(per_segment=1, exit_step=0, frames=8, gradient_from=5, window=3, sink=1, held=5),
    Case(per_segment=2, exit_step=0, frames=12, gradient_from=8, window=4, sink=2, held=6),
    Case(per_segment=1, exit_step=0, frames=8, gradient_from=5, window=2, sink=2),  # of sinks alone: all frames
]


def video_and_gradients(case: Case, cache: KVCache) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Video, states and the gradients of all losses from the code under test, with recomputation."""
    network = saving_network()
    video, states = rollout(causal(network), case.settings, case.inputs(), cache)
    parts = video.split(case.per_segment, dim=1)
    losses = [loss_of(i, parts[i], state) for i, state in zip(case.trained, states, strict=True)]
    torch.stack(losses).sum().backward()
    return video, states, gradients(network)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
@pytest.mark.parametrize("leaky", [False, True])
def test_joint_gradients_are_those_of_recomputed_prefixes(case: Case, leaky: bool) -> None:
    case = Case(**{**vars(case), "leaky": leaky})
    expected, reference = reference_gradients(case)
    video, states, found = video_and_gradients(case, case.cache())
    torch.testing.assert_close(video, torch.cat(reference.latents, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(states, reference.states, rtol=0, atol=1e-12)
    assert [part.requires_grad for part in video.split(1, dim=1)] == [True] * case.frames  # joined
    assert max(gradient.abs().max() for gradient in expected.values()) > 1
    assert largest_difference(found, expected) < 1e-10


@pytest.mark.parametrize("case", [case for case in GRADIENT_CASES if case.held and not case.sink], ids=str)
def test_a_cache_of_one_segment_less_would_spoil_the_gradient(case: Case) -> None:
    """Its values are right, and recomputation finds other ones: what a cache must hold is what `segments` says.

    It is the last segment's first denoising pass that writes over what an earlier segment with a graph saw."""
    assert case.held == case.frames - case.gradient_from - case.per_segment + case.window
    expected, reference = reference_gradients(case)
    video, _, found = video_and_gradients(case, case.cache(case.held - case.per_segment))
    torch.testing.assert_close(video, torch.cat(reference.latents, 1), rtol=0, atol=1e-12)
    assert largest_difference(found, expected) > 1e-3


@pytest.mark.parametrize("leaky", [False, True])
def test_nothing_before_the_gradient_gets_any(leaky: bool) -> None:
    """At exit step 0 the noise of a segment enters its exit pass and nothing else that has a graph."""
    case = Case(exit_step=0, leaky=leaky, gradient_from=2)
    inputs = case.inputs()
    noise = tensor(inputs.noise).requires_grad_()
    video, states = rollout(causal(saving_network()), case.settings, inputs, case.cache())
    assert len(states) == 2
    (gradient,) = torch.autograd.grad(video.square().sum(), noise)
    assert [bool(part.any()) for part in gradient[0].split(2, dim=1)] == [False, True, True]


def test_gradients_of_single_segments_are_exact_in_any_order_of_backward() -> None:
    case = Case()
    expected, _ = reference_gradients(case)
    for order in permutations(range(case.count)):
        network = saving_network()
        finished = list(segments(causal(network), case.settings, case.inputs(), case.cache(4)))
        for i in order:
            state = finished[i].state
            assert state is not None
            loss_of(i, finished[i].latents, state).backward()
        assert largest_difference(gradients(network), expected) < 1e-10, f"backward in order {order}"


def test_a_segment_may_go_backward_before_the_next_one_is_generated() -> None:
    case = Case()
    expected, _ = reference_gradients(case)
    network = saving_network()
    for i, segment in enumerate(segments(causal(network), case.settings, case.inputs(), case.cache(4))):
        assert segment.state is not None
        loss_of(i, segment.latents, segment.state).backward()
    assert largest_difference(gradients(network), expected) < 1e-10


@pytest.mark.parametrize("leaky", [False, True])
def test_only_leaky_gradients_reach_earlier_exit_passes(leaky: bool) -> None:
    """At exit step 0 the noise of a segment enters its exit pass and nothing else that has a graph."""
    case = Case(exit_step=0, leaky=leaky)
    inputs = case.inputs()
    noise = tensor(inputs.noise).requires_grad_()
    finished = list(segments(causal(saving_network()), case.settings, inputs, case.cache(4)))
    for i, segment in enumerate(finished):
        assert segment.state is not None
        loss = loss_of(i, segment.latents, segment.state)
        (gradient,) = torch.autograd.grad(loss, noise, retain_graph=leaky)
        reached = [bool(part.any()) for part in gradient[0].split(case.per_segment, dim=1)]
        assert reached == [j == i or (leaky and j < i) for j in range(case.count)]
        assert not gradient[1:].any()


def test_leaky_and_detached_rollouts_have_the_same_values() -> None:
    videos = [
        rollout(causal(saving_network()), case.settings, case.inputs(), case.cache(4))[0]
        for case in (Case(leaky=False), Case(leaky=True))
    ]
    assert torch.equal(videos[0], videos[1])


@torch.no_grad()
@pytest.mark.parametrize("per_segment", [1, 2, 3])
def test_a_one_step_rollout_is_the_fixed_point_of_teacher_forcing(per_segment: int) -> None:
    """Given its own output as clean video, the masked forward must find that output: no cache, no loop, one pass."""
    network, case = wan(), Case(per_segment=per_segment, exit_step=0)
    inputs = case.inputs()
    video, _ = rollout(causal(network), case.settings, inputs, case.cache(FRAMES - per_segment))
    timesteps = torch.full((1,), TIMESTEPS[0], dtype=torch.float64)
    noise = tensor(inputs.noise)[0]
    masked = network(noise, timesteps, inputs.text, clean=Clean(video), segment_frames=per_segment).velocity
    torch.testing.assert_close(noise - masked, video, rtol=0, atol=1e-11)


# --- windows -------------------------------------------------------------------------------------------------

WINDOWS = [(1, 3, 0), (1, 3, 1), (1, 2, 2), (2, 4, 0), (2, 4, 2), (2, 2, 2), (1, 0, 0)]


@torch.no_grad()
@pytest.mark.parametrize(("per_segment", "window", "sink"), WINDOWS)
def test_long_rollouts_see_a_window_with_sinks(per_segment: int, window: int, sink: int) -> None:
    """A ring that overwrites, a training cache that keeps all, and slices by frame index generate the same video."""
    network, case = wan(), Case(per_segment, 0, 0.0, False, window, sink, frames=10)
    expected = torch.cat(Reference(network, case, case.inputs()).latents, 1)
    past = case.frames - per_segment
    for frames in {past, window or past}:
        video, _ = rollout(causal(network), case.settings, case.inputs(), case.cache(frames))
        torch.testing.assert_close(video, expected, rtol=0, atol=1e-11)
    if window:
        unlimited, _ = rollout(causal(network), case.settings, case.inputs(), Case().cache(past))
        assert (unlimited - expected).abs().max() > 1e-6


def written(cache: KVCache, segment_frames: int, count: int) -> list[list[int]]:
    """Frames that each of `count` segments sees, from a cache whose values hold their frame's index."""
    seen = []
    size = cache.shape
    for segment in range(count):
        view = cache.view()[0]
        values = view.together(None)[1][0, :: size.tokens_per_frame, 0, 0].int().tolist() if view.past else []
        seen.append(sorted(values))
        if segment + 1 < count:
            frames = torch.arange(segment * segment_frames, (segment + 1) * segment_frames, dtype=torch.float32)
            keys = frames.repeat_interleave(size.tokens_per_frame).view(1, -1, 1, 1)
            keys = keys.expand(size.batch, -1, size.heads, size.head_dim)
            write(cache, ((keys, keys),) * size.blocks)
    return seen


@pytest.mark.parametrize(
    ("overrides", "fifth_segment_sees"),
    [
        ([], list(range(12))),
        (["rollout.window_frames=6"], [9, 10, 11]),
        (["rollout.window_frames=9"], [6, 7, 8, 9, 10, 11]),
        (["rollout.window_frames=9", "rollout.sink_frames=3"], [0, 1, 2, 9, 10, 11]),
        (["rollout.window_frames=6", "rollout.sink_frames=3"], [0, 1, 2]),
    ],
)
def test_caches_of_a_recipe_count_the_current_segment_into_the_window(
    overrides: list[str], fifth_segment_sees: list[int]
) -> None:
    recipe = load(SMALL, [*overrides, "parallel.compute_dtype=float32"]).recipe
    assert recipe.video.frames_per_segment == 3
    training = kv_cache(recipe, 2, 21, CPU)
    streaming = kv_cache(recipe, 2, 21, CPU, streaming=True)
    assert training.shape.frames == 18
    assert streaming.shape.frames == (recipe.rollout.window_frames - 3 if recipe.rollout.window_frames else 18)
    seen = written(training, 3, 7)
    assert seen == written(streaming, 3, 7)
    assert seen[4] == fifth_segment_sees


def views_of(case: Case, held: int) -> tuple[bool, bool]:
    """Whether a cache of so many frames changes, by the end of the rollout, what a segment with a graph was shown;
    and whether it was ever shown a copy. Passes without a graph write into the room, the last segment's too."""
    cache = case.cache(held)
    start, size = cache._store.data_ptr(), cache._store.nbytes
    shown, copied = [], False
    for segment in range(case.count):
        if segment in case.trained:
            view = cache.view()[0]
            parts = [part[:, a:b] for part in view[:2] for a, b in zip(view.past[::2], view.past[1::2], strict=True)]
            shown += [(part, part.clone()) for part in parts]
            copied |= any(not start <= part.data_ptr() < start + size for part in parts)
        own = latents(segment, 1, case.per_segment).flatten()[: case.per_segment * TOKENS]
        own = own.view(1, -1, 1, 1).expand(-1, -1, SHAPE.heads, SHAPE.dim // SHAPE.heads)
        write(cache, ((own, own),) * SHAPE.blocks)
    return any(not torch.equal(part, then) for part, then in shown), copied


@pytest.mark.parametrize(("window", "sink"), [(0, 0), (1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2), (1, 1), (2, 2)])
def test_what_a_cache_must_hold_for_backward(window: int, sink: int) -> None:
    """All lengths of a rollout and of what is trained of it, in segments: enough is enough, and less is not."""
    smaller = set()
    for count in range(2, 13):
        for trained in range(1, count + 1):
            case = Case(2, window=2 * window, sink=2 * sink, frames=2 * count, gradient_from=2 * (count - trained))
            kept = kept_frames(case.frames, 2 * trained, 2, case.window, case.sink)
            assert kept <= case.frames - 2
            assert views_of(case, kept) in ([(False, True), (False, False)] if sink else [(False, False)]), case
            smaller.add(kept < case.frames - 2)
            if window > 1 and not sink and trained > 1 and case.window < kept - 2 and case.gradient_from:
                assert views_of(case, kept - 2) != (False, False), case
    assert smaller == ({False} if window in (0, sink) else {True, False})


def test_what_the_cache_of_a_long_rollout_holds() -> None:
    assert kept_frames(21, 21, 3, 18) == 18
    assert kept_frames(63, 21, 3, 18) == 36
    assert kept_frames(252, 21, 3, 18) == 36
    assert kept_frames(252, 21, 3, 0) == 249


def test_settings_of_a_recipe_are_warped() -> None:
    recipe = load(SMALL, ["rollout.steps=[1000, 750, 500, 250]", "flow.shift=5", "rollout.kv_grad=leaky"]).recipe
    settings = rollout_settings(recipe)
    assert settings.timesteps == pytest.approx((1000, 937.5, 2500 / 3, 625))
    assert (settings.frames_per_segment, settings.context_timestep, settings.leaky) == (3, 0.0, True)


# --- what of a long rollout is scored ------------------------------------------------------------------------


def test_a_long_rollout_is_scored_as_a_video_that_begins_with_a_picture() -> None:
    vae = LinearVae()
    rolled = 0.1 * torch.randn(2, 9, 16, 2, 3, generator=generator(1))
    rolled.requires_grad_()
    clip = scored_clip(rolled, 6, 3, lambda latents: vae.encode(vae.decode(latents)[:, -1:]))
    assert torch.equal(clip.latents[:, 1:], rolled[:, 4:])
    pictures = vae.decode(rolled)
    torch.testing.assert_close(vae.decode(clip.latents), pictures[:, 12:], rtol=0, atol=1e-5)
    assert pictures[:, 12:].shape[1] == 1 + 4 * 5
    assert clip.gradient_mask is not None
    assert clip.gradient_mask.tolist() == [False] * 3 + [True] * 3
    (gradient,) = torch.autograd.grad(clip.latents.sum(), rolled)
    assert gradient[:, 4:].eq(1).all() and not gradient[:, :4].any()


def test_the_picture_is_made_without_graph_of_all_frames_up_to_it() -> None:
    rolled = latents(1, 2, 5).bfloat16().requires_grad_()
    asked = []

    def as_image(prefix: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        asked.append(prefix)
        return torch.full_like(prefix[:, :1], 7.0, dtype=torch.float32)  # an autoencoder computes in float32

    clip = scored_clip(rolled, 3, 1, as_image)
    assert clip.latents.dtype == torch.bfloat16 and clip.latents[:, 0].eq(7).all()
    assert torch.equal(asked[0], rolled[:, :3]) and not asked[0].requires_grad


def test_a_rollout_as_long_as_what_is_trained_is_scored_as_it_is() -> None:
    def never(prefix: Tensor) -> Tensor:
        raise AssertionError

    rolled = latents(1, 1, 6)
    clip = scored_clip(rolled, 6, 2, never)
    assert clip.latents is rolled and clip.gradient_mask is None
    with pytest.raises(ValueError, match="a rollout of 6 frames has no last 8 frames"):
        scored_clip(rolled, 8, 2, never)


# --- noise that comes when it is needed, and segments that are given -----------------------------------------


@pytest.mark.parametrize("with_gradient", [True, False])
def test_noise_drawn_by_segment_is_the_noise_of_one_tensor(with_gradient: bool) -> None:
    case = Case(context_timestep=100.0)
    inputs, asked = case.inputs(), []

    def draw(first: int) -> Tensor:
        asked.append(first)
        return tensor(inputs.noise)[:, :, first : first + case.per_segment]

    drawn = inputs._replace(noise=DrawnNoise(case.frames, draw))
    with torch.set_grad_enabled(with_gradient):
        expected, states = rollout(causal(wan()), case.settings, inputs, case.cache(4))
        stream = segments(causal(wan()), case.settings, drawn, case.cache(4))
        video = [next(stream)]
        assert asked == [0]  # nothing is drawn before its time
        video += stream
    assert torch.equal(torch.cat([segment.latents for segment in video], 1), expected)
    assert all(torch.equal(segment.state, state) for segment, state in zip(video, states, strict=True))  # type: ignore[arg-type]
    assert asked == [0, 2, 4]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("leaky", [True, False])
def test_given_segments_are_cached_as_generated_ones_are(count: int, leaky: bool) -> None:
    """A rollout that is given its own beginning goes on as it did."""
    case = Case(context_timestep=100.0, leaky=leaky, window=2, sink=2)
    whole, states = rollout(causal(wan()), case.settings, case.inputs(), case.cache(4))
    given = whole[:, : count * case.per_segment].detach()
    video, later = rollout(causal(wan()), case.settings, case.inputs()._replace(given=given), case.cache(4))
    assert torch.equal(video, whole)
    assert len(later) == case.count - count and all(map(torch.equal, later, states[count:]))


def test_given_segments_get_a_context_pass_and_no_other() -> None:
    settings = RolloutSettings(TIMESTEPS, 2, context_timestep=100.0)
    network, cache = Recorder(), KVCache(CacheShape(1, 2, 6, 2, 1, 1, 1), CPU, torch.float64)
    noise = torch.randn(4, 2, 6, 3, 2, 2, dtype=torch.float64, generator=generator(0))
    given = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64, generator=generator(1))
    with torch.no_grad():
        stream = segments(network, settings, RolloutInputs(noise, torch.zeros(2, 1, 1), 2, given=given), cache)
        assert torch.equal(next(stream).latents, given)
        # it comes after its pass, so that what is measured until the next segment is that segment's own
        assert [(call.first_frame, call.timestep) for call in network.calls] == [(0, 100.0)]
        next(stream)
    torch.testing.assert_close(network.calls[0].latent, 0.9 * given + 0.1 * noise[3][:, :2], rtol=0, atol=1e-15)
    assert [call.first_frame for call in network.calls[1:]] == [2, 2, 2]
    assert all(call.text_cached for call in network.calls[1:])


@pytest.mark.parametrize("frames", [1, 3, 6, 8])
def test_given_frames_that_are_no_whole_segments_or_the_whole_video_are_refused(frames: int) -> None:
    case = Case()
    inputs = case.inputs()._replace(given=torch.zeros(1, frames, 4, 4, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=f"{frames} given frames are not whole segments of 2 before the end of 6"):
        next(segments(causal(wan()), case.settings, inputs, case.cache(4)))
