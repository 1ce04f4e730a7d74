"""`mirai train`: refuse what cannot run, then become the process that runs it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mirai_dist.config import files, load, rundir
from mirai_dist.config.cluster import PREFLIGHT, TRANSPORTS
from mirai_dist.config.rules import check_layout
from mirai_dist.config.steps import chosen
from mirai_dist.plan.host import here
from mirai_dist.plan.verdict import refuse_over
from mirai_launch import local

TRANSPORT_HELP = f"stop unless the ranks talk over it ({', '.join(TRANSPORTS)})"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="recipe file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="override: foresight.weight=0")
    parser.add_argument("--nproc", type=_ranks, help="ranks on this machine (default: one a GPU, else 2)")
    parser.add_argument("--run-dir", type=Path, help="where everything is written (default: runs/<name>)")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="go on from the newest checkpoint")
    parser.add_argument(
        "--only",
        metavar="STEP",
        action="append",
        default=[],
        help="do this step alone, or several, comma-separated: STAGE.gate, STAGE, report (default: what is not done)",
    )
    parser.add_argument("--preflight", choices=PREFLIGHT, default="auto", help="look at all nodes first; auto: if many")
    parser.add_argument("--expect-transport", type=_transports, default="", metavar="NAME,...", help=TRANSPORT_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Check recipe, run directory and batch split, then exec the launcher. Raises RecipeError."""
    launch = prepare(arguments)
    os.execve(launch.argv[0], launch.argv, launch.env)


def prepare(arguments: argparse.Namespace) -> local.Launch:
    """Everything `run` does short of becoming the run.

    Ranks that a launcher has started already check for themselves, and tell once what each of them would tell here.
    """
    resolved, run_dir = None, arguments.run_dir
    if run_dir is None or local.started_ranks(os.environ) is None:
        resolved = load(arguments.recipe, arguments.overrides)
        for variant in resolved.variants():
            files.check(variant.recipe, variant.origins)
        chosen(resolved.recipe, arguments.only)
        run_dir = run_dir or rundir.default(resolved.recipe)
    request = local.Request(
        recipe=arguments.recipe,
        run_dir=run_dir,
        resume=arguments.resume,
        nproc=arguments.nproc,
        preflight=arguments.preflight,
        expected=arguments.expect_transport,
        overrides=tuple(arguments.overrides),
        only=tuple(arguments.only),
    )
    gpus = local.visible_gpus(os.environ)
    launch = local.prepare(request, os.environ, gpus)
    if resolved is not None:
        for variant in resolved.variants():
            check_layout(variant.recipe, launch.ranks)
        rundir.check(run_dir, resolved.recipe, arguments.resume)
        if local.started_ranks(os.environ) is None:
            refuse_over(resolved, here(launch.ranks, gpus > 0))
    return launch


def _transports(text: str) -> str:
    unknown = [name for name in text.split(",") if name and name not in TRANSPORTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(TRANSPORTS)}")
    return text


def _ranks(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of ranks, 1 or more")
    return int(text)
