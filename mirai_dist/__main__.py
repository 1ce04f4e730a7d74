"""What a launcher starts on every rank: `python -m mirai_dist --recipe FILE --run-dir DIR [key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line of a rank; `mirai train` writes it."""
    parser = argparse.ArgumentParser(prog="mirai_dist", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="recipe file")
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="auto: go on where a run stopped")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of recipe keys")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Train the recipe on this rank and its peers. Returns the exit code."""
    from mirai_dist.config import load
    from mirai_dist.config.digest import to_yaml
    from mirai_dist.config.rules import check_layout
    from mirai_dist.config.source import dump
    from mirai_dist.cycle.effective import effective
    from mirai_dist.cycle.pipeline import Place, run_pipeline
    from mirai_dist.cycle.study import report
    from mirai_dist.observe.console import Console
    from mirai_dist.runtime import bootstrap
    from mirai_dist.runtime.signals import StopRequest

    resolved = load(options.recipe, options.overrides)
    stop = StopRequest(options.run_dir / "STOP").install()
    ranks = bootstrap.start()
    console = Console(ranks.rank, ranks.host, options.run_dir / "logs" / f"rank-{ranks.rank}.log")
    check_layout(resolved.recipe, ranks.world_size)
    used = dump(effective(resolved.recipe, ranks.world_size, ranks.device.type))
    if ranks.rank == 0:
        (options.run_dir / "recipe.yaml").write_text(to_yaml(resolved.recipe))
        (options.run_dir / "effective.yaml").write_text(used)
    console.say(f"{resolved.recipe.name}: {ranks.world_size} ranks, run directory {options.run_dir}")
    for line in used.splitlines():
        console.say(f"  {line}")
    place = Place(ranks, options.run_dir, console, stop)
    run_pipeline(resolved, place)
    report(resolved, place)
    console.close()
    bootstrap.stop(ranks)
    return 0


def main() -> int:
    """Entry point of a rank; an exception leaves a record and exits hard."""
    options = parse(sys.argv[1:])
    from mirai_dist.runtime.guard import guarded

    return guarded(lambda: run(options), options.run_dir)


if __name__ == "__main__":
    sys.exit(main())
