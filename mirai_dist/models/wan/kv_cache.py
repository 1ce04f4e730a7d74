"""Keys and values of finished segments: preallocated once, reused by every rollout, indexed by Python ints.

A pass without gradient writes its segment's keys and values where they belong in the cache, in room that no visible
frame lies in, and reads them there with all earlier ones: nothing is copied. What a context pass wrote last stays
(`keep`). A pass with gradient writes nothing, so recomputation in backward replays no write: it keeps its own keys and
values beside the cache. Keys are stored rotated at their absolute frame, and attention over keys does not depend on
their order, so a full ring needs no moves: what a segment sees is a few runs of tokens of the same memory.

Positions: a segment that starts at frame n and sees a window of W past frames, S of them sinks, attends to the
frames n - (W - S) .. n - 1 where they are, and once n > W to the sinks as if they were the frames n - W ..
n - (W - S) - 1, directly before them: no distance ever exceeds those of an unslid window. Turning a rotated key
by more frames is another rotation, of its time channels alone; it starts from the stored key every time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mirai_dist.models.wan.rope import THETA, axis_widths, rotate
from mirai_dist.models.wan.token_ops import fill

KeysValues = tuple[tuple[Tensor, Tensor], ...]  # one (keys, values) pair a block, each [B, tokens, heads, head_dim]


class Held(NamedTuple):
    """What one block's segment attends to, where it lies: keys and values [B, capacity, heads, head_dim].

    past: the runs of tokens that it sees, first, end, a pair a run. room: runs for its own tokens, in their order,
    which the pass writes and then sees too; none for a pass that has keys and values of its own beside.
    """

    keys: Tensor
    values: Tensor
    past: tuple[int, ...] = ()
    room: tuple[int, ...] = ()

    @property
    def runs(self) -> tuple[int, ...]:
        """All that is seen, in as few runs as there are, by their place."""
        return tuple(edge for run in _joined(sorted(_pairs(self.past + self.room))) for edge in run)

    def slots(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, tokens, heads, head_dim] of each run of the room, as views to write."""
        return self._pieces(self.room)

    def together(self, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Keys and values of all that is seen, and then `own` ones: a view where they lie in one piece, else a copy."""
        pieces = self._pieces(self.runs) + ([own] if own else [])
        if len(pieces) == 1:
            return pieces[0]
        keys, values = zip(*pieces, strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def _pieces(self, runs: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        return [(self.keys[:, a:b], self.values[:, a:b]) for a, b in _pairs(runs)]


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a cache. Frames are latent frames, of which it holds `frames` past ones, and room for a segment of
    `room`; `window` and `sink` follow `KVCache`."""

    blocks: int
    batch: int
    frames: int
    room: int
    tokens_per_frame: int
    heads: int
    head_dim: int
    sink: int = 0
    window: int = 0


class KVCache:
    """Keys and values of `shape.frames` past latent frames a block, and room for those of the present segment.

    `shape.window` limits how many past frames a segment sees (0: all that are held), the first `shape.sink`
    frames always among them. When more frames are written than fit, the oldest non-sink frame is overwritten.
    """

    def __init__(self, shape: CacheShape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = shape
        tokens = (shape.frames + shape.room) * shape.tokens_per_frame
        size = (shape.blocks, 2, shape.batch, tokens, shape.heads, shape.head_dim)
        self._store = torch.empty(size, device=device, dtype=dtype)
        self._written = 0
        self._sink_keys: Tensor | None = None  # as they were written, once the store shows them turned
        self._read_again = False  # whether backward may read the store's sinks as they were written

    @property
    def frames_written(self) -> int:
        """Frames written since the last reset; also the absolute index of the next frame."""
        return self._written

    @property
    def bytes(self) -> int:
        """Memory the cache takes from the beginning; sinks that a streaming cache turns are kept twice."""
        return self._store.nbytes

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self._written = 0
        self._sink_keys = None
        self._read_again = False

    def _slot(self, frame: int) -> int:
        if frame < self.shape.sink:
            return frame
        return self.shape.sink + (frame - self.shape.sink) % (self.shape.frames + self.shape.room - self.shape.sink)

    def _oldest(self) -> int:
        """Absolute index of the oldest visible frame that is not a sink."""
        held = self.shape.frames - self.shape.sink
        shown = min(held, self.shape.window - self.shape.sink if self.shape.window else held)
        return max(self._written - shown, self.shape.sink)

    @property
    def sink_shift(self) -> int:
        """Frames by which the sinks are shown later than they were written: 0 until the window slides."""
        return self._oldest() - self.shape.sink if self.shape.sink else 0

    def visible_frames(self) -> list[int]:
        """Absolute indices of the frames the next segment may attend to, in the order of time."""
        return [*range(min(self.shape.sink, self._written)), *range(self._oldest(), self._written)]

    def view(self, room: int = 0) -> tuple[Held, ...]:
        """What the next segment may attend to, a block, with room for `room` frames of its own (0: it writes nothing).

        With room it is valid until the next view. Without, it is what a pass with gradient reads, and reads again in
        backward: it stays until the next reset, or the ring overwrites its frames. So it is a copy where it shows
        sinks turned, and sinks that it showed as they are will not be turned in place. ValueError for a segment that
        is longer than the room there is.
        """
        if room > self.shape.room:
            raise ValueError(f"a segment of {room} frames, and room for {self.shape.room} beside what is seen")
        past = self._runs(sorted(self._slot(frame) for frame in self.visible_frames()))
        if self.sink_shift and (self._read_again or not room):
            return self._copied(past, room)
        if self.sink_shift:
            self._turn_sinks(self._store)
        self._read_again |= not room
        own = self._runs([self._slot(self._written + i) for i in range(room)])
        return tuple(Held(block[0], block[1], past, own) for block in self._store)

    def _copied(self, past: tuple[int, ...], room: int) -> tuple[Held, ...]:
        """The same in memory of its own, with the sinks turned there."""
        pieces = [self._store[:, :, :, a:b] for a, b in _pairs(past)]
        own = pieces[0].new_empty(*self._store.shape[:3], room * self.shape.tokens_per_frame, *self._store.shape[4:])
        store = torch.cat((*pieces, own), dim=3)
        self._turn_sinks(store)
        seen = store.shape[3] - own.shape[3]
        runs = (seen, store.shape[3]) if room else ()
        return tuple(Held(block[0], block[1], (0, seen), runs) for block in store)

    def placed(self, keys_values: KeysValues) -> tuple[Held, ...]:
        """Keys and values of `visible_frames`, in that order and as they were written, as `view` shows them: with the
        sinks turned, differentiable, and without room."""
        shift, width = self.sink_shift, self.shape.sink * self.shape.tokens_per_frame
        if shift:
            keys_values = tuple(
                (torch.cat((turned(keys[:, :width], shift), keys[:, width:]), dim=1), values)
                for keys, values in keys_values
            )
        return tuple(Held(keys, values, (0, keys.shape[1])) for keys, values in keys_values)

    @torch.no_grad()
    def _turn_sinks(self, store: Tensor) -> None:
        """Overwrite the sinks' keys in what `view` shows, which may be the store itself."""
        width = self.shape.sink * self.shape.tokens_per_frame
        if self._sink_keys is None:
            self._sink_keys = self._store[:, 0, :, :width].clone()
        for block, keys in zip(store, self._sink_keys, strict=True):
            block[0, :, :width] = turned(keys, self.sink_shift)

    @torch.no_grad()
    def keep(self, views: Sequence[Held]) -> None:
        """Count what was written into the room of these views, which `view` gave last: its frames are the newest past
        ones now. ValueError for views without room."""
        tokens = sum(end - first for first, end in _pairs(views[0].room))
        if not tokens:
            raise ValueError("nothing was written to be kept: these views have no room")
        frames = tokens // self.shape.tokens_per_frame
        own = self._runs([self._slot(self._written + i) for i in range(frames)])
        if views[0].keys.untyped_storage().data_ptr() != self._store.untyped_storage().data_ptr():
            for view, block in zip(views, self._store, strict=True):
                fill(Held(block[0], block[1], room=own).slots(), view.slots()[0])  # a copy has one slot
        self._written += frames

    def _runs(self, slots: list[int]) -> tuple[int, ...]:
        """Runs of tokens of frames that lie in these slots, in the order given."""
        width = self.shape.tokens_per_frame
        runs = _joined((slot * width, (slot + 1) * width) for slot in slots)
        return tuple(edge for run in runs for edge in run)


def turned(keys: Tensor, frames: int) -> Tensor:
    """Rotated keys [B, N, heads, head_dim] as they would be `frames` later: their time channels turn, in at least
    float32."""
    width, _, _ = axis_widths(keys.shape[-1])
    table = _turn(width, frames, keys.device, torch.promote_types(keys.dtype, torch.float32))
    return torch.cat((rotate(keys[..., :width], table), keys[..., width:]), dim=-1)


@lru_cache(maxsize=8)
def _turn(width: int, frames: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, width / 2] by which `width` time channels turn in `frames` frames."""
    frequency = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = (frames * frequency).unsqueeze(0)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def _joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same runs, each one joined with the next where that begins as it ends."""
    joined: list[tuple[int, int]] = []
    for first, end in runs:
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return joined


def _pairs(runs: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip(runs[::2], runs[1::2], strict=True))
