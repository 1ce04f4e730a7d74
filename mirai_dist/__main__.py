"""What a launcher starts on every rank: `python -m mirai_dist --recipe FILE --run-dir DIR [key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mirai_dist.operate import control
from mirai_dist.runtime.guard import ending, environment_rank, guarded
from mirai_dist.runtime.lookout import Lookout
from mirai_dist.runtime.outlet import Outlet
from mirai_dist.runtime.signals import StopRequest

if TYPE_CHECKING:
    from mirai_dist.config import Resolved
    from mirai_dist.config.schema import Recipe
    from mirai_dist.cycle.pipeline import Place
    from mirai_dist.runtime.bootstrap import World


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line of a rank; `mirai train` writes it."""
    parser = argparse.ArgumentParser(prog="mirai_dist", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="recipe file")
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="auto: go on where a run stopped")
    parser.add_argument("--only", action="append", default=[], metavar="STEP", help="do these steps of the run alone")
    parser.add_argument("--preflight", choices=("auto", "always", "never"), default="auto", help="auto: on many hosts")
    parser.add_argument("--expect-transport", default="", help="what the ranks must talk over, such as ib,nvlink")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of recipe keys")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, stop: StopRequest) -> int:
    """Train the recipe on this rank and its peers. Returns the exit code."""
    from mirai_dist.config import load
    from mirai_dist.config.steps import chosen
    from mirai_dist.cycle.pipeline import Place
    from mirai_dist.observe.console import Console
    from mirai_dist.runtime import bootstrap

    resolved = load(options.recipe, options.overrides)
    steps = chosen(resolved.recipe, options.only)
    ranks = bootstrap.start()
    described = describe(options, resolved, ranks, stop)
    claim(options, resolved.recipe, ranks, described.texts)
    outlet = Outlet(options.run_dir, ranks.rank).redirect()
    Lookout(options.run_dir, ranks.rank, ranks.host, outlet.bound).start()
    with closing(Console(ranks.rank, ranks.host, options.run_dir / "logs" / f"rank-{ranks.rank}.log")) as console:
        console.say(f"{resolved.recipe.name}: {ranks.world_size} ranks, run directory {options.run_dir}")
        for line in described.lines:
            console.say(line)
        place = Place(ranks, options.run_dir, console, stop, bootstrap.hosts(ranks))
        with ending(options.run_dir, ranks.rank):
            perform(resolved, place, steps, whole=not options.only)
    bootstrap.stop(ranks)
    return 0


@dataclass(frozen=True)
class Described:
    """What a run is, before it begins: files for its directory, lines for its console."""

    texts: dict[str, str]
    lines: list[str]


def describe(options: argparse.Namespace, resolved: Resolved, ranks: World, stop: StopRequest) -> Described:
    """Everything that is checked on the ranks before anything is written or allocated.

    Raises SuspectNode, RecipeError and FileError where the run must not begin, Stopped where somebody asked for it.
    """
    from mirai_dist.config.digest import to_yaml
    from mirai_dist.config.source import dump
    from mirai_dist.cycle.attending import uncertified
    from mirai_dist.cycle.budget import budget
    from mirai_dist.cycle.cycle import Stopped
    from mirai_dist.cycle.effective import effective
    from mirai_dist.runtime import preflight

    early = "before anything was trained; run the same command again"
    with stop.raising(Stopped(f"stopped by a signal {early}")):
        examined = examine(options, ranks)
    if stop.agreed():
        raise Stopped(f"stopped by {stop.reason or 'a signal'} {early}")
    check(resolved, ranks)
    planned = budget(resolved, ranks)
    used = dump(effective(resolved, ranks.world_size, ranks.device.type))
    texts = {"recipe.yaml": to_yaml(resolved.recipe), "effective.yaml": used}
    lines = [*uncertified(resolved.recipe, ranks.device), planned, *(f"  {line}" for line in used.splitlines())]
    if examined:
        texts[preflight.RECORD] = preflight.text(examined)
        lines.insert(0, f"pre-flight ({examined['seconds']} s): {examined['verdict']}: {examined['line']}")
    return Described(texts, lines)


def check(resolved: Resolved, ranks: World) -> None:
    """RecipeError or FileError where a stage or an arm cannot run on these ranks, or not be reported."""
    from mirai_dist.config import files
    from mirai_dist.config.rules import check_layout
    from mirai_dist.cycle.attending import check_attention
    from mirai_dist.cycle.study import check_reportable

    for variant in resolved.variants():
        files.check(variant.recipe, variant.origins)
        check_layout(variant.recipe, ranks.world_size)
    check_reportable(resolved.recipe)
    for variant in (*resolved.variants(), *map(resolved.of_arm, resolved.recipe.study.arms)):
        check_attention(variant.recipe, ranks.device)


