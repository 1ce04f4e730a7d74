"""What a pre-flight measures on each rank, in the default process group: arithmetic, links, the ranks together, clocks.

Speeds are means over a stretch of time, not over a number of turns: a node that stalls now and then is slow too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mirai_dist.runtime import rounds

_CLOCK_TURNS = 10


class WrongResult(RuntimeError):
    """A device computed something else than what is known to come out. One line."""


@dataclass(frozen=True)
class Extent:
    """How much is measured on one kind of device: rows of the square matrices, elements of a message, seconds."""

    rows: int
    dtype: torch.dtype
    message: int
    seconds: float
    link_seconds: float


GPU = Extent(rows=8192, dtype=torch.bfloat16, message=1 << 24, seconds=1.0, link_seconds=0.2)
CPU = Extent(rows=384, dtype=torch.float32, message=1 << 16, seconds=0.5, link_seconds=0.25)


def extent(device: torch.device) -> Extent:
    """What is measured on this device."""
    return GPU if device.type == "cuda" else CPU


def gemm(device: torch.device) -> float:
    """Sustained FLOP/s of square matrix products, the better of two stretches: one disturbance accuses nobody.

    Raises WrongResult if a product of known outcome comes out wrong.
    """
    what = extent(device)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(what.rows, what.rows, generator=generator, device=device, dtype=what.dtype) for _ in "ab")
    for _ in range(3):
        torch.mm(a, b)
    _wait(device)
    speed = max(_sustained(a, b, what.seconds) for _ in range(2))
    ones = torch.ones_like(a)
    product = torch.mm(ones, ones)
    if not bool((product == what.rows).all()):
        raise WrongResult(f"{what.rows} ones times {what.rows} ones is not {what.rows} everywhere")
    return speed


def _sustained(a: torch.Tensor, b: torch.Tensor, seconds: float) -> float:
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for _ in range(4):
            torch.mm(a, b)
        _wait(a.device)
        done += 4
    return done * 2 * a.shape[0] ** 3 / (time.perf_counter() - begin)


def links(hosts: Sequence[str], device: torch.device) -> tuple[list[float], list[float]]:
    """Bytes a second each way to the peers of this rank, round by round: between hosts, and inside this one.

    hosts: the host of every rank of the default group; all of them call this together.
    """
    across, inside = rounds.peers(hosts, dist.get_rank())
    return _talk(across, device), _talk(inside, device)


def _talk(peers: Sequence[int | None], device: torch.device) -> list[float]:
    return [_exchange(peer, device) for peer in peers if peer is not None]


def _exchange(peer: int, device: torch.device) -> float:
    what = extent(device)
    sent, got = (torch.zeros(what.message, dtype=torch.float32, device=device) for _ in "ab")
    # Flag 0 of the lower rank ends it for both; its first round trip waits for a peer that is still with another.
    flag, heard = (torch.ones(1, device=device) for _ in "ab")
    leads = dist.get_rank() < peer
    _swap(peer, flag, heard)
    _swap(peer, sent, got)
    _wait(device)
    begin, done = time.perf_counter(), 0
    while True:
        for _ in range(4):
            _swap(peer, sent, got)
        _wait(device)
        done += 4
        flag.fill_(float(time.perf_counter() - begin < what.link_seconds))
        _swap(peer, flag, heard)
        if not (flag if leads else heard).item():
            return done * sent.nbytes / (time.perf_counter() - begin)


def _swap(peer: int, sent: torch.Tensor, got: torch.Tensor) -> None:
    operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, got, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def all_reduce(device: torch.device) -> float:
    """Bus bandwidth in bytes a second of an all-reduce over all ranks: 2 (n - 1) / n times its size over its time."""
    buffer = torch.zeros(extent(device).message, dtype=torch.float32, device=device)
    dist.all_reduce(buffer)
    _wait(device)
    begin, turns = time.perf_counter(), 5
    for _ in range(turns):
        dist.all_reduce(buffer)
    _wait(device)
    ranks = dist.get_world_size()
    return 2 * (ranks - 1) / ranks * turns * buffer.nbytes / (time.perf_counter() - begin)


def clock_marks(device: torch.device, now: Callable[[], float] = time.time) -> list[tuple[float, float]]:
    """(before, after) of small all-reduces, by this node's clock. None of them ends before every rank has begun it."""
    marks = []
    for _ in range(_CLOCK_TURNS):
        begin = now()
        token = torch.ones(1, device=device)
        dist.all_reduce(token)
        token.item()
        marks.append((begin, now()))
    return marks


def clock_offset(marks: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Seconds that a clock is ahead of the reference clock, and the uncertainty of that.

    Both took part in the same all-reduces. One that begins here at b (our clock) and ends there at e (theirs) began
    before it ended, so we are ahead by at least b - e; the other way round gives the upper bound. The uncertainty is
    negative if no constant offset fits: a clock was set meanwhile.
    """
    low = max(mine[0] - theirs[1] for mine, theirs in zip(marks, reference, strict=True))
    high = min(mine[1] - theirs[0] for mine, theirs in zip(marks, reference, strict=True))
    return (low + high) / 2, (high - low) / 2


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
