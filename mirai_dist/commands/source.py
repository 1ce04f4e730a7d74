"""Which checkpoint a command means: a run, a stage of it, an arm and seed, or the checkpoint itself.

    RUN/recipe.yaml
    RUN/stages/<stage>[/<arm>/seed-<n>]/checkpoints/cycle-<n>-position-<n>

Any directory of this tree may be named; what it leaves open is filled in by options, then by defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mirai_dist.config import FileError, Resolved, load
from mirai_dist.config.rundir import checkpoints
from mirai_dist.config.schema import Recipe
from mirai_dist.state.commit import latest

_CHECKPOINTS, _SEED = "checkpoints", "seed-"


@dataclass(frozen=True)
class Found:
    """A checkpoint, and the training run that wrote it. `arm`: empty outside the study's stage. `resolved`: the recipe
    as this stage, or arm, has it."""

    path: Path
    run_dir: Path
    stage: str
    arm: str
    seed: int
    resolved: Resolved

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe


@dataclass(frozen=True)
class _Wish:
    """What was asked for; None where anything will do."""

    stage: str | None = None
    arm: str | None = None
    seed: int | None = None
    checkpoint: str | None = None


def find_checkpoint(source: Path, stage: str | None, arm: str | None, seed: int | None) -> Found:
    """The checkpoint that `source` and the options name: by default the newest of the last stage's foresight arm.

    Only names are looked at here; whoever reads the checkpoint verifies it. Raises FileError naming what there is
    when the wish does not fit the run, and CheckpointError when all checkpoints of the place are torn.
    """
    run_dir = _run_of(source)
    wish = _agreed(source, _named_by(source, run_dir), _Wish(stage, arm, seed))
    resolved = load(run_dir / "recipe.yaml")
    name = wish.stage or list(resolved.recipe.stages)[-1]
    if name not in resolved.recipe.stages:
        raise FileError(source, f"the run has no stage {name}; it has {_listed(resolved.recipe.stages)}")
    directory = run_dir / "stages" / name
    if name == resolved.recipe.study_stage:
        arm, seed = _training(source, resolved, wish)
        directory, own = directory / arm / f"{_SEED}{seed}", resolved.of_arm(arm)
    else:
        if wish.arm is not None or wish.seed is not None:
            raise FileError(source, f"stage {name} has no arms and seeds; leave --arm and --seed out, or name another "
                                    f"stage with --stage ({_listed(resolved.recipe.stages)})")
        arm, seed, own = "", resolved.recipe.seed, resolved.of_stage(name)
    path = _checkpoint(directory / _CHECKPOINTS, run_dir, wish.checkpoint)
    return Found(path, run_dir, name, arm, seed, own)


def _run_of(source: Path) -> Path:
    """The run directory that `source` is, or lies in."""
    if not source.is_dir():
        raise FileError(source, "is no directory; name a run, stage or checkpoint directory of mirai train")
    absolute = source.resolve()
    for above in (absolute, *absolute.parents):
        inside = absolute.relative_to(above).parts
        if (above / "recipe.yaml").is_file() and inside[:1] in ((), ("stages",)):
            return above
    raise FileError(source, "there is no recipe.yaml in it, nor above a folder stages that it lies in; name a run, "
                            "stage or checkpoint directory of mirai train")


def _named_by(source: Path, run_dir: Path) -> _Wish:
    """What the path itself says."""
    parts = list(source.resolve().relative_to(run_dir).parts[1:])
    checkpoint = None
    if _CHECKPOINTS in parts:
        place = parts.index(_CHECKPOINTS)
        checkpoint = parts[place + 1] if parts[place + 1 :] else None
        del parts[place:]
    if len(parts) > 3 or not all(part.removeprefix(_SEED).isdecimal() for part in parts[2:]):
        raise FileError(source, "is neither a run, stage or checkpoint directory of mirai train, nor an arm or seed")
    stage, arm, seed = [*parts, None, None, None][:3]
    return _Wish(stage, arm, int(seed.removeprefix(_SEED)) if seed else None, checkpoint)


def _agreed(source: Path, path: _Wish, options: _Wish) -> _Wish:
    """Path and options together. Raises FileError when they contradict each other."""
    chosen = {}
    for name in ("stage", "arm", "seed"):
        ours, theirs = getattr(path, name), getattr(options, name)
        if ours is not None and theirs is not None and ours != theirs:
            raise FileError(source, f"lies in {name} {ours}, and --{name} says {theirs}; leave one of the two out")
        chosen[name] = theirs if ours is None else ours
    return _Wish(**chosen, checkpoint=path.checkpoint)


def _training(source: Path, resolved: Resolved, wish: _Wish) -> tuple[str, int]:
    """Arm and seed of a dmd stage."""
    arms, seeds = list(resolved.recipe.study.arms), resolved.recipe.study.seeds
    arm = wish.arm or ("foresight" if "foresight" in arms else arms[0])
    if arm not in arms:
        raise FileError(source, f"the run has no arm {arm}; it has {_listed(arms)}")
    seed = seeds[0] if wish.seed is None else wish.seed
    if seed not in seeds:
        raise FileError(source, f"the run was not trained with seed {seed}; its seeds are {_listed(seeds)}")
    return arm, seed


def _checkpoint(root: Path, run_dir: Path, name: str | None) -> Path:
    """The named checkpoint below `root`, or the newest complete one."""
    path = root / name if name else latest(root)
    if path is not None:
        return path
    present = dict.fromkeys(path.parent.parent.relative_to(run_dir).as_posix() for path in checkpoints(run_dir))
    there = f"there are some in {_listed(present)}" if present else "the run has none yet: train it first"
    raise FileError(root, f"holds no checkpoint; {there}")


def _listed(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names)