def perform(resolved: Resolved, place: Place, steps: list[str], whole: bool) -> None:
    """The steps of the run that are not done yet, and the report, which is written anew. whole: all steps are asked."""
    from mirai_dist.config.digest import digest
    from mirai_dist.config.steps import REPORT
    from mirai_dist.cycle.chain import run_chain
    from mirai_dist.cycle.cycle import Stopped
    from mirai_dist.cycle.study import report

    begin(place, digest(resolved.recipe), [] if whole else steps)
    run_chain(resolved, place, steps)
    with place.stop.raising(Stopped("stopped before the report was written; run the same command to write it")):
        if whole or REPORT in steps:
            report(resolved, place)
    drop_requests(place)


def examine(options: argparse.Namespace, ranks: World) -> dict[str, Any] | None:
    """The pre-flight, where this run has one (runtime/preflight.py). None: it has not."""
    from mirai_dist.runtime import preflight
    from mirai_dist.runtime.examination import Plan

    expected = preflight.transports(options.expect_transport)
    if not expected and not preflight.due(options.preflight, ranks):
        return None
    return preflight.run(ranks, Plan(options.run_dir, os.environ, expected))


def claim(options: argparse.Namespace, recipe: Recipe, ranks: World, texts: Mapping[str, str]) -> None:
    """Write what describes the run into its directory, from rank 0 and for all.

    Raises RecipeError on all ranks, with nothing written, if the directory is not this recipe's (config/rundir.py).
    """
    import torch.distributed as dist

    from mirai_dist.config import RecipeError, rundir

    refusal: list[tuple[str, str] | None] = [None]
    if ranks.rank == 0:
        try:
            rundir.check(options.run_dir, recipe, options.resume)
            refuse_revival(options.run_dir)
            options.run_dir.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                beside = options.run_dir / f"{name}.new"
                beside.write_text(text)
                beside.replace(options.run_dir / name)
        except RecipeError as error:
            refusal[0] = error.where, error.what
        except OSError as error:
            refusal[0] = str(options.run_dir), f"cannot be written ({error}); name another with --run-dir"
    dist.broadcast_object_list(refusal, src=0, device=ranks.device)
    if refusal[0] is not None:
        raise RecipeError(*refusal[0])


def refuse_revival(run_dir: Path) -> None:
    """RecipeError where the scheduler starts a job again by itself that an operator has stopped."""
    from mirai_dist.config import RecipeError

    held = control.held(run_dir)
    if held and int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0:
        raise RecipeError(str(run_dir), f"was {held} and is not revived; mirai requeue {run_dir} lets it go on")


def begin(place: Place, recipe: str, steps: list[str]) -> None:
    """Say that the run has started, and drop what was asked of an earlier start of it. steps: where not all are."""
    from mirai_dist.cycle.account import commit_of_code

    if place.ranks.rank != 0:
        return
    control.release(place.run_dir)
    drop_requests(place)
    place.events.write(
        "start",
        ranks=place.ranks.world_size,
        hosts=list(dict.fromkeys(place.hosts)),
        device=place.ranks.device.type,
        commit=commit_of_code(),
        recipe=recipe,
        steps=steps,
        job=os.environ.get("SLURM_JOB_ID", ""),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        host=place.ranks.host,
        pid=os.getpid(),
    )


def drop_requests(place: Place) -> None:
    """Answer what nobody obeyed: it was asked of an earlier start, or of a run that has come to its end."""
    if place.ranks.rank == 0:
        for request in control.open_for(place.run_dir):
            place.events.write("answered", **request.answer("dropped: this start of the run is over"))


def main() -> int:
    """Entry point of a rank; an exception leaves a record and exits hard."""
    options = parse(sys.argv[1:])
    # rank 0 tells the others (cycle/desk.py): a thousand ranks need not ask a shared disk
    stop = StopRequest(options.run_dir / "STOP" if environment_rank() == 0 else None).install()
    return guarded(lambda: run(options, stop), options.run_dir)


def end(code: int) -> NoReturn:
    """Leave without the interpreter's shutdown: gloo's threads may still be freeing tensors, which aborts in it."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
