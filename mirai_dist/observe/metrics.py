"""Scalars of a cycle, averaged over time and ranks with one synchronisation for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

# The reduced vector has one length on all ranks whatever names a rank holds: ranks that disagree about the
# names must still meet in the same collective, or the check itself would hang. 256 doubles are 2 kB.
CAPACITY = 250
_HASH_PIECES = 2
_HASH_BITS = 20  # squares stay exact in a float64 sum over 2**13 ranks
_HEAD = CAPACITY + 2 * _HASH_PIECES
VOTES = 16
ROW = 32  # 256 bytes a rank: a quarter of a megabyte for a thousand of them, once a cycle


class Arrived(NamedTuple):
    """What travelled with the last reduction, equal on all ranks. votes: summed over ranks. rows: every rank's number,
    by rank, of each name."""

    votes: list[float]
    rows: dict[str, list[float]]


class Metrics:
    """Running means of named scalars. Device tensors are added on their device; nothing waits for them.

    device: where the reduced vector lives; the process group must be able to reduce there.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._votes: Sequence[float] = ()
        self._row: Mapping[str, float] = {}
        self.arrived = Arrived([0.0] * VOTES, {})

    def send(self, votes: Sequence[float], row: Mapping[str, float] | None = None) -> None:
        """Put numbers on the next reduction, which would happen anyway; `arrived` holds what came of them.

        votes: at most VOTES, summed over ranks: a 1 of any rank is seen by all. row: at most ROW, by name, told to all
        ranks as they are; every rank must send a row, or none.
        """
        if len(votes) > VOTES or len(row or {}) > ROW:
            raise ValueError(f"{len(votes)} votes and {len(row or {})} numbers; at most {VOTES} and {ROW}")
        self._votes, self._row = votes, row or {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Add one observation of `name`: a float, or a tensor of one element (any shape, any dtype)."""
        if isinstance(value, DTensor):
            raise TypeError(f"metric {name}: a DTensor is one rank's part; add value.full_tensor()")
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"metric {name}: one element expected, got shape {tuple(value.shape)}")
            value = value.detach().reshape(()).to(device=self._device, dtype=torch.float64, non_blocking=True)
        else:
            value = float(value)
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts[name] = self._counts.get(name, 0) + 1

    def add_all(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one observation of each name."""
        for name, value in values.items():
            self.add(name, value)

    def reduce(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Mean over the adds of each rank, then the plain mean over the ranks of `group`; clears the sums.

        group None is the default group, or this process alone when there is none. One all_reduce, one sync.
        The same names must have been added on every rank; if not, every rank raises ValueError with the
        difference (ranks decide alike, so none is left waiting). What was sent (`send`) goes along. Collective.
        """
        names, sent = sorted(self._sums), sorted(self._row)
        together = dist.is_available() and dist.is_initialized()
        rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if together else (0, 1)
        vector = torch.cat([self._packed(names, sent), self._luggage(sent, rank, ranks)])
        self._sums, self._counts, self._votes, self._row = {}, {}, (), {}
        if together:
            dist.all_reduce(vector, group=group)
        values = vector.tolist()
        if not _all_equal(values[CAPACITY:_HEAD], ranks):
            raise ValueError(_difference([*names, *(f"sent {name}" for name in sent)], group))
        rows = values[_HEAD + VOTES :]
        self.arrived = Arrived(
            values[_HEAD : _HEAD + VOTES], {name: rows[i::ROW] for i, name in enumerate(sent)}
        )
        return {name: value / ranks for name, value in zip(names, values, strict=False)}

    def _packed(self, names: list[str], sent: list[str]) -> Tensor:
        """[CAPACITY + header] float64: the local means, zeros, then (piece, piece squared) of the names' hash."""
        if len(names) > CAPACITY:
            raise ValueError(f"{len(names)} metrics in one reduction; at most {CAPACITY}")
        vector = torch.zeros(_HEAD, dtype=torch.float64, device=self._device)
        if names:
            sums = [torch.as_tensor(self._sums[name], dtype=torch.float64, device=self._device) for name in names]
            counts = torch.tensor([self._counts[name] for name in names], dtype=torch.float64, device=self._device)
            vector[: len(names)] = torch.stack(sums) / counts
        header = [float(power) for piece in _name_hash([*names, *sent]) for power in (piece, piece * piece)]
        vector[CAPACITY:] = torch.tensor(header, dtype=torch.float64, device=self._device)
        return vector

    def _luggage(self, sent: list[str], rank: int, ranks: int) -> Tensor:
        """[VOTES] float64, and where a row was sent [ranks * ROW] more: all zeros but this rank's, so that the sum over
        ranks holds them all."""
        numbers = [*self._votes, *[0.0] * (VOTES - len(self._votes))]
        if sent:
            own = [self._row[name] for name in sent] + [0.0] * (ROW - len(sent))
            numbers += [0.0] * (ROW * rank) + own + [0.0] * (ROW * (ranks - 1 - rank))
        return torch.tensor(numbers, dtype=torch.float64, device=self._device)


def _name_hash(names: list[str]) -> list[int]:
    """_HASH_PIECES integers of _HASH_BITS bits that stand for the number of names and the names themselves."""
    text = "\n".join([str(len(names)), *names])
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    return [(digest >> (_HASH_BITS * index)) % (1 << _HASH_BITS) for index in range(_HASH_PIECES)]


def _all_equal(header: list[float], ranks: int) -> bool:
    """Whether all ranks put the same numbers in: n * sum(x^2) == (sum x)^2 exactly when all x are equal."""
    totals, squares = header[0::2], header[1::2]
    return all(ranks * int(square) == int(total) ** 2 for total, square in zip(totals, squares, strict=True))


def _difference(names: list[str], group: dist.ProcessGroup | None) -> str:
    """What the ranks disagree about. Collective; only reached when all ranks saw the same mismatch."""
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, names, group=group)
    lines = []
    for name in sorted(set().union(*everyone)):
        missing = [rank for rank, held in enumerate(everyone) if name not in held]
        if missing:
            lines.append(f"{name} is missing on ranks {', '.join(map(str, missing))}")
    return "ranks hold different metrics: " + "; ".join(lines)
