"""Shard plans as data: what FSDP gathers at a time for each network. The run and the planner read the same plan."""

from __future__ import annotations

from dataclasses import dataclass

from mirai_dist.config.schema import Parallel, Recipe

TRAINED, FROZEN = "trained", "frozen"


@dataclass(frozen=True)
class Unit:
    """A part of a network that is gathered and freed as one. The root unit has path ""."""

    path: str
    reshard_after_forward: bool


@dataclass(frozen=True)
class ShardPlan:
    """How one network is sharded.

    storage_dtype: of the sharded parameters (fp32 masters when trained). recompute: paths of the units whose
    activations are recomputed in backward. sync_every_micro_batch: reduce gradients after every micro-batch.
    keep_attention: what attention gave is kept, and not recomputed.
    """

    units: tuple[Unit, ...]
    storage_dtype: str
    compute_dtype: str
    recompute: tuple[str, ...]
    sync_every_micro_batch: bool
    keep_attention: bool = False


def wan_plan(parallel: Parallel, blocks: int, trained: bool) -> ShardPlan:
    """Plan of a Wan DiT with `blocks` blocks: a unit a block and the rest, or the whole network as one unit."""
    paths = tuple(f"blocks.{i}" for i in range(blocks))
    nested = paths if parallel.unit == "block" else ()
    # FSDP2 keeps the root gathered between forward and backward by default; a frozen network has no backward.
    units = tuple(Unit(path, parallel.reshard_after_forward) for path in (*nested, ""))
    return ShardPlan(
        units=units,
        storage_dtype="float32" if trained else parallel.compute_dtype,
        compute_dtype=parallel.compute_dtype,
        recompute=paths if trained and parallel.recompute != "none" else (),
        sync_every_micro_batch=parallel.sync_every_micro_batch,
        keep_attention=trained and parallel.recompute == "selective",
    )


def predictor_plan(parallel: Parallel, bf16_masters: bool) -> ShardPlan:
    """Plan of the predictor: one unit, small enough to stay gathered. `bf16_masters` is the release's storage."""
    return ShardPlan(
        units=(Unit("", reshard_after_forward=False),),
        storage_dtype="bfloat16" if bf16_masters else "float32",
        compute_dtype=parallel.compute_dtype,
        recompute=(),
        sync_every_micro_batch=parallel.sync_every_micro_batch,
    )


def text_plan(parallel: Parallel, blocks: int) -> ShardPlan:
    """Plan of a frozen UMT5 encoder in its file's bf16: a unit a block, and the rest with the word table."""
    paths = (*(f"encoder.block.{i}" for i in range(blocks)), "")
    units = tuple(Unit(path, parallel.reshard_after_forward) for path in paths)
    return ShardPlan(units, "bfloat16", "bfloat16", recompute=(), sync_every_micro_batch=False)


def ranks_per_shard(recipe: Recipe, ranks: int) -> int:
    """Ranks that share one copy of the parameters. ValueError when the replicas do not divide the ranks."""
    replicas = recipe.parallel.replicas
    if ranks % replicas:
        raise ValueError(f"parallel.replicas = {replicas} does not divide {ranks} ranks: use a divisor of {ranks}")
    return ranks // replicas
