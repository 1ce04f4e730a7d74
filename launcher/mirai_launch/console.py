"""The only file of the launcher that prints."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
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


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table, its first column left and the others right; as wide as its content where nobody can see its end."""
    rows = [[str(cell) for cell in row] for row in rows]
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        shown.add_column(name, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        shown.add_row(*map(Text, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)
    console.print(shown)


def _print(console: Console, text: Text) -> None:
    console.print(text)
