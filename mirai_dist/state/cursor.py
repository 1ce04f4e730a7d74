"""Which prompt or sample comes next: a pure function of (seed, stream, global sample number).

A stream is an endless row of global sample numbers 0, 1, 2, ... and its whole state is how many were consumed, so
a checkpoint of it is one integer that is right for any world size. Generator and critic read separate streams.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

_ROUNDS = 6


@dataclass(frozen=True)
class BatchLayout:
    """One rank's part of a global batch of `ranks * micro_size * micro_batches` samples."""

    ranks: int
    rank: int
    micro_size: int
    micro_batches: int

    @property
    def global_size(self) -> int:
        """Samples of one update over all ranks and micro-batches."""
        return self.ranks * self.micro_size * self.micro_batches


def samples_of_rank(first: int, layout: BatchLayout) -> list[list[int]]:
    """Global sample numbers of this rank, one list a micro-batch, of the global batch that begins at `first`.

    Micro-batch m of rank r holds offsets g = m * (ranks * micro_size) + r * micro_size + i. What a sample is depends
    on g alone: another world size deals the same g out differently, and contiguous blocks of g (the exit groups)
    stay contiguous.
    """
    stride = layout.ranks * layout.micro_size
    begin = first + layout.rank * layout.micro_size
    return [[begin + m * stride + i for i in range(layout.micro_size)] for m in range(layout.micro_batches)]


class Cursor:
    """Position in one stream of samples.

    `size` is the number of entries of a finite data set: every epoch visits each entry once, in an order of its own.
    `size=None` is an endless source: the index of a sample is its hashed number (63 bits), for worlds that make a
    sample from an integer. Raises ValueError for size < 1.
    """

    def __init__(self, seed: int, stream: str, size: int | None) -> None:
        if size is not None and size < 1:
            raise ValueError(f"stream {stream!r}: size is {size}, must be at least 1 (or None for an endless source)")
        self.size = size
        self.consumed = 0
        self._key = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=32).digest()

    def take(self, count: int) -> list[int]:
        """The next `count` global sample numbers; all ranks take the whole global batch, then keep their own part."""
        first = self.consumed
        self.consumed += count
        return list(range(first, self.consumed))

    def index(self, number: int) -> int:
        """Data set entry of a global sample number; changes nothing."""
        if self.size is None:
            return self._hash(0, 0, number) >> 1
        epoch, place = divmod(number, self.size)
        return self._permuted(epoch, place)

    def _permuted(self, epoch: int, place: int) -> int:
        """Where `place` goes in this epoch's permutation of range(size), with no table.

        A Feistel network is a bijection on an even number of bits whatever its round function is; walking it until
        the value falls inside range(size) restricts it to a bijection there (Black and Rogaway 2002, "cycle walking").
        """
        assert self.size is not None
        half = max(1, ((self.size - 1).bit_length() + 1) // 2)
        mask = (1 << half) - 1
        value = place
        while True:
            left, right = value >> half, value & mask
            for step in range(_ROUNDS):
                left, right = right, left ^ (self._hash(epoch, step + 1, right) & mask)
            value = left << half | right
            if value < self.size:
                return value

    def _hash(self, epoch: int, step: int, value: int) -> int:
        data = f"{epoch}/{step}/{value}".encode()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._key).digest(), "big")
