"""The chain of a run: every stage behind its gate, in the order of the recipe; or some of its steps (config/steps.py).

    for each stage:  judge its start, where it has a gate and something to train; then train what is not done
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from mirai_dist.config import RecipeError, Resolved
from mirai_dist.config.jobs import Job, is_done, jobs
from mirai_dist.config.steps import REPORT, gate_before
from mirai_dist.cycle import gate
from mirai_dist.cycle.pipeline import Place, train


def run_chain(resolved: Resolved, place: Place, steps: Sequence[str]) -> None:
    """Do the steps of the stages that are not done yet. Called by all ranks.

    Raises RecipeError, before anything is done, where a step needs one that is neither done nor among them, and
    GateFailed where a gate fails: nothing behind it is begun.
    """
    members = by_stage(resolved, place)
    check_ready(members, place, steps)
    for stage, every in members.items():
        dist.barrier()  # rank 0 may still be writing the last job's marker
        open_jobs = [job for job in every if not is_done(job)]
        if gate_before(stage) in steps and (open_jobs or stage not in steps):
            gate.judge(every[0], place)
        elif every[0].recipe.stages[stage].gate.clips and stage in steps and open_jobs:
            gate.require(every[0], place)
        for job in every if stage in steps else ():
            dist.barrier()
            train(job, place)
    dist.barrier()


def by_stage(resolved: Resolved, place: Place) -> dict[str, list[Job]]:
    """The training runs of every stage."""
    members: dict[str, list[Job]] = {}
    for job in jobs(resolved, place.run_dir):
        members.setdefault(job.stage, []).append(job)
    return members


def check_ready(members: dict[str, list[Job]], place: Place, steps: Sequence[str]) -> None:
    """RecipeError where a step needs a stage that is not done, and is not done before it here."""
    finished = {stage for stage, every in members.items() if stage in steps or all(map(is_done, every))}
    for stage, every in members.items():
        settings = every[0].recipe.stages[stage]
        needed = {gate_before(stage): [settings.parent], stage: [settings.parent, settings.teacher, settings.critic]}
        for step, sources in needed.items():
            for source in sources if step in steps else ():
                if source in members and source not in finished:
                    what = f"starts from {source}, which has no finished checkpoint in {place.run_dir}"
                    raise RecipeError(f"--only {step}", f"{what}; run --only {source} first")
    missing = [stage for stage in members if stage not in finished]
    if REPORT in steps and missing:
        what = f"stage {missing[0]} is not finished in {place.run_dir}; run --only {missing[0]} first"
        raise RecipeError(f"--only {REPORT}", what)
