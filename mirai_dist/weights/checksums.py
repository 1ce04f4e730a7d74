"""A 64-bit checksum of a tensor's bits that adds up over its slices.

    checksum = sum over elements i of  bits(i) * odd(i mod 2^16) * odd'(i div 2^16)   mod 2^64

The weight depends on the position in the whole tensor, so exchanged elements change it, and yet ranks that hold
different rows only have to add their numbers. It finds accidents (another file, flipped bits, rows gone astray); it
is no defence against somebody who wants a collision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

_SPAN = 1 << 16
_SPANS_AT_ONCE = 4  # their temporaries stay in a core's cache: twice as fast as one span, eight times as sixteen
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MODULUS = 1 << 64


def checksum(values: Tensor, start: int = 0) -> int:
    """Part of a tensor's checksum that comes from `values`, its elements from flat position `start` on.

    About 1 ns an element on one CPU core. Add the parts modulo 2^64 (see `total`).
    """
    bits = values.detach().contiguous().flatten().view(_BITS[values.element_size()])
    parts: list[Tensor] = []
    factors: list[int] = []
    lead = min(-start % _SPAN, bits.numel())
    whole = (bits.numel() - lead) // _SPAN * _SPAN
    for offset, piece in ((0, bits[:lead]), (lead + whole, bits[lead + whole :])):
        if piece.numel():
            block, inside = divmod(start + offset, _SPAN)
            weights = _weights(bits.device)[inside : inside + piece.numel()]
            parts.append((piece.to(torch.int64) * weights).sum().reshape(1))
            factors.append(_factor(block))
    middle = bits[lead : lead + whole].view(-1, _SPAN)
    for group in middle.split(_SPANS_AT_ONCE):
        parts.append((group.to(torch.int64) * _weights(bits.device)).sum(1))
    factors += [_factor((start + lead) // _SPAN + index) for index in range(middle.shape[0])]
    if not parts:
        return 0
    return total(part * factor for part, factor in zip(torch.cat(parts).tolist(), factors, strict=True))


def total(parts: Iterable[int]) -> int:
    """Sum of parts, modulo 2^64."""
    return sum(parts) % _MODULUS


def shown(value: int) -> str:
    """A checksum as it is written in manifests: 16 hexadecimal digits."""
    return f"{value:016x}"


@lru_cache
def _weights(device: torch.device) -> Tensor:
    """[2^16] odd int64, the same in every process, torch version and machine."""
    noise = bytearray(hashlib.shake_256(b"mirai weights checksum").digest(8 * _SPAN))
    return (torch.frombuffer(noise, dtype=torch.int64) | 1).to(device)


def _factor(block: int) -> int:
    """An odd 64-bit number that differs from block to block (splitmix64)."""
    x = (block * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % _MODULUS
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % _MODULUS
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % _MODULUS
    return (x ^ (x >> 31)) | 1
