"""`mirai profile`: a Chrome trace of one rank for a few cycles of a running job."""

from __future__ import annotations

import argparse

from mirai_dist.config.error import RecipeError
from mirai_dist.operate.control import Request
from mirai_launch import operating

MOST = 5  # cycles; a trace grows with every operation


def configure(parser: argparse.ArgumentParser) -> None:
    operating.add_run(parser)
    parser.add_argument("--cycles", type=int, default=2, help=f"cycles to record, at most {MOST} (default 2)")
    parser.add_argument("--rank", type=int, default=0, help="rank to record (default 0)")


def run(arguments: argparse.Namespace) -> int:
    """Ask the run for a profile. Raises RecipeError."""
    found = operating.present(arguments.run, "profile")
    if not 1 <= arguments.cycles <= MOST:
        raise RecipeError("--cycles", f"{arguments.cycles} is not between 1 and {MOST}")
    if not 0 <= arguments.rank < found.ranks:
        raise RecipeError("--rank", f"the run has no rank {arguments.rank}; its ranks are 0 to {found.ranks - 1}")
    request = Request("profile", cycles=arguments.cycles, rank=arguments.rank)
    answer = operating.ask(arguments.run, request)
    return operating.tell(arguments.run, request, answer, f"the trace comes to {arguments.run}/profiles")
