"""Who talks to whom in a pre-flight: a few rounds of disjoint pairs, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

ACROSS = 4  # rounds between hosts: a host meets as many others
INSIDE = 3  # rounds between the ranks of a host


def pairs(count: int, rounds: int) -> list[list[tuple[int, int]]]:
    """The first rounds of a round robin of `count` players (circle method): disjoint pairs, never the same twice."""
    seats = count + count % 2
    found = []
    for turn in range(min(rounds, seats - 1)):
        around = [(turn + i) % (seats - 1) for i in range(seats - 1)]
        meets = [(seats - 1, around[0])] + [(around[i], around[-i]) for i in range(1, seats // 2)]
        found.append([(min(pair), max(pair)) for pair in meets if max(pair) < count])
    return found


def peers(hosts: Sequence[str], rank: int) -> tuple[list[int | None], list[int | None]]:
    """Peers of `rank` round by round, first between hosts, then inside its own; None: it sits a round out.

    hosts: the host of every rank. Between hosts all ranks of a host talk at once, each to the one in its own place.
    """
    ranks: dict[str, list[int]] = {}
    for each, host in enumerate(hosts):
        ranks.setdefault(host, []).append(each)
    names = list(ranks)
    mine, place = names.index(hosts[rank]), ranks[hosts[rank]].index(rank)
    across: list[int | None] = []
    for turn in pairs(len(names), ACROSS):
        other = _partner(turn, mine)
        there = ranks[names[other]] if other is not None else []
        across.append(there[place] if place < len(there) else None)
    inside: list[int | None] = []
    most = max(map(len, ranks.values()))
    for turn in range(min(INSIDE, most - 1)):
        here = ranks[hosts[rank]]
        rounds = pairs(len(here), INSIDE)
        other = _partner(rounds[turn], place) if turn < len(rounds) else None
        inside.append(None if other is None else here[other])
    return across, inside


def _partner(turn: Sequence[tuple[int, int]], player: int) -> int | None:
    for low, high in turn:
        if player in (low, high):
            return high if player == low else low
    return None
