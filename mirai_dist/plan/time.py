"""Seconds of a cycle: a model, not a measurement. It is only as good as the efficiencies it assumes (gpus.py).

    a phase     dense FLOPs / (peak x dense) + attention FLOPs / (peak x attention) + elementwise bytes / (bandwidth x
                memory), and what its collectives take beyond that: where FSDP gathers a block at a time they run under
                the computation, where it gathers a network at a time nothing hides them
    collective  bytes inside a node / (link x LINK) + bytes into the network / (network x NETWORK) + hops x latency
    optimizer   bytes that AdamW, clipping, norm and average read and write / (bandwidth x memory)

Elementwise bytes: an eager block reads and writes ELEMENTWISE bytes for each bf16 value of its tokens outside products
and attention (norms and rotary positions in fp32), 4 for each hidden value of the feed-forward; backward twice that.
Stragglers, data loading, sample grids and evaluation are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mirai_dist.config.schema import Recipe
from mirai_dist.plan import flops, traffic
from mirai_dist.plan.gpus import Gpu
from mirai_dist.plan.passes import Pass, Update
from mirai_dist.plan.shapes import network_of

ELEMENTWISE = 158  # bytes: 3 RMSNorms of 24, 2 rotations of 20, 3 LayerNorms, 2 modulations, 2 gates of 4, 3 sums of 6
LINK, NETWORK = 0.8, 0.9  # fractions of the links' bandwidth that collectives reach
HOP = {True: 5e-6, False: 2e-6}  # seconds a rank of a ring adds: across nodes, within one


@dataclass(frozen=True)
class Machine:
    """What seconds depend on: the device, its node, the network of a node in bytes/s a direction, the mesh
    (replicas, shards)."""

    gpu: Gpu
    gpus_per_node: int
    network: float
    mesh: tuple[int, int]


@dataclass(frozen=True)
class Seconds:
    """Of one phase: computing, and waiting for collectives."""

    compute: float = 0.0
    exposed: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.compute + other.compute, self.exposed + other.exposed)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(factor * self.compute, factor * self.exposed)

    @property
    def total(self) -> float:
        return self.compute + self.exposed


def of_update(
    recipe: Recipe, update: Update, moved: traffic.Traffic, sharded: dict[str, traffic.Sharded], machine: Machine
) -> dict[str, Seconds]:
    """Seconds of each phase of one update, all micro-batches."""
    recomputed = recipe.parallel.recompute != "none"
    found: dict[str, float] = {}
    for phase, counted in flops.of_update(recipe, update).items():
        backward = phase == "backward"
        phase = "backward" if phase == "recompute" else phase
        found[phase] = found.get(phase, 0.0) + _computing(counted, machine.gpu, backward)
    moves = machine.gpu.bandwidth * machine.gpu.efficiency.memory
    for each in update.passes:
        times = update.micro_batches * each.count
        found[each.phase] += times * elementwise(recipe, each) / moves
        if each.gradient:
            again = 1 if recomputed and each.role != "predictor" else 0
            found["backward"] += times * (2 + again) * elementwise(recipe, each) / moves
    waiting = dict.fromkeys(found, 0.0)
    for (phase, collective), each in moved.items():
        waiting[phase] += seconds_of(collective, each, machine)
    hidden = 1.0 if recipe.parallel.unit == "block" else 0.0
    seconds = {
        phase: Seconds(compute, max(0.0, waiting[phase] - hidden * compute)) for phase, compute in found.items()
    }
    own = sum(sharded[role].parameters.sharded(sharded[role].shards) for role in update.trained)
    return seconds | {"optimizer": Seconds(own * OPTIMIZER / moves)}


def of_passes(recipe: Recipe, made: Sequence[Pass], machine: Machine) -> Seconds:
    """Seconds of passes without gradient on one rank that talks to nobody."""
    moves = machine.gpu.bandwidth * machine.gpu.efficiency.memory
    each_takes = (
        each.count
        * (_computing(flops.forward(recipe, each), machine.gpu, backward=False) + elementwise(recipe, each) / moves)
        for each in made
    )
    return Seconds(sum(each_takes))


OPTIMIZER = 52  # bytes a parameter: AdamW 28, clipping 8, norm 4, average 12


def elementwise(recipe: Recipe, each: Pass) -> float:
    """Bytes that one forward moves outside products and attention."""
    rows, scale = each.batch * each.tokens, 1.0 if recipe.parallel.compute_dtype == "bfloat16" else 2.0
    if each.role == "text":
        return rows * each.blocks * recipe.text.dim * 40.0
    if each.role == "predictor":
        dim = recipe.generator.dim
        compared = each.tokens * sum(each.answers)
        return scale * (rows * each.blocks * dim * (70 + 16) + 20 * compared * recipe.teacher.dim)
    network = network_of(each.role, recipe)
    past = 8 * each.batch * each.past * network.dim if each.gradient else 0  # keys and values put behind the past's
    return scale * each.blocks * (rows * (ELEMENTWISE * network.dim + 4 * network.ffn_dim) + past)


def seconds_of(collective: str, moved: traffic.Moved, machine: Machine) -> float:
    """Seconds of collectives, one after the other."""
    sent = traffic.wire(collective, moved.payload, machine.mesh, machine.gpus_per_node)
    replicas, shards = machine.mesh
    ranks = replicas if collective == traffic.ALL_REDUCE else shards
    latency = moved.count * ranks * HOP[sent.inter > 0]
    return sent.intra / (machine.gpu.link * LINK) + sent.inter / (machine.network * NETWORK) + latency


def _computing(counted: flops.Flops, gpu: Gpu, backward: bool) -> float:
    reached = gpu.efficiency
    attention = reached.attention_backward if backward else reached.attention
    return (counted.dense / reached.dense + counted.attention / attention) / gpu.flops
