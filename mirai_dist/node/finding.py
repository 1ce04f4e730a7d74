"""One thing that was looked at on a machine, how bad it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# From good to bad. skip: not looked at, and why. fail: a run cannot work here until somebody repairs it (exit code
# 20). suspect: the machine itself is in doubt; another one would do (exit code 30).
LEVELS = ("ok", "skip", "warn", "fail", "suspect")
EXIT_CODES = {"fail": 20, "suspect": 30}


@dataclass(frozen=True)
class Finding:
    """`check`: what was looked at; `value`: what was found; `advice`: what to do, empty where nothing need be done."""

    check: str
    level: str
    value: str
    advice: str = ""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"{self.check}: {self.level!r} is none of {', '.join(LEVELS)}")

    def __str__(self) -> str:
        return f"{self.check}: {self.value}" + (f"; {self.advice}" if self.advice else "")


def worst(findings: Iterable[Finding]) -> str:
    """The worst level among them; ok where there are none."""
    return max((each.level for each in findings), key=LEVELS.index, default="ok")


def exit_code(findings: Iterable[Finding]) -> int:
    """0, 20 where something failed, 30 where the node is suspect."""
    return EXIT_CODES.get(worst(findings), 0)
