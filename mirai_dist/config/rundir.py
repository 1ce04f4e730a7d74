"""The run directory: where it is, and whether this recipe may go on in it. Nothing here writes.

`mirai train` asks before it starts anything; rank 0 asks again, however the ranks were started.
"""

from __future__ import annotations

from pathlib import Path

from mirai_dist.config.digest import conflicts, digest
from mirai_dist.config.error import RecipeError
from mirai_dist.config.load import load
from mirai_dist.config.schema import Recipe

_CHECKPOINTS = ("stages/*/checkpoints/cycle-*", "stages/*/*/seed-*/checkpoints/cycle-*")


def default(recipe: Recipe) -> Path:
    """runs/<name> under the working directory."""
    return Path("runs") / recipe.name


def checkpoints(run_dir: Path) -> list[Path]:
    """All checkpoint directories, complete or not, of all stages and arms."""
    return sorted(path for pattern in _CHECKPOINTS for path in run_dir.glob(pattern))


def check(run_dir: Path, recipe: Recipe, resume: str) -> None:
    """RecipeError if the directory belongs to another recipe, or holds what `--resume never` would run into."""
    if run_dir.exists() and not run_dir.is_dir():
        raise RecipeError(str(run_dir), "is a file, not a run directory; name another with --run-dir")
    found = checkpoints(run_dir)
    if resume == "never" and found:
        what = f"holds {len(found)} checkpoints ({found[-1].relative_to(run_dir)}, ...) and --resume is never"
        raise RecipeError(str(run_dir), f"{what}; use --resume auto, another --run-dir, or move the directory away")
    stored = run_dir / "recipe.yaml"
    if not stored.exists():
        return
    try:
        owner = load(stored).recipe
    except RecipeError as error:
        what = f"its recipe.yaml is not valid for this version ({error}); name another with --run-dir"
        raise RecipeError(str(run_dir), what) from None
    if digest(owner) == digest(recipe):
        return
    differing = conflicts(owner, recipe)
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        what = f"belongs to another recipe: {', '.join(differing[:4])}{more}"
        raise RecipeError(str(run_dir), f"{what}; name another with --run-dir, or move the directory away")
