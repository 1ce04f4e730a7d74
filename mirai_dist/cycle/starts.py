"""What the networks of a stage start from: an earlier stage's checkpoint, or published weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from torch import nn

from mirai_dist.config import schema
from mirai_dist.config.error import FileError
from mirai_dist.config.kinds import PRODUCES, refusal
from mirai_dist.state.checkpoint import describe, load_network, newest
from mirai_dist.state.commit import MANIFEST, CheckpointError
from mirai_dist.weights.files import WeightFile, checked_kind, open_weights
from mirai_dist.weights.load import agreed, load_into

Which = Literal["raw", "ema"]


@dataclass(frozen=True)
class Source:
    """Weights to start from. `kind` (config/kinds.py) is what the recipe says of a published file, or empty."""

    name: str  # as the recipe calls it
    path: Path
    which: Which
    kind: str
    published: bool


@dataclass(frozen=True)
class Starts:
    """Sources of one stage's networks, by role; None: random weights."""

    parent: Source | None = None
    teacher: Source | None = None
    critic: Source | None = None


def starts_of(recipe: schema.Recipe, stage: str, run_dir: Path) -> Starts:
    """What the recipe says a stage starts from. Raises CheckpointError when an earlier stage has no checkpoint."""
    settings = recipe.stages[stage]
    teacher = source_of(recipe, stage, settings.teacher, run_dir)
    critic = source_of(recipe, stage, settings.critic, run_dir) or teacher
    return Starts(source_of(recipe, stage, settings.parent, run_dir), teacher, critic)


def source_of(recipe: schema.Recipe, stage: str, name: str, run_dir: Path) -> Source | None:
    """Where the weights are that `stage` calls `name`; None where it calls none. CheckpointError as above."""
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


@dataclass(frozen=True)
class Started:
    """What a network started from, as its checkpoints remember it and the console says it."""

    source: Source
    kind: str
    digest: str  # of the parent checkpoint's manifest, or of the published weights' values
    cost: str  # what reading took, in words; empty for a checkpoint

    def described(self) -> dict[str, str]:
        """For the passports of checkpoints."""
        source = self.source
        return {
            "name": source.name,
            "path": str(source.path),
            "which": source.which,
            "kind": self.kind,
            "digest": self.digest,
        }

    def __str__(self) -> str:
        source = self.source
        return f"{source.name} ({source.path}, {source.which}, kind {self.kind}, digest {self.digest}){self.cost}"


def fill(network: nn.Module, source: Source, stage_kind: str, role: str) -> Started:
    """Load a network's weights from its source, each rank its own shards.

    `role` (parent, teacher, critic) says what the source is to a stage of `stage_kind`. Raises FileError or
    CheckpointError, on all ranks, for a file that is damaged, does not fit, or is of a kind that this role refuses.
    """
    if not source.published:
        load_network(source.path, _role_in(source.path, role), network, source.which)
        return Started(source, source.kind, _manifest_digest(source.path), "")
    # agreed: a rank whose copy of the file is broken must not leave the others waiting in the load
    file, kind = agreed(source.path, lambda: _opened(source, stage_kind, role))
    report = load_into(network, file)
    cost = f": {report.bytes_read / 1e6:,.1f} of {file.bytes / 1e6:,.1f} MB read by this rank, {report.seconds:.1f} s"
    return Started(source, kind, report.checksum, cost)


def identity(source: Source) -> str:
    """What tells these weights from others, without reading them whole. FileError, on all ranks, for a damaged file."""
    if not source.published:
        return _manifest_digest(source.path)
    found = agreed(source.path, lambda: open_weights(source.path, source.which).identity())
    return " ".join(found.values())


def _manifest_digest(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()[:16]


def _opened(source: Source, stage_kind: str, role: str) -> tuple[WeightFile, str]:
    """The file and its kind. FileError when it is damaged, or of a kind that this role refuses."""
    file = open_weights(source.path, source.which)
    kind = checked_kind(file, source.kind)
    why = refusal(stage_kind, role, kind)
    if why:
        raise FileError(source.path, f"{why}; change weights.{source.name}")
    return file, kind


def _role_in(path: Path, role: str) -> str:
    """Scores start from a stage's teacher, causal networks from its generator, or from a teacher of the same shape."""
    stored = describe(path).networks
    return "generator" if role == "parent" and "generator" in stored else stored[0]
