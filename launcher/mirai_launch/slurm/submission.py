"""From the command line of `mirai submit` to jobs in the queue: what to run, where, and in which order."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mirai_dist.config import RecipeError, Resolved, files, load, rundir
from mirai_dist.config.cluster import Cluster, load_cluster
from mirai_dist.config.digest import to_yaml
from mirai_dist.config.rules import check_layout
from mirai_dist.config.steps import steps as steps_of
from mirai_dist.operate import control
from mirai_dist.plan.estimate import Plan
from mirai_launch.slurm import lead, ledger, parse, snapshot
from mirai_launch.slurm.client import Scheduler, SchedulerError
from mirai_launch.slurm.render import Batch, Sweep, render

ALL = "all"
_VALUES = re.compile(r",(?![^\[]*\])")  # the commas between values, not those inside a list
_AT_ONCE = re.compile(r"(.*)%(\d+)")


@dataclass(frozen=True)
class Wish:
    """What the user asked for. spare: nodes on top, of which the worst are left out. array: "key=v1,v2" each, the last
    perhaps with "%2". chain: a job a step."""

    recipe: Path
    cluster: Path
    nodes: int
    spare: int = 0
    run_dir: Path | None = None
    time: str = ""
    array: tuple[str, ...] = ()
    chain: bool = False
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Element:
    """One run: its name below the common directory ("" for the only one), its directory and its recipe."""

    name: str
    run_dir: Path
    resolved: Resolved


@dataclass(frozen=True)
class Prepared:
    """Checked and ready: nothing is written yet. steps: one job each, in order."""

    wish: Wish
    cluster: Cluster
    run_dir: Path
    elements: tuple[Element, ...]
    steps: tuple[str, ...]
    sweep: Sweep | None
    time: str
    plan: Plan | None
    folder: str = field(default_factory=lambda: f"slurm/{time.strftime('%Y%m%d-%H%M%S')}")

    def batch(self, step: str, code: Path) -> Batch:
        """The job of one step."""
        recipe = self.elements[0].resolved.recipe
        name = re.sub(r"[^\w.-]", "-", recipe.name if step == ALL else f"{recipe.name}-{step}")
        return Batch(
            name=name,
            run_dir=self.run_dir,
            folder=self.folder,
            code=code,
            workdir=Path.cwd(),
            launcher_python=self.cluster.launcher_python or sys.executable,
            nodes=self.wish.nodes,
            spare=self.wish.spare,
            time=self.time,
            warning=lead.warning(self.cluster, self.plan),
            step="" if step == ALL else step,
            sweep=self.sweep,
        )


@dataclass(frozen=True)
class Queued:
    """One job in the queue."""

    job: str
    step: str
    script: Path


def prepare(wish: Wish) -> Prepared:
    """Check everything that can be checked before a job waits for hours. Raises RecipeError; writes nothing."""
    cluster = load_cluster(wish.cluster)
    limit = wish.time or cluster.time
    base = load(wish.recipe, wish.overrides)
    run_dir = (wish.run_dir or rundir.default(base.recipe)).absolute()
    sweep, settings = _sweep(wish.array)
    names = sweep.elements if sweep else ("",)
    elements = []
    for name, overrides in zip(names, settings, strict=True):
        resolved = load(wish.recipe, [*wish.overrides, *overrides])
        for variant in resolved.variants():
            files.check(variant.recipe, variant.origins)
            check_layout(variant.recipe, wish.nodes * cluster.ranks_per_node)
        rundir.check(run_dir / name, resolved.recipe, "auto")
        elements.append(Element(name, run_dir / name, resolved))
    steps = tuple(steps_of(base.recipe)) if wish.chain else (ALL,)
    plan = lead.planned(base, cluster, wish.nodes)
    _check_time(limit, lead.warning(cluster, plan), wish)
    return Prepared(wish, cluster, run_dir, tuple(elements), steps, sweep, limit, plan)


def scripts(prepared: Prepared, code: Path) -> dict[str, str]:
    """Step -> text of its batch script."""
    return {step: render(prepared.batch(step, code), prepared.cluster) for step in prepared.steps}


def options(prepared: Prepared, after: str) -> list[str]:
    """sbatch options of a step that follows job `after` ("" for the first): a failed one ends the chain."""
    if not after:
        return []
    kind = "aftercorr" if prepared.sweep else "afterok"  # of an array, each element follows its own
    return [f"--dependency={kind}:{after}", "--kill-on-invalid-dep=yes"]


def submit(prepared: Prepared, scheduler: Scheduler) -> list[Queued]:
    """Write snapshot, recipes and scripts into the run directory and queue the jobs; all of them, or none.

    Raises RecipeError where a job for this run directory is queued already, SchedulerError where SLURM refuses.
    """
    _refuse_second(prepared.run_dir, scheduler)
    code = snapshot.code(_folder(prepared.run_dir / "slurm"))
    for element in prepared.elements:
        folder = _folder(element.run_dir / prepared.folder)
        (folder / "recipe.yaml").write_text(to_yaml(element.resolved.recipe), encoding="utf-8")
    scripts_folder = _folder(prepared.run_dir / prepared.folder)
    _folder(prepared.run_dir / "logs")  # sbatch writes there, and does not make it
    for element in prepared.elements:
        control.release(element.run_dir)  # whoever submits a run that was stopped wants it to go on
    queued: list[Queued] = []
    for step, text in scripts(prepared, code).items():
        script = scripts_folder / f"{step}.sbatch"
        script.write_text(text, encoding="utf-8")
        after = queued[-1].job if queued else ""
        try:
            job = scheduler.submit(script, options(prepared, after))
        except SchedulerError:
            for each in queued:
                scheduler.cancel(each.job)
            raise
        queued.append(Queued(job, step, script))
        _note(prepared, queued[-1], after)
    return queued


def command(prepared: Prepared, step: str, after: str) -> str:
    """The sbatch command of a step, as a person would type it."""
    script = prepared.run_dir / prepared.folder / f"{step}.sbatch"
    return shlex.join(["sbatch", *options(prepared, after), os.path.relpath(script)])


def _note(prepared: Prepared, queued: Queued, after: str) -> None:
    """Into the ledger of the common run directory, and of each element its own."""
    cluster, nodes = str(prepared.wish.cluster.absolute()), prepared.wish.nodes
    places = [(prepared.run_dir, queued.job)]
    if prepared.sweep:
        places += [(each.run_dir, f"{queued.job}_{index}") for index, each in enumerate(prepared.elements)]
    for run_dir, job in places:
        script = os.path.relpath(queued.script, run_dir)
        waits = (after,) if after else ()
        ledger.append(run_dir, ledger.Submission(job, queued.step, time.time(), cluster, nodes, script, waits))


def _refuse_second(run_dir: Path, scheduler: Scheduler) -> None:
    """Two jobs in one run directory would write over each other's checkpoints."""
    known = [entry.job_id for entry in ledger.read(run_dir)]
    alive = [job for job in (scheduler.jobs(known) if known else []) if not job.ended]
    if alive:
        what = f"job {alive[0].id} of this run is {alive[0].state.lower()}"
        raise RecipeError(str(run_dir), f"{what}; cancel it (mirai cancel {run_dir}), or name another --run-dir")


