"""`mirai submit`: a recipe and a cluster file become a batch script, and the script a job."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mirai_dist.plan.verdict import headline
from mirai_launch import console
from mirai_launch.slurm import submission
from mirai_launch.slurm.client import Scheduler
from mirai_launch.slurm.lead import warning
from mirai_launch.slurm.submission import Prepared, Queued, Wish


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="recipe file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="override: foresight.weight=0")
    parser.add_argument("--cluster", metavar="FILE", type=Path, required=True, help="cluster file: recipes/clusters/")
    parser.add_argument("--nodes", metavar="N", type=_count, required=True, help="nodes of the job")
    parser.add_argument("--spare", metavar="K", type=_spare, default=0, help="K nodes more, to leave out the worst")
    parser.add_argument("--time", default="", help="time limit (default: the cluster file's): 24:00:00, 1-12:00:00")
    parser.add_argument("--run-dir", type=Path, help="where everything is written (default: runs/<name>)")
    parser.add_argument(
        "--array", metavar="KEY=V,V", action="append", default=[],
        help="one run a value, with %%N behind the last at most N at a time; repeated: all combinations",
    )  # fmt: skip
    parser.add_argument("--chain", action="store_true", help="a job for each step of the recipe, each after the last")
    parser.add_argument("--dry-run", action="store_true", help="print the script and the command; write nothing")


def run(arguments: argparse.Namespace) -> int:
    """Check, render, and submit or show. Raises RecipeError."""
    prepared = submission.prepare(
        Wish(
            recipe=arguments.recipe,
            cluster=arguments.cluster,
            nodes=arguments.nodes,
            spare=arguments.spare,
            run_dir=arguments.run_dir,
            time=arguments.time,
            array=tuple(arguments.array),
            chain=arguments.chain,
            overrides=tuple(arguments.overrides),
        )
    )
    if arguments.dry_run:
        _show(prepared)
        return 0
    _tell(prepared, submission.submit(prepared, Scheduler()))
    return 0


def _show(prepared: Prepared) -> None:
    """The scripts as they would be submitted, and after them the commands as comments."""
    steps = submission.scripts(prepared, prepared.run_dir / "slurm" / "code")
    for text in steps.values():
        console.say(text)
    console.say(f"# {foreseen(prepared)}")
    after = ""
    for step in steps:
        console.say(f"# {submission.command(prepared, step, after)}")
        after = "ID"


def foreseen(prepared: Prepared) -> str:
    """What is to be expected of the job, in one line."""
    said = headline(prepared.plan) if prepared.plan else "not planned: gpus.model of the cluster file names no GPU"
    return f"{said}; saves {warning(prepared.cluster, prepared.plan)} s before its time limit"


def _tell(prepared: Prepared, queued: list[Queued]) -> None:
    console.say(foreseen(prepared))
    for each in queued:
        console.say(f"job {each.job}  {each.step}  {os.path.relpath(each.script)}")
    log = f"{queued[0].job}_0" if prepared.sweep else queued[0].job
    run_dir = os.path.relpath(prepared.run_dir)
    one = f"{run_dir}/{prepared.elements[0].name}" if prepared.sweep else run_dir
    console.say("next:")
    console.say(f"  squeue -j {','.join(each.job for each in queued)}")
    console.say(f"  tail -F {run_dir}/logs/slurm-{log}.log")
    console.say(f"  mirai status {one}    # and: mirai logs, save, stop, cancel, requeue")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of nodes, 1 or more")
    return int(text)


def _spare(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of nodes, 0 or more")
    return int(text)
