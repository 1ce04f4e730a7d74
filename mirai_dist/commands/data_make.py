"""`mirai data make ode`: the trajectories of an ode stage ahead of the run, by one process or a job array.

The run would make the same bytes itself when it comes to the stage; it takes what it finds.
"""

from __future__ import annotations

import argparse
from contextlib import closing

import torch

from mirai_dist.commands.data_progress import part_console
from mirai_dist.config import RecipeError, files, load, rundir
from mirai_dist.cycle.trajectories import Making, make
from mirai_dist.data.arrays import Part


def run(options: argparse.Namespace) -> int:
    """Make this part's shards. Raises RecipeError, FileError and CheckpointError, one line each."""
    part = Part.parse(options.part)
    resolved = load(options.recipe, options.overrides)
    files.check(resolved.recipe, resolved.origins)
    stages = [name for name, stage in resolved.recipe.stages.items() if stage.kind == "ode" and stage.trajectories]
    name = options.stage or next(iter(stages), "")
    if name not in stages:
        known = f"it has {', '.join(stages)}" if stages else "it has none"
        what = f"the recipe has no stage {name!r} of kind ode that makes trajectories; {known}"
        raise RecipeError("--stage" if options.stage else str(options.recipe), what)
    making = Making(resolved.of_stage(name).recipe, name, options.run_dir or rundir.default(resolved.recipe))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with closing(part_console(making.folder, part)) as console:
        make(making, part, device, console)
    return 0
