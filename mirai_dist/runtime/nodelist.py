"""SLURM's compressed host lists, read here: `scontrol show hostnames` is missing in many containers, and a guess
instead of it has each node train alone."""

from __future__ import annotations

import re

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


class NodeListError(ValueError):
    """A host list that does not follow SLURM's grammar. One line."""

    exit_code = 20


def expand(text: str) -> list[str]:
    """Host names in SLURM's own order: `a[01-03,7]-x,b` -> a01-x, a02-x, a03-x, a7-x, b.

    Zero padding is kept, several brackets in one name multiply with the rightmost running fastest.
    Raises NodeListError.
    """
    hosts: list[str] = []
    for name in _split(text):
        hosts.extend(_expand_name(name, text))
    if not hosts:
        raise NodeListError(f"SLURM host list {text!r} names no host")
    return hosts


def tasks_per_node(text: str) -> list[int]:
    """SLURM's compressed task counts: `2(x3),1` -> 2, 2, 2, 1. Raises NodeListError."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not found:
            raise NodeListError(f"SLURM task counts {text!r}: {part!r} is not of the form 2 or 2(x3)")
        counts.extend([int(found.group(1))] * int(found.group(2) or 1))
    return counts


def _split(text: str) -> list[str]:
    """Parts between the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        if letter == "[":
            depth += 1
        elif letter == "]":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
        if depth not in (0, 1):
            raise NodeListError(f"SLURM host list {text!r} has unbalanced brackets")
    if depth:
        raise NodeListError(f"SLURM host list {text!r} has unbalanced brackets")
    parts.append(text[start:])
    if text.strip() and not all(part.strip() for part in parts):
        raise NodeListError(f"SLURM host list {text!r} has an empty entry")
    return [part.strip() for part in parts if part.strip()]


def _expand_name(name: str, whole: str) -> list[str]:
    hosts = [""]
    for piece in re.split(r"(\[[^\]]*\])", name):
        if piece.startswith("["):
            numbers = _numbers(piece[1:-1], whole)
            hosts = [host + number for host in hosts for number in numbers]
        else:
            hosts = [host + piece for host in hosts]
    return hosts


def _numbers(text: str, whole: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        if not found:
            raise NodeListError(f"SLURM host list {whole!r}: {part!r} is no number or range")
        first, last = found.group(1), found.group(2) or found.group(1)
        if int(last) < int(first):
            raise NodeListError(f"SLURM host list {whole!r}: the range {part!r} runs backwards")
        # A padded first number fixes the width: 08-11 is 08, 09, 10, 11.
        numbers.extend(str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return numbers
