"""The steps that a run can be split into, one job each: every stage behind its gate, and last the report."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mirai_dist.config.error import RecipeError
from mirai_dist.config.schema import Recipe

REPORT = "report"


def steps(recipe: Recipe) -> list[str]:
    """Names of all steps in order: `X.gate` where stage X has a gate, `X` (of a study all arms and seeds), `report`.

    A recipe without a dmd stage has no report.
    """
    found = []
    for name, stage in recipe.stages.items():
        found += [gate_before(name), name] if stage.gate.clips else [name]
    return [*found, REPORT] if any(stage.kind == "dmd" for stage in recipe.stages.values()) else found


def gate_before(stage: str) -> str:
    """The step that judges what a stage starts from."""
    return f"{stage}.gate"


def chosen(recipe: Recipe, only: Iterable[str]) -> list[str]:
    """The steps that `--only` names, comma-separated or repeated, in the recipe's order; all where it names none.

    Raises RecipeError, with the nearest step, for a name that is none.
    """
    every, names = steps(recipe), [name.strip() for text in only for name in text.split(",")]
    for name in names:
        if name not in every:
            raise RecipeError("--only", _unknown(recipe, name, every))
    return [step for step in every if step in names or not names]


def _unknown(recipe: Recipe, name: str, every: list[str]) -> str:
    for stage in recipe.stages:
        if name == gate_before(stage):
            return f"stage {stage} has no gate; give it one: stages.{stage}.gate.clips=16"
    near = difflib.get_close_matches(name, every, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{name!r} is no step of this recipe; {meant}steps: {', '.join(every)}"
