"""What collectives move, by phase: FSDP2 by the very shard plan that the run applies.

A unit is gathered in the compute dtype, every parameter filled up along its first axis to a multiple of the shards:

    resharded after forward    once in each forward that executes it, and for each differentiated pass once more in
                               backward, with which recomputation shares it; the root once a backward
    else                       once after it was last freed: backward frees it, passes without gradient keep it; of
                               several differentiated passes the first to go backward finds it gathered

Gradients are reduced in fp32 once a unit and micro-batch (the last one only, unless planned), however often the unit
ran: a reduce-scatter in the shard group, and an all-reduce of the shard over HSDP's replicas. A block of the generator
runs once a segment, and is reduced twice in the last of several micro-batches (see `Follower`). Norms, metrics and
agreements are a few bytes and left out. The text encoder is gathered once a prompt batch.

payload: bytes a process group is handed (what it gathers into, or reduces). wire: bytes a rank sends in a ring, in
which neighbours share a node: a group of S ranks moves (S - 1) / S of a gather or reduce-scatter, twice that of an
all-reduce; where a group spans nodes, all of it passes through every node's network once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mirai_dist.config.schema import Recipe, Stage
from mirai_dist.method.arithmetic import PRESETS
from mirai_dist.plan.passes import Pass, Update, roles
from mirai_dist.plan.shapes import BYTES, Parameters, of_role, padded
from mirai_dist.plan.shards import ShardPlan, predictor_plan, text_plan, wan_plan

GATHER, REDUCE_SCATTER, ALL_REDUCE = "all_gather", "reduce_scatter", "all_reduce"


@dataclass(frozen=True)
class Moved:
    """Collectives of one kind: how many (expected), and their payload in bytes."""

    count: float = 0.0
    payload: float = 0.0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.count + other.count, self.payload + other.payload)


Traffic = dict[tuple[str, str], Moved]  # by (phase, collective)


def plan_of(role: str, recipe: Recipe, trained: bool) -> ShardPlan:
    """The shard plan of a role's network, as the run's builder asks for it."""
    if role == "predictor":
        return predictor_plan(recipe.parallel, PRESETS[recipe.foresight.preset].bf16_predictor)
    parameters = of_role(role, recipe)
    if role == "text":
        return text_plan(recipe.parallel, parameters.blocks)
    return wan_plan(recipe.parallel, parameters.blocks, trained)


@dataclass(frozen=True)
class Sharded:
    """A role's network as it is cut: payloads in bytes of gathering and of reducing each unit."""

    parameters: Parameters
    plan: ShardPlan
    shards: int

    @cached_property
    def gathered(self) -> tuple[int, ...]:
        """Bytes of each unit once gathered, in the plan's order (the root last)."""
        return tuple(n * BYTES[self.plan.compute_dtype] for n in self._padded)

    @cached_property
    def reduced(self) -> tuple[int, ...]:
        """Bytes of each unit's whole gradient, as it is reduced."""
        return tuple(n * BYTES["float32"] for n in self._padded)

    @cached_property
    def _padded(self) -> tuple[int, ...]:
        *nested, root = self.parameters.units(self.plan)
        block = padded(self.parameters.block, self.shards)  # all nested units are blocks
        return (*(block for _ in nested), padded(root, self.shards))

    @property
    def resharded(self) -> bool:
        return self.plan.units[-1].reshard_after_forward


