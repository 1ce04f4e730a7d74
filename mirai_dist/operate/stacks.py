"""Where the ranks of a run stand, from the stacks they have dumped (runtime/lookout.py)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_HEAD = re.compile(r"=== (\S+) (\S+ \S+) (\S+)")
_FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')
_LIBRARY = ("/site-packages/", "/lib/python", "/parallel/timed.py")
_SHOWN = 3


class Stack(NamedTuple):
    """The main thread of one rank: host:rank, and its frames as (file:line, function), innermost first."""

    rank: str
    frames: tuple[tuple[str, str], ...]


def latest(run_dir: Path, request: str) -> list[Stack]:
    """What each rank dumped for this request, in the order of the ranks."""
    found = []
    for path in sorted((run_dir / "logs").glob("rank-*.stacks"), key=_number):
        for section in re.split(r"(?m)^(?==== )", path.read_text(encoding="utf-8", errors="replace")):
            head = _HEAD.match(section)
            if head and head[3] == request:
                found.append(Stack(head[1], _main_thread(section)))
    return found


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("rank-"))


def _main_thread(section: str) -> tuple[tuple[str, str], ...]:
    # The main thread comes last; the one that dumped says "Current thread".
    threads = re.split(r"(?m)^(?:Thread|Current thread) 0x", section)
    return tuple((f"{file}:{line}", name) for file, line, name in _FRAME.findall(threads[-1]))


def where(stack: Stack) -> str:
    """The innermost frame, and the frames of ours that led to it: `wait (c10d.py:9) in reduce (metrics.py:91)`."""
    if not stack.frames:
        return "nowhere in Python"
    ours = [frame for frame in stack.frames[1:] if not any(part in frame[0] for part in _LIBRARY)]
    return " in ".join(f"{name} ({Path(file).name})" for file, name in [stack.frames[0], *ours[:_SHOWN]])


def grouped(stacks: Iterable[Stack]) -> list[tuple[str, list[str]]]:
    """(place, ranks that stand there), the smallest group first: of a hung run that is who the others wait for."""
    groups: dict[str, list[str]] = {}
    for stack in stacks:
        groups.setdefault(where(stack), []).append(stack.rank)
    return sorted(groups.items(), key=lambda item: len(item[1]))