def _check_time(limit: str, warning: int, wish: Wish) -> None:
    where = "--time" if wish.time else str(wish.cluster)
    try:
        seconds = parse.seconds(limit)
    except parse.ParseError:
        raise RecipeError(where, f"{limit!r} is no time limit; write minutes, 24:00:00 or 1-12:00:00") from None
    # SLURM may send the warning up to a minute early.
    if seconds is not None and seconds < warning + 60:
        what = f"a limit of {seconds:.0f} s leaves nothing before the warning, {warning} s ahead of its end"
        raise RecipeError(where, f"{what}; allow more time, or set `warning` in {wish.cluster}")


def _sweep(array: Sequence[str]) -> tuple[Sweep | None, list[list[str]]]:
    """The elements of all combinations of values, and the overrides of each; (None, one empty list) without any."""
    if not array:
        return None, [[]]
    *others, last = array
    found = _AT_ONCE.fullmatch(last)
    at_once = int(found.group(2)) if found else 0
    if found and at_once < 1:
        raise RecipeError("--array", f"{last!r} would run nothing at a time; %N is at least 1")
    choices = [list(_choices(text)) for text in [*others, found.group(1) if found else last]]
    combined = [list(each) for each in itertools.product(*choices)]
    names = tuple(_element_name(each) for each in combined)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RecipeError("--array", f"two elements would share the run directory {twice}; give each value once")
    return Sweep(names, at_once), combined


def _choices(text: str) -> Iterator[str]:
    key, equals, values = text.partition("=")
    if not equals or not values.strip():
        raise RecipeError("--array", f"{text!r} is not of the form key=value,value,...")
    yield from (f"{key.strip()}={value.strip()}" for value in _VALUES.split(values))


def _element_name(overrides: Iterable[str]) -> str:
    return "_".join(re.sub(r"[^\w.=+-]", "-", text) for text in overrides)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(str(path), f"cannot be made ({error}); name another --run-dir") from None
    return path
