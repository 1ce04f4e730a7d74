"""`mirai save`: a running job writes a checkpoint and goes on."""

from __future__ import annotations

import argparse

from mirai_dist.operate.control import Request
from mirai_launch import operating


def configure(parser: argparse.ArgumentParser) -> None:
    operating.add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the run to save. Raises RecipeError."""
    operating.present(arguments.run, "save")
    request = Request("save")
    answer = operating.ask(arguments.run, request)
    return operating.tell(arguments.run, request, answer, "the run saves when the present position is over")
