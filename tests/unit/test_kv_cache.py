"""The cache of finished segments: a ring with sinks shows exactly the frames it should, and writes are its owner's."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirai_dist.method.rollout import Past, RolloutInputs, RolloutSettings, rollout
from mirai_dist.models.wan import Capture, History, KVCache, WanModel, WanOutput
from mirai_dist.models.wan.kv_cache import CacheShape, KeysValues, turned
from mirai_dist.models.wan.model import WanBlock
from mirai_dist.models.wan.rope import rotary_table, rotate
from mirai_dist.models.wan.token_ops import PLAIN, layer_norm, modulate, per_frame
from mirai_kernels.chunk_attention.reference import chunk_attention
from tests import tiny_wan
from tests.live_bytes import LiveBytes
from tests.tiny_wan import fill_room, write

BLOCKS, TOKENS, HEADS, WIDTH = 2, 2, 2, 8  # of the 8 channels of a head, 4 turn with time
CPU = torch.device("cpu")


def cache(frames: int, room: int, sink: int = 0, window: int = 0) -> KVCache:
    return KVCache(CacheShape(BLOCKS, 1, frames, room, TOKENS, HEADS, WIDTH, sink, window), CPU, torch.float64)


def frame(index: int) -> KeysValues:
    """Keys and values of one frame, recognisable by the frame's index."""
    draws = torch.Generator().manual_seed(index)
    size = (2 * BLOCKS, 1, TOKENS, HEADS, WIDTH)
    flat = [index + 0.1 * torch.randn(size[1:], generator=draws, dtype=torch.float64) for _ in range(size[0])]
    return tuple((flat[2 * block], flat[2 * block + 1]) for block in range(BLOCKS))


def joined(frames: list[int], later: int = 0, sinks: int = 0) -> KeysValues:
    """Keys and values of frames, the keys of the first `sinks` ones turned by `later` frames."""
    parts = [frame(index) for index in frames]
    empty = torch.zeros(1, 0, HEADS, WIDTH, dtype=torch.float64)
    return tuple(
        (
            torch.cat([empty, *(spun(p[block][0], later if i < sinks else 0) for i, p in enumerate(parts))], 1),
            torch.cat([empty, *(p[block][1] for p in parts)], 1),
        )
        for block in range(BLOCKS)
    )


def spun(keys: Tensor, frames: int) -> Tensor:
    """Keys as complex numbers, multiplied by a unit one: pairs 0 and 1 of 4 turn by `frames` and `frames` / 100."""
    pairs = torch.view_as_complex(keys.unflatten(-1, (-1, 2)))
    angles = torch.tensor([frames, frames / 100, 0, 0], dtype=torch.float64)
    return torch.view_as_real(pairs * torch.polar(torch.ones(4, dtype=torch.float64), angles)).flatten(-2)


def together(held: KVCache, room: int = 0) -> KeysValues:
    """All keys and values of past frames that the next segment sees."""
    return tuple(each._replace(room=()).together(None) for each in held.view(room) if each.past)


def shown(held: KVCache, room: int = 0) -> list[int]:
    """Frame indices in the order the cache shows them; every token and block must agree on them."""
    seen = [[]] * (not held.visible_frames())
    for _, values in together(held, room):
        indices = values.mean(dim=(0, 2, 3)).round().to(torch.int64).view(-1, TOKENS)
        assert (indices == indices[:, :1]).all()
        seen.append(indices[:, 0].tolist())
    assert all(each == seen[0] for each in seen)
    return seen[0]


