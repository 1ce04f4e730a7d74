"""Keys and values of finished segments: preallocated once, reused by every rollout, indexed by Python ints.

The cache is only ever written by its owner, between network calls, from what a context pass returned. No
network writes into it, so recomputation in backward replays no write. Keys are stored already rotated at
their absolute frame, and attention over keys does not depend on their order, so a full ring needs no moves.

Positions: a segment that starts at frame n and sees a window of W past frames, S of them sinks, attends to the
frames n - (W - S) .. n - 1 where they are, and once n > W to the sinks as if they were the frames n - W ..
n - (W - S) - 1, directly before them: no distance ever exceeds those of an unslid window. Turning a rotated key
by more frames is another rotation, of its time channels alone; it starts from the stored key every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mirai_dist.models.wan.rope import THETA, axis_widths, rotate

KeysValues = tuple[tuple[Tensor, Tensor], ...]  # one (keys, values) pair a block, each [B, tokens, heads, head_dim]


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a cache. Frames are latent frames; `window` and `sink` follow `KVCache`."""

    blocks: int
    batch: int
    frames: int
    tokens_per_frame: int
    heads: int
    head_dim: int
    sink: int = 0
    window: int = 0


class KVCache:
    """Keys and values of `shape.frames` latent frames a block.

    `shape.window` limits how many past frames a segment sees (0: all that are held), the first `shape.sink`
    frames always among them. When more frames are written than fit, the oldest non-sink frame is overwritten.
    """

    def __init__(self, shape: CacheShape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = shape
        size = (shape.blocks, 2, shape.batch, shape.frames * shape.tokens_per_frame, shape.heads, shape.head_dim)
        self._store = torch.empty(size, device=device, dtype=dtype)
        self._written = 0
        self._sink_keys: Tensor | None = None  # as they were written, once the store shows them turned

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

    def _slot(self, frame: int) -> int:
        if frame < self.shape.sink:
            return frame
        return self.shape.sink + (frame - self.shape.sink) % (self.shape.frames - self.shape.sink)

    def _oldest(self) -> int:
        """Absolute index of the oldest visible frame that is not a sink."""
        ring = self.shape.frames - self.shape.sink
        shown = min(ring, self.shape.window - self.shape.sink if self.shape.window else ring)
        return max(self._written - shown, self.shape.sink)

    @property
    def sink_shift(self) -> int:
        """Frames by which the sinks are shown later than they were written: 0 until the window slides."""
        return self._oldest() - self.shape.sink if self.shape.sink else 0

    def visible_frames(self) -> list[int]:
        """Absolute indices of the frames the next segment may attend to, in the order of time."""
        return [*range(min(self.shape.sink, self._written)), *range(self._oldest(), self._written)]

    def view(self) -> KeysValues:
        """What the next segment may attend to: views of the store where slots are contiguous, else one copy.

        Valid until the next call or write where the ring has overwritten frames, else until the next reset.
        """
        runs = _runs(sorted(self._slot(frame) for frame in self.visible_frames()))
        per_frame = self.shape.tokens_per_frame
        pieces = [self._store[:, :, :, first * per_frame : last * per_frame] for first, last in runs]
        if self.sink_shift and self._written <= self.shape.frames:
            store = torch.cat(pieces, dim=3)  # backward may yet read what earlier segments were shown
        else:
            store = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=3) if pieces else self._store[:, :, :, :0]
        if self.sink_shift:
            self._turn_sinks(store)
        return tuple((block[0], block[1]) for block in store)

    def placed(self, keys_values: KeysValues) -> KeysValues:
        """Keys and values of `visible_frames`, in that order and as they were written, with the sinks where `view`
        shows them; differentiable."""
        shift, width = self.sink_shift, self.shape.sink * self.shape.tokens_per_frame
        if not shift:
            return keys_values
        return tuple(
            (torch.cat((turned(keys[:, :width], shift), keys[:, width:]), dim=1), values)
            for keys, values in keys_values
        )

    @torch.no_grad()
    def _turn_sinks(self, store: Tensor) -> None:
        """Overwrite the sinks' keys in what `view` shows, which may be the store itself."""
        width = self.shape.sink * self.shape.tokens_per_frame
        if self._sink_keys is None:
            self._sink_keys = self._store[:, 0, :, :width].clone()
        for block, keys in zip(store, self._sink_keys, strict=True):
            block[0, :, :width] = turned(keys, self.sink_shift)

    @torch.no_grad()
    def write(self, keys_values: KeysValues) -> None:
        """Append one segment's keys and values, each [B, frames * tokens_per_frame, heads, head_dim].

        A ring of no frames (the window is the sinks alone) keeps the sinks and drops the rest, which nobody may see.
        Raises ValueError when a segment brings more frames than the ring that must hold them.
        """
        per_frame = self.shape.tokens_per_frame
        frames = keys_values[0][0].shape[1] // per_frame
        ring = self.shape.frames - self.shape.sink
        into_sinks = min(frames, max(0, self.shape.sink - self._written))
        if 0 < ring < frames - into_sinks:
            raise ValueError(
                f"a segment of {frames} frames does not fit a cache of {self.shape.frames} frames "
                f"of which {self.shape.sink} are sinks"
            )
        kept = frames if ring else into_sinks
        source = 0
        for first, last in _runs([self._slot(self._written + i) for i in range(kept)]):
            width = (last - first) * per_frame
            target = slice(first * per_frame, last * per_frame)
            for block, (keys, values) in zip(self._store, keys_values, strict=True):
                block[0, :, target] = keys[:, source : source + width]
                block[1, :, target] = values[:, source : source + width]
            source += width
        self._written += frames


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


def _runs(slots: list[int]) -> list[tuple[int, int]]:
    """Maximal half-open runs of consecutive slots, in the order given."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], slot + 1)
        else:
            runs.append((slot, slot + 1))
    return runs
