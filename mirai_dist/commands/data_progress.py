"""What the sub-verbs of `mirai data` share: their console, progress every few seconds, sizes for people."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from mirai_dist.config.error import FileError
from mirai_dist.data.arrays import Part
from mirai_dist.observe.console import SECONDS_BETWEEN_LINES, Console


@dataclass
class Pace:
    """Progress over `total` items that have to be made, said every few seconds: embed 12/100 prompts ..."""

    console: Console
    total: int
    doing: str
    items: str
    done: int = 0

    def __post_init__(self) -> None:
        self._began = self._said = time.monotonic()

    def advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        rate = self.done / (now - self._began)
        left = (self.total - self.done) / rate
        to_go = f"{left:.0f}s" if left < 60 else f"{left // 3600:.0f}h {left % 3600 / 60:02.0f}m"
        done = f"{self.doing} {self.done}/{self.total} {self.items}"
        self.console.say(f"{done}  {rate:.3g} {self.items}/s  to go {to_go}")


def part_console(store: Path, part: Part) -> Console:
    """The console of one part, with its log in the store. FileError for a folder that cannot be written."""
    try:
        return Console(0, socket.gethostname(), store / "logs" / f"part-{part.index:03d}.log")
    except OSError as error:
        raise FileError(store, f"is not a folder that can be written ({error.strerror}); change --out") from error


def refuse_below_one(options: dict[str, int]) -> None:
    """FileError for an option, by its flag, that is not a positive number."""
    for flag, value in options.items():
        if value < 1:
            raise FileError(flag, f"is {value}; give a positive number")


def size_text(count: float) -> str:
    """1 B, 23.4 kB, 5.6 GB."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 1000 or unit == "PB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def quiet_console() -> Console:
    """A console without a log."""
    return Console(0, socket.gethostname(), Path(os.devnull))