@dataclass(frozen=True)
class Plan:
    """A rollout: segments of `length` frames; a window of past frames (0: all), of which the first are sinks."""

    length: int
    segments: int
    window: int
    sink: int
    streaming: bool

    @property
    def frames(self) -> int:
        past = (self.segments - 1) * self.length
        return min(self.window, past) if self.window and self.streaming else past

    def visible(self, first: int) -> list[int]:
        """What the segment that starts at frame `first` may see: the sinks, and the newest frames of the window."""
        if not self.window:
            return list(range(first))
        oldest = max(self.sink, first - (self.window - self.sink))
        return [*range(min(self.sink, first)), *range(oldest, first)]

    def later(self, first: int) -> int:
        """By how many frames the sinks are shown late: they end where the newest frames begin."""
        return max(0, first - self.window) if self.window and self.sink else 0


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    length, segments = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    window = draw(st.integers(0, 4)) * length
    sink = draw(st.integers(0, window // length)) * length
    return Plan(length, segments, window, sink, draw(st.booleans()))


@settings(max_examples=150, deadline=None)
@given(plan=plans())
def test_a_segment_sees_the_frames_of_its_window(plan: Plan) -> None:
    held = cache(plan.frames, plan.length, plan.sink, plan.window)
    room = plan.length if plan.streaming else 0
    for first in range(0, plan.length * plan.segments, plan.length):
        assert sorted(shown(held, room)) == plan.visible(first)
        visible = joined(plan.visible(first), plan.later(first), plan.sink)
        for (keys, values), (all_keys, all_values) in zip(together(held, room), visible, strict=bool(first)):
            q, own = torch.ones(1, 1, HEADS, WIDTH, dtype=torch.float64), frame(first)[0]
            attended = chunk_attention(q, own, (keys, values))
            expected = chunk_attention(q, own, (all_keys, all_values))
            torch.testing.assert_close(attended, expected, rtol=0, atol=1e-12)
        own = list(range(first, first + plan.length))
        write(held, joined(own))
        assert held.frames_written == first + plan.length


@settings(max_examples=100, deadline=None)
@given(plan=plans())
def test_what_a_pass_writes_it_sees_beside_what_came_before(plan: Plan) -> None:
    """In as few runs as it lies in, and never over a frame that it sees."""
    held = cache(plan.frames, plan.length, plan.sink, plan.window)
    for first in range(0, plan.length * plan.segments, plan.length):
        own = joined(list(range(first, first + plan.length)))
        visible = joined(plan.visible(first), plan.later(first), plan.sink)
        views = held.view(room=plan.length)
        fill_room(views, own)
        for view, written, before in zip(views, own, visible, strict=True):
            expected = torch.cat((before[0], written[0]), 1), torch.cat((before[1], written[1]), 1)
            q = torch.ones(1, 1, HEADS, WIDTH, dtype=torch.float64)
            found = chunk_attention(q, view.together(None))
            torch.testing.assert_close(found, chunk_attention(q, expected), rtol=0, atol=1e-12)
            assert len(view.runs) <= 6 and view.runs == tuple(sorted(set(view.runs)))
        held.keep(views)


def test_nothing_is_copied_while_a_ring_fills_and_when_it_is_full() -> None:
    held = cache(4, 1, sink=1, window=4)
    start, size = held._store.data_ptr(), held._store.nbytes
    for index, expected in enumerate([[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5], [0, 4, 5, 6]]):
        write(held, frame(index))
        assert sorted(shown(held, room=1)) == expected
        for view in held.view(room=1):
            pieces = [view.keys, view.values, *(part for slot in view.slots() for part in slot)]
            assert all(start <= part.data_ptr() < start + size for part in pieces)
            seen = view.together(None)[0]
            assert view.runs == (0, seen.shape[1])  # one piece, room and all
            assert start <= seen.data_ptr() < start + size


def test_a_segment_that_wraps_around_the_ring_is_written_in_two_pieces() -> None:
    """Frame 5 behind frame 4, and frame 6 where the ring begins, over frame 1, which is seen no longer."""
    held = cache(4, 2, sink=1, window=4)
    write(held, joined([0]))
    for first in (1, 3):
        write(held, joined([first, first + 1]))
    assert sorted(shown(held, room=2)) == [0, 2, 3, 4]
    (view, _) = held.view(room=2)
    assert view.room == (5 * TOKENS, 6 * TOKENS, TOKENS, 2 * TOKENS)
    write(held, joined([5, 6]))
    placed = held._store[0, 1, 0].mean(dim=(1, 2)).round().view(-1, TOKENS)[:, 0]
    assert placed.tolist() == [0, 6, 2, 3, 4, 5]


def test_reset_forgets() -> None:
    held = cache(3, 3)
    write(held, joined([5, 6, 7]))
    held.reset()
    assert held.frames_written == 0 and shown(held) == []
    write(held, frame(1))
    assert shown(held) == [1]


def test_nothing_is_visible_before_the_first_write_although_the_memory_is_raw() -> None:
    held = cache(3, 1)
    held._store.fill_(float("nan"))
    assert all(view.past == view.runs == () for view in held.view())
    own = torch.ones(1, 1, HEADS, WIDTH), torch.ones(1, 1, HEADS, WIDTH)
    assert all(view.together(own) is own for view in held.view())
    write(held, frame(2))
    assert all(part.isfinite().all() for pair in together(held) for part in pair)


def test_a_segment_longer_than_the_room_is_refused() -> None:
    with pytest.raises(ValueError, match="a segment of 3 frames, and room for 2 beside what is seen"):
        cache(4, 2, sink=2, window=4).view(room=3)


def test_what_is_written_again_replaces_what_was_and_only_what_is_kept_counts() -> None:
    held = cache(2, 1)
    write(held, frame(0))
    for index in (7, 1):  # a denoising pass, and the context pass after it
        views = held.view(room=1)
        fill_room(views, frame(index))
    assert held.frames_written == 1
    held.keep(views)
    assert shown(held) == [0, 1]


# --- sinks: where a slid window shows them -------------------------------------------------------------------


def test_turning_a_rotated_key_is_rotating_it_at_the_later_frame() -> None:
    keys = torch.randn(1, 6, 2, 20, dtype=torch.float64, generator=tiny_wan.generator(1))
    at = [rotate(keys, rotary_table((1, 2, 3), first, 20, CPU, torch.float64)) for first in (4, 905)]
    torch.testing.assert_close(turned(at[0], 901), at[1], rtol=0, atol=1e-12)
    single = turned(at[0].to(torch.bfloat16), 901)
    assert single.dtype == torch.bfloat16
    assert torch.equal(single[..., 8:], at[0].to(torch.bfloat16)[..., 8:])  # rows and columns stay
    exact = turned(at[0].to(torch.bfloat16).double(), 901).to(torch.bfloat16)
    assert (single != exact).float().mean() < 0.01  # computed in more than bfloat16


def test_turned_sinks_start_from_the_stored_keys_every_time() -> None:
    """After 500 turns in bfloat16 a sink is what one turn makes of it, to the bit; and a reset brings it back."""
    held = KVCache(CacheShape(BLOCKS, 1, 3, 1, TOKENS, HEADS, WIDTH, 1, 3), CPU, torch.bfloat16)
    for index in range(503):
        write(held, frame(index))
        view = held.view(room=1)
    assert held.sink_shift == 500
    for block in range(BLOCKS):
        expected = turned(frame(0)[block][0].to(torch.bfloat16), 500)
        assert torch.equal(view[block].keys[:, :TOKENS], expected)
    held.reset()
    write(held, frame(7))
    assert held.sink_shift == 0
    assert torch.equal(held.view(room=1)[0].keys[:, :TOKENS], frame(7)[0][0].to(torch.bfloat16))
    for index in range(8, 13):
        write(held, frame(index))
    assert torch.equal(held.view(room=1)[0].keys[:, :TOKENS], turned(frame(7)[0][0].to(torch.bfloat16), 3))


@pytest.mark.parametrize(("window", "sink"), [(2, 1), (2, 2)])
def test_what_a_training_cache_has_shown_stays_as_it_was(window: int, sink: int) -> None:
    """Backward reads what each segment saw: once a pass with gradient has seen sinks, none is turned in place."""
    held = cache(6, 1, sink, window)
    views = []
    for index in range(6):
        views.append([(*pair, *(part.clone() for part in pair)) for pair in together(held)])
        assert sorted(shown(held, room=1)) == held.visible_frames()
        write(held, frame(index))
    for view in views:
        for keys, values, keys_then, values_then in view:
            assert torch.equal(keys, keys_then) and torch.equal(values, values_then)


def test_a_cache_lets_go_of_a_copy_that_was_not_kept() -> None:
    """As that of a rollout's last segment, which would lie beside the scores and all of backward."""
    held = cache(6, 2, sink=1, window=3)
    for index in range(4):
        held.view()
        write(held, frame(index))
    with LiveBytes() as follower:
        views = held.view(room=2)
        copied = follower.now
        assert copied >= BLOCKS * 2 * (3 + 2) * TOKENS * HEADS * WIDTH * 8
        fill_room(views, joined([4, 5]))
        held.keep(views)
        assert shown(held) == [0, 4, 5]
        views = held.view(room=2)
        del views
        assert follower.now < copied


def test_only_what_was_written_is_kept() -> None:
    held = cache(4, 1)
    with pytest.raises(ValueError, match="nothing was written to be kept: these views have no room"):
        held.keep(held.view())


@torch.no_grad()
def reference(network: WanModel, settings: RolloutSettings, inputs: RolloutInputs, window: int, sink: int) -> Tensor:
    """The rollout as the page of mirai_dist/sample.py says it: keys kept without any rotation, each rotated at the
    frame where it is to be seen, attention written out, everything computed anew in every pass."""
    length, total = settings.frames_per_segment, inputs.frames
    raw: list[list[tuple[Tensor, Tensor]]] = []  # a frame, a block
    video = []

    def forward(latent: Tensor, timestep: float, first: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        past = min(first, window - length) if window else first
        sinks = min(sink, first)
        seen = [*range(sinks), *range(first - (past - sinks), first)]
        places = torch.arange(first - past, first + length)
        x, grid = network._embed_patches(latent)
        time = network._embed_time(torch.full((1, 1), timestep, dtype=torch.float64), x.dtype)
        shared, text = network.time_projection(time).unflatten(-1, (6, -1)), network.text_embedding(inputs.text)
        own: list[tuple[Tensor, Tensor]] = []
        for index, block in enumerate(network.blocks):
            assert isinstance(block, WanBlock)
            shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (block.modulation + shared).unbind(2)
            normed = modulate(layer_norm(x), shift_a, scale_a)
            own.append(PLAIN.keys_values(block.self_attn, normed))
            keys, values = (torch.cat([*(raw[f][index][i] for f in seen), own[-1][i]], 1) for i in range(2))
            queries = placed(PLAIN.queries(block.self_attn, normed), places[-length:])
            x = x + per_frame(block.self_attn.output(attention(queries, placed(keys, places), values)), gate_a)
            queries = PLAIN.queries(block.cross_attn, block.norm3(x))
            x = x + block.cross_attn.output(attention(queries, *PLAIN.keys_values(block.cross_attn, text)))
            x = x + per_frame(block.ffn(modulate(layer_norm(x), shift_f, scale_f)), gate_f)
        return network._unpatchify(network.head(x, time), grid), own

    for first in range(0, total, length):
        noise = inputs.segment_noise(first, length)
        clean = torch.zeros_like(noise[0])  # the first timestep is 1000, where nothing but noise is left
        for step, timestep in enumerate(settings.timesteps):
            sigma = timestep / 1000
            noisy = (1 - sigma) * clean + sigma * noise[step]
            clean = noisy - sigma * forward(noisy, timestep, first)[0]
        video.append(clean)
        sigma = settings.context_timestep / 1000
        own = forward((1 - sigma) * clean + sigma * noise[-1], settings.context_timestep, first)[1]
        for f in range(length):
            tokens = slice(f * tiny_wan.TOKENS, (f + 1) * tiny_wan.TOKENS)
            raw.append([(keys[:, tokens], values[:, tokens]) for keys, values in own])
    return torch.cat(video, 1)


def placed(keys: Tensor, frames: Tensor) -> Tensor:
    """Unrotated [B, frames x TOKENS, heads, 20] rotated at `frames`: 4 pairs by time, 3 by row, 3 by column."""
    at = torch.cartesian_prod(frames.double(), *(torch.arange(n).double() for n in (tiny_wan.ROWS, tiny_wan.COLUMNS)))
    angles = [at[:, [axis]] * 10000.0 ** (-torch.arange(n).double() / n) for axis, n in enumerate((4, 3, 3))]
    turn = torch.cat(angles, 1)[None, :, None]
    even, odd = keys[..., ::2], keys[..., 1::2]
    return torch.stack((even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()), -1).flatten(-2)


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", queries, keys).div(queries.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


@torch.no_grad()
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("length", "window", "sink"), [(1, 0, 0), (1, 4, 0), (1, 4, 1), (1, 4, 2), (1, 4, 3), (2, 6, 2), (2, 4, 2)]
)
def test_rollouts_equal_the_written_definition_of_window_and_sinks(
    length: int, window: int, sink: int, streaming: bool
) -> None:
    network, shape, total = tiny_wan.wan(), tiny_wan.SHAPE, 10
    settings = RolloutSettings((1000.0, 700.0), length, context_timestep=50.0)
    noise = torch.stack([tiny_wan.latents(10 + i, 1, total) for i in range(3)])
    inputs = RolloutInputs(noise, tiny_wan.prompts(2, 1), exit_step=1)
    past = window - length if window else 0
    held = past if streaming and window else total - length
    heads = (shape.heads, shape.dim // shape.heads)
    sizes = CacheShape(shape.blocks, 1, held, length, tiny_wan.TOKENS, *heads, sink, past)
    kept = KVCache(sizes, CPU, torch.float64)

    def causal(latent: Tensor, timesteps: Tensor, text: Tensor, past: Past, capture: int) -> WanOutput:
        return network(latent, timesteps, text, history=History(*past), capture=Capture(capture))

    expected = reference(network, settings, inputs, window, sink)
    for _ in range(2):  # a cache is used again
        video, _ = rollout(causal, settings, inputs, kept)
        assert (video - expected).abs().max() < 1e-10
