"""`mirai stop`: a running job saves and ends, now or after a cycle, and is not queued again."""

from __future__ import annotations

import argparse

from mirai_dist.config.error import RecipeError
from mirai_dist.operate import control
from mirai_launch import operating


def configure(parser: argparse.ArgumentParser) -> None:
    operating.add_run(parser)
    parser.add_argument(
        "--after", metavar="CYCLE", type=int, default=0, help="when so many cycles of the present stage are done"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask the run to stop. Raises RecipeError."""
    run_dir, after = arguments.run, arguments.after
    found = operating.present(run_dir, "stop")
    if after and not found.cycle < after <= found.cycles:
        what = f"{found.stage} has done {found.cycle} of {found.cycles} cycles; name one still to come"
        raise RecipeError("--after", f"{after}: {what}, or leave it out to stop now")
    if not after:
        control.hold(run_dir, control.operator())  # also if the run ends by something else before it hears
    request = control.Request("stop", stage=found.stage, after=after)
    when = f"after cycle {after} of {found.stage}" if after else "when the present position is over"
    answer = operating.ask(run_dir, request)
    return operating.tell(run_dir, request, answer, f"the run saves and ends {when}")
