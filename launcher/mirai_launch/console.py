"""The only file of the launcher that prints."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text


def say(line: str, style: str = "") -> None:
    """One line on standard output, never wrapped: what is printed can be grepped and piped."""
    _print(Console(highlight=False, soft_wrap=True), Text(line, style=style))


def fail(line: str) -> None:
    """One line on standard error, in red on a terminal."""
    _print(Console(file=sys.stderr, highlight=False, soft_wrap=True), Text(f"mirai: {line}", style="red"))


def two_columns(rows: Iterable[tuple[str, str]]) -> None:
    """Left texts, and right texts aligned at the right edge of the terminal (or of the longest line, if wider)."""
    pairs = list(rows)
    console = Console(highlight=False, soft_wrap=True)
    widest = max((len(left) + 2 + len(right) for left, right in pairs), default=0)
    width = max(widest, console.width) if console.is_terminal else widest
    for left, right in pairs:
        line = Text(left)
        line.append(right.rjust(width - len(left)) if right else "", style="dim")
        _print(console, line)


def _print(console: Console, text: Text) -> None:
    console.print(text)
