"""What a sample is conditioned on: captions by entry number, and their text embeddings, resident or precomputed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Captions(Protocol):
    """Prompts by entry number. `size` None: an endless source, any number is an entry."""

    @property
    def size(self) -> int | None: ...

    def captions(self, numbers: Sequence[int]) -> list[str]:
        """Prompt of each entry."""
        ...


class Encoder(Protocol):
    """A frozen text encoder."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, length, dim], zeros past the last token."""
        ...

    def negative(self) -> Tensor:
        """[1, length, dim] of the negative prompt of classifier-free guidance."""
        ...


class Conditions(Captions, Protocol):
    """Captions with their embeddings."""

    def embed(self, numbers: Sequence[int]) -> Tensor:
        """[B, length, dim] embeddings of entries, zeros past the last token."""
        ...

    def negative(self) -> Tensor: ...


@dataclass(frozen=True)
class Encoded:
    """Captions embedded when they are asked for, by an encoder held by the job."""

    source: Captions
    encoder: Encoder

    @property
    def size(self) -> int | None:
        return self.source.size

    def captions(self, numbers: Sequence[int]) -> list[str]:
        return self.source.captions(numbers)

    def embed(self, numbers: Sequence[int]) -> Tensor:
        return self.encoder.encode(self.source.captions(numbers))

    def negative(self) -> Tensor:
        return self.encoder.negative()


@dataclass(frozen=True)
class Selected:
    """Entries of other conditions in an order of their own: entry n is their entry numbers[n]."""

    source: Conditions
    numbers: Sequence[int]

    @property
    def size(self) -> int:
        return len(self.numbers)

    def captions(self, numbers: Sequence[int]) -> list[str]:
        return self.source.captions([self.numbers[n] for n in numbers])

    def embed(self, numbers: Sequence[int]) -> Tensor:
        return self.source.embed([self.numbers[n] for n in numbers])

    def negative(self) -> Tensor:
        return self.source.negative()
