"""What the gate before a stage asks of the stage's start: the bounds of three measures (evaluate/gate.py).

Where there are clean clips, of a data set or of the procedural world, bounds are multiples of what those measure:
each data set moves as it does. Where a dmd stage has a prompt file and the recipe no clips, they are absolute, for
normalised latents.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirai_dist.config.schema import Recipe


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high  # nan is outside

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}"


@dataclass(frozen=True)
class Bounds:
    """Where each measure of a clip must lie; `failing`: the share of clips that may be outside."""

    boundary_jump: Interval
    motion: Interval
    saturation: Interval
    failing: float = 0.25

    def of(self, measure: str) -> Interval:
        return getattr(self, measure)


RELATIVE = Bounds(Interval(0.0, 2.0), Interval(0.4, 2.0), Interval(0.5, 1.6))  # multiples of the clips' medians
ABSOLUTE = Bounds(Interval(0.0, 3.0), Interval(0.02, 1.1), Interval(0.4, 1.6))  # latents normalised to spread 1


def has_reference(recipe: Recipe, stage: str) -> bool:
    """Whether the start of a stage is compared with clean clips: those it trains on, else those of the recipe."""
    return bool(recipe.data.latents) or not (recipe.stages[stage].kind == "dmd" and recipe.data.prompts)


def bounds_of(recipe: Recipe, stage: str) -> Bounds:
    """The bounds of the gate before a stage; relative where it has a reference, else absolute."""
    default, gate = RELATIVE if has_reference(recipe, stage) else ABSOLUTE, recipe.stages[stage].gate

    def written(pair: list[float], otherwise: Interval) -> Interval:
        return Interval(*pair) if pair else otherwise

    return Bounds(
        written(gate.boundary_jump, default.boundary_jump),
        written(gate.motion, default.motion),
        written(gate.saturation, default.saturation),
        gate.failing,
    )
