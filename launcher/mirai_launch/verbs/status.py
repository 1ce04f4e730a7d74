"""`mirai status`: where a run stands, from its directory and the scheduler."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from mirai_dist.operate import status
from mirai_launch import console, operating


def configure(parser: argparse.ArgumentParser) -> None:
    operating.add_run(parser)
    parser.add_argument("--json", action="store_true", help="everything that is known, for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print the state of a run on one screen. Raises RecipeError."""
    found, queue = operating.look(arguments.run)
    if arguments.json:
        console.say(json.dumps({**asdict(found), "queue": queue}))
        return 0
    for line in status.lines(found, queue):
        console.say(line)
    return 0
