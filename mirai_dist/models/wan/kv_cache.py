"""Keys and values of finished segments: preallocated once, reused by every rollout, indexed by Python ints.

The cache is only ever written by its owner, between network calls, from what a context pass returned. No
network writes into it, so recomputation in backward replays no write. Keys are stored already rotated at
their absolute frame, and attention over keys does not depend on their order, so a full ring needs no moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    @property
    def frames_written(self) -> int:
        """Frames written since the last reset; also the absolute index of the next frame."""
        return self._written

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self._written = 0

    def _slot(self, frame: int) -> int:
        if frame < self.shape.sink:
            return frame
        return self.shape.sink + (frame - self.shape.sink) % (self.shape.frames - self.shape.sink)

    def visible_frames(self) -> list[int]:
        """Absolute indices of the frames the next segment may attend to."""
        ring = self.shape.frames - self.shape.sink
        oldest = self._written - min(ring, self.shape.window - self.shape.sink if self.shape.window else ring)
        recent = range(max(oldest, self.shape.sink), self._written)
        return [*range(min(self.shape.sink, self._written)), *recent]

    def view(self) -> KeysValues:
        """What the next segment may attend to: views of the store where slots are contiguous, else one copy."""
        runs = _runs(sorted(self._slot(frame) for frame in self.visible_frames()))
        per_frame = self.shape.tokens_per_frame
        pieces = [self._store[:, :, :, first * per_frame : last * per_frame] for first, last in runs]
        store = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=3) if pieces else self._store[:, :, :, :0]
        return tuple((block[0], block[1]) for block in store)

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


def _runs(slots: list[int]) -> list[tuple[int, int]]:
    """Maximal half-open runs of consecutive slots, in the order given."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], slot + 1)
        else:
            runs.append((slot, slot + 1))
    return runs