class Follower:
    """Follows a rank through updates, and counts what its collectives move. Which networks are gathered is kept from
    one update to the next."""

    def __init__(self, recipe: Recipe, networks: Mapping[str, Sharded], replicas: int) -> None:
        self.recipe, self.networks, self.replicas = recipe, networks, replicas
        self._resident: set[str] = set()

    def update(self, update: Update) -> Traffic:
        """One update with all of its micro-batches."""
        found: Traffic = {}
        for index in range(update.micro_batches):
            for each in update.passes:
                self._forward(found, each)
            last = index == update.micro_batches - 1
            for role in dict.fromkeys(each.role for each in update.passes if each.gradient):
                passes = [each for each in update.passes if each.gradient and each.role == role]
                held_back = index > 0 and not self.networks[role].plan.sync_every_micro_batch
                self._backward(found, role, passes, (last, held_back))
        self._resident -= set(update.refreshed)
        return found

    def _forward(self, found: Traffic, each: Pass) -> None:
        network = self.networks[each.role]
        nested, root = network.gathered[:-1], network.gathered[-1]
        if network.shards == 1:
            return
        if network.resharded:
            units = (*nested[: each.blocks], root)
            _add(found, (each.phase, GATHER), Moved(len(units) * each.count, sum(units) * each.count))
        elif each.role not in self._resident:
            _add(found, (each.phase, GATHER), Moved(len(nested) + 1, sum(nested) + root))
            self._resident.add(each.role)

    def _backward(self, found: Traffic, role: str, passes: list[Pass], when: tuple[bool, bool]) -> None:
        last, held_back = when
        network = self.networks[role]
        nested, root = network.gathered[:-1], network.gathered[-1]
        times = sum(each.count for each in passes)
        leaky = role == "generator" and self.recipe.rollout.kv_grad == "leaky"
        # The root's inputs have no gradient, so it stays gathered to the end of backward; leaked keys would free it.
        rooted = times if leaky else 1
        spared = 0 if network.resharded else 1  # what forward left gathered
        if network.shards > 1:
            often = (times - spared, rooted - spared)
            moved = Moved(len(nested) * often[0] + often[1], sum(nested) * often[0] + root * often[1])
            _add(found, ("backward", GATHER), moved)
        self._resident.discard(role)
        if last or network.plan.sync_every_micro_batch:
            # A unit that ran more than once reduces what earlier micro-batches left as soon as its first backward is
            # through, and the rest after the last one.
            twice = 2 if held_back and times > 1 else 1
            _add_reduction(found, network, self.replicas, (twice, twice if leaky else 1))


def _add_reduction(found: Traffic, network: Sharded, replicas: int, times: tuple[int, int]) -> None:
    """Gradients of each unit: `times` is how often the nested ones and the root are reduced."""
    nested, root = network.reduced[:-1], network.reduced[-1]
    count = len(nested) * times[0] + times[1]
    payload = sum(nested) * times[0] + root * times[1]
    if network.shards > 1:
        _add(found, ("backward", REDUCE_SCATTER), Moved(count, payload))
    if replicas > 1:
        _add(found, ("backward", ALL_REDUCE), Moved(count, payload / network.shards))


def follower(recipe: Recipe, stage: Stage, mesh: tuple[int, int]) -> Follower:
    """For the networks of a stage, cut over a mesh of (replicas, shards)."""
    held = roles(recipe, stage)
    networks = {
        role: Sharded(of_role(role, recipe, stage), plan_of(role, recipe, role in held.trained), mesh[1])
        for role in (*held.trained, *held.frozen)
    }
    return Follower(recipe, networks, mesh[0])


def _add(found: Traffic, key: tuple[str, str], moved: Moved) -> None:
    if moved.count:
        found[key] = found.get(key, Moved()) + moved


@dataclass(frozen=True)
class Wire:
    """Bytes on the wire: `intra`, sent by each rank inside its node; `inter`, sent by each node into the network."""

    intra: float = 0.0
    inter: float = 0.0

    def __add__(self, other: Wire) -> Wire:
        return Wire(self.intra + other.intra, self.inter + other.inter)


def wire(collective: str, payload: float, mesh: tuple[int, int], gpus_per_node: int) -> Wire:
    """Bytes of rings over a mesh of (replicas, shards), neighbouring ranks in a shard group."""
    replicas, shards = mesh
    if collective != ALL_REDUCE:
        sent = (shards - 1) / shards * payload
        # One ring a shard group: its ranks in a node pass on inside the node, one link of them leaves it.
        return Wire(intra=sent) if shards <= gpus_per_node else Wire(intra=sent, inter=sent)
    sent = 2 * (replicas - 1) / replicas * payload
    if replicas * shards <= gpus_per_node:
        return Wire(intra=sent)
    inside = max(1, gpus_per_node // shards)  # replicas of one shard that share a node
    rings = gpus_per_node // inside  # rings that leave a node: one for each shard that it holds
    return Wire(intra=sent if inside > 1 else 0.0, inter=sent * rings)
