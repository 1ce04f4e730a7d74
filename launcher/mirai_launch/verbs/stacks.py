"""`mirai stacks`: where every rank of a running job stands, also when the job hangs."""

from __future__ import annotations

import argparse

from mirai_dist.config.error import RecipeError
from mirai_dist.operate import stacks
from mirai_dist.operate.control import Request
from mirai_launch import console, operating

PATIENCE = 30.0  # seconds: each rank looks every few seconds, and shared disks are slow to tell


def configure(parser: argparse.ArgumentParser) -> None:
    operating.add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    """Have every rank dump its stacks, and say where they stand. Raises RecipeError."""
    run_dir = arguments.run
    found, _ = operating.look(run_dir)
    if found.ended:
        raise RecipeError(str(run_dir), f"cannot dump stacks: it is {found.state}, not running")
    answer = operating.ask(run_dir, Request("stacks"), PATIENCE)
    dumped = stacks.latest(run_dir, str(answer["name"])) if answer else []
    for place, ranks in stacks.grouped(dumped):
        shown = ", ".join(ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
        console.say(f"{len(ranks)} in {place}: {shown}")
    silent = found.ranks - len(dumped)
    if silent:
        console.say(f"{silent} of {found.ranks} ranks dumped nothing: dead, stopped, or without Python's lock")
    console.say(f"whole stacks: {run_dir}/logs/rank-N.stacks")
    return 0 if dumped else 1
