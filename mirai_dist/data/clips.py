"""Data sets of videos that training reads by number, whatever their files: clean latents and ODE pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from mirai_dist.data.latents import LatentStore
from mirai_dist.data.lmdb_files import LmdbClips, holds_lmdb


class Clips(Protocol):
    """Clean latents with captions, by entry number 0 ... size - 1, and where there are any the states of the trajectory
    that leads to each. IndexError for a number outside."""

    @property
    def size(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """[F, C, H, W] of a clip."""
        ...

    def captions(self, numbers: Sequence[int]) -> list[str]:
        """Caption of each entry."""
        ...

    def latents(self, numbers: Sequence[int]) -> Tensor:
        """[B, F, C, H, W] on the CPU in the stored dtype; of an ODE pair the last state. FileError: damaged."""
        ...

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of the states before the final sample, from noise on (0 ... 1000); empty for clean latents."""
        ...

    @property
    def truth(self) -> bool:
        """Whether the last state is the ground truth, and the one before it the final sample."""
        ...

    def states(self, numbers: Sequence[int]) -> Tensor:
        """[B, S, F, C, H, W] on the CPU in the stored dtype: at `timesteps`, the final sample, the ground truth.
        FileError where there are clean latents alone."""
        ...


def open_clips(path: Path | str) -> LatentStore | LmdbClips:
    """A data set of clean latents or ODE pairs: a store of ours, or the published LMDB layout. Both are `Clips`.

    FileError, one line, when there is none or it cannot be used.
    """
    return LmdbClips(path) if holds_lmdb(Path(path)) else LatentStore(path)
