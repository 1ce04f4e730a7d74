"""What the networks of a stage start from: an earlier stage's checkpoint, or published weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from torch import nn

from mirai_dist.config import schema
from mirai_dist.config.error import FileError
from mirai_dist.config.kinds import PRODUCES, refusal
from mirai_dist.state.checkpoint import describe, load_network, newest
from mirai_dist.state.commit import CheckpointError
from mirai_dist.weights.files import checked_kind, open_weights
from mirai_dist.weights.load import load_into

Which = Literal["raw", "ema"]


@dataclass(frozen=True)
class Source:
    """Weights to start from. `kind` (config/kinds.py) is what the recipe says of a published file, or empty."""

    name: str  # as the recipe calls it
    path: Path
    which: Which
    kind: str
    published: bool

    def described(self) -> dict[str, str]:
        """For the passports of checkpoints that descend from this."""
        return {"name": self.name, "path": str(self.path), "which": self.which, "kind": self.kind}


@dataclass(frozen=True)
class Starts:
    """Sources of one stage's networks, by role; None: random weights."""

    parent: Source | None = None
    teacher: Source | None = None
    critic: Source | None = None

    def described(self) -> dict[str, dict[str, str]]:
        return {role: source.described() for role, source in vars(self).items() if source is not None}


def starts_of(recipe: schema.Recipe, stage: str, run_dir: Path) -> Starts:
    """What the recipe says a stage starts from. Raises CheckpointError when an earlier stage has no checkpoint."""
    settings = recipe.stages[stage]

    def source(name: str) -> Source | None:
        if not name:
            return None
        if name in recipe.weights:
            weights = recipe.weights[name]
            return Source(name, Path(weights.path), cast(Which, weights.which), weights.kind, published=True)
        root = run_dir / "stages" / name / "checkpoints"
        path = newest(root)
        if path is None:
            raise CheckpointError(f"stage {stage} starts from {name}, but {root} holds no checkpoint")
        earlier = recipe.stages[name]
        return Source(name, path, "ema" if earlier.ema.decay > 0 else "raw", PRODUCES[earlier.kind], published=False)

    teacher = source(settings.teacher)
    return Starts(source(settings.parent), teacher, source(settings.critic) or teacher)


def fill(network: nn.Module, source: Source, stage_kind: str, role: str) -> None:
    """Load a network's weights from its source, each rank its own shards.

    `role` (parent, teacher, critic) says what the source is to a stage of `stage_kind`. Raises FileError or
    CheckpointError, on all ranks, for a file that is damaged, does not fit, or is of a kind that this role refuses.
    """
    if not source.published:
        load_network(source.path, _role_in(source.path, role), network, source.which)
        return
    file = open_weights(source.path, source.which)
    why = refusal(stage_kind, role, checked_kind(file, source.kind))
    if why:
        raise FileError(source.path, f"{why}; change weights.{source.name}")
    load_into(network, file)


def _role_in(path: Path, role: str) -> str:
    """Scores start from a stage's teacher, causal networks from its generator, or from a teacher of the same shape."""
    stored = describe(path).networks
    return "generator" if role == "parent" and "generator" in stored else stored[0]
