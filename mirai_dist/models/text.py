"""The text encoder of the procedural world: fixed embeddings of a closed vocabulary."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

POSITION_SCALE = 0.25  # of the unit-variance word: order is visible without drowning the word


class VocabularyEncoder:
    """Fixed embeddings of a closed vocabulary.

    A word's vector is a hash of its spelling, so it depends neither on the other words, nor on their order, nor on
    the machine or any random state; its mean square is 1. A sinusoid of the position is added to it. The empty
    prompt, which is the negative prompt, encodes to zeros everywhere.
    """

    def __init__(self, vocabulary: Sequence[str], dim: int, length: int) -> None:
        self.dim = dim
        self.length = length
        self._words = {word: _embedding(word, dim) for word in vocabulary}
        self._positions = POSITION_SCALE * _sinusoid(length, dim)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, length, dim] float32, zeros past the last word.

        ValueError for a word outside the vocabulary and for more than `length` words.
        """
        out = torch.zeros(len(prompts), self.length, self.dim)
        for row, prompt in zip(out, prompts, strict=True):
            words = prompt.split()
            if len(words) > self.length:
                raise ValueError(
                    f"prompt {prompt!r} has {len(words)} words but text.length is {self.length}: raise text.length"
                )
            for position, word in enumerate(words):
                if word not in self._words:
                    known = " ".join(sorted(self._words))
                    raise ValueError(f"unknown word {word!r} in prompt {prompt!r}: the vocabulary is {known}")
                row[position] = self._words[word] + self._positions[position]
        return out

    def negative(self) -> Tensor:
        """[1, length, dim] of zeros: the empty prompt."""
        return self.encode([""])


def _embedding(word: str, dim: int) -> Tensor:
    """[dim] unit-mean-square vector, uniform components from an extendable hash of the word's spelling."""
    data = hashlib.shake_256(word.encode()).digest(2 * dim)
    levels = [int.from_bytes(data[i : i + 2], "little") for i in range(0, 2 * dim, 2)]
    vector = torch.tensor(levels, dtype=torch.float64) + 0.5 - 2**15
    return (vector / vector.square().mean().sqrt()).float()


def _sinusoid(length: int, dim: int) -> Tensor:
    """[length, dim] sines then cosines of the position at geometrically falling frequencies, mean square 1."""
    half = (dim + 1) // 2
    frequency = torch.exp(-math.log(100.0) * torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return (2**0.5 * torch.cat([angle.sin(), angle.cos()], dim=1)[:, :dim]).float()
