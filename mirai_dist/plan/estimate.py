"""The plan of a run: memory, FLOPs, traffic and seconds of every stage and arm on a cluster, and a verdict.

Predictions, from the recipe and a few assumptions (`Plan.assumptions` lists them); nothing here measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from mirai_dist.config import Resolved
from mirai_dist.config.rules import check_layout
from mirai_dist.config.schema import Parallel, Recipe, Stage
from mirai_dist.plan import flops, memory, passes, time, traffic
from mirai_dist.plan.flops import Flops
from mirai_dist.plan.gpus import GIB, Gpu
from mirai_dist.plan.memory import Moment
from mirai_dist.plan.time import Machine, Seconds

CONTEXT = int(1.5 * GIB)  # of a process on a GPU: CUDA context, NCCL's buffers, cuBLAS's workspace
HOST_CONTEXT = int(0.4 * GIB)  # of a process on the CPU: the interpreter and torch
SLACK = 1.05  # an allocator's rounding and fragmentation
NETWORK_A_GPU = 50e9  # bytes/s: one 400 Gb/s adapter a GPU
STORAGE_A_NODE = 2e9  # bytes/s that a node reads or writes
PROCESS_START = 30.0  # seconds: interpreter, imports, process group


@dataclass(frozen=True)
class Cluster:
    """Where a run is planned for. gpu: None for one the table lacks, or for CPU ranks. memory: bytes a rank may use,
    instead of the table's. network: bytes/s of a node, 0 assumes an adapter a GPU. storage: bytes/s of a node."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu | None = None
    memory: int | None = None
    network: float = 0.0
    storage: float = STORAGE_A_NODE
    context: int = CONTEXT

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def limit(self) -> int | None:
        """Bytes a rank may use; None where nobody said."""
        return self.memory if self.memory is not None else self.gpu.memory if self.gpu else None

    def machine(self, parallel: Parallel) -> Machine | None:
        """What seconds depend on; None without a known GPU, or where the peak is not that of the dtype."""
        if self.gpu is None or parallel.compute_dtype != "bfloat16":
            return None
        replicas, gpu = parallel.replicas, self.gpu.attending(parallel.attention)
        network = self.network or NETWORK_A_GPU * self.gpus_per_node
        return Machine(gpu, self.gpus_per_node, network, (replicas, self.ranks // replicas))


@dataclass(frozen=True)
class StagePlan:
    """One stage, and for dmd one arm of it. flops, moved: of a rank and a cycle, by phase. seconds: of a cycle, by
    phase, with foresight and without; None where the GPU is unknown. runs: how many seeds run it."""

    name: str
    arm: str
    kind: str
    cycles: int
    foresight_cycles: int
    runs: int
    replicas: int
    micro_batches: int
    parameters: Mapping[str, int]
    moments: tuple[Moment, ...]
    flops: Mapping[str, Flops]
    moved: traffic.Traffic
    saved: int
    preparation: Flops
    preparing: Seconds | None = None
    seconds: Mapping[str, Seconds] | None = None
    seconds_without: Mapping[str, Seconds] | None = None

    @property
    def title(self) -> str:
        return f"{self.name} {self.arm}".strip()

    @property
    def peak(self) -> Moment:
        """Where the stage holds most."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def seconds_a_cycle(self) -> float | None:
        """With foresight, where it ever is on."""
        return sum(each.total for each in self.seconds.values()) if self.seconds is not None else None

    @property
    def seconds_of_all(self) -> float | None:
        """All cycles of one seed."""
        if self.seconds is None or self.seconds_without is None:
            return None
        without = sum(each.total for each in self.seconds_without.values())
        on = self.foresight_cycles * (self.seconds_a_cycle or 0.0)
        return on + (self.cycles - self.foresight_cycles) * without


@dataclass(frozen=True)
class Plan:
    """A run on a cluster. `change`: the smallest change that makes it fit, "" where it fits or nothing tried does."""

    name: str
    cluster: Cluster
    replicas: int
    stages: tuple[StagePlan, ...]
    saves: Mapping[str, int]
    read: int
    assumptions: tuple[str, ...] = ()
    change: str = field(default="", compare=False)

    @cached_property
    def worst(self) -> StagePlan:
        """The stage that holds most."""
        return max(self.stages, key=lambda stage: stage.peak.total)

    @property
    def peak(self) -> int:
        """Bytes a rank needs: tensors, the allocator's part, and the process itself."""
        return _with_process(self.worst.peak.total, self.cluster)

    @property
    def headroom(self) -> int | None:
        """Bytes between the peak and the limit; negative where it does not fit, None without a limit."""
        return None if self.cluster.limit is None else self.cluster.limit - self.peak

    @property
    def fits(self) -> bool | None:
        return None if self.headroom is None else self.headroom >= 0

    @property
    def seconds_a_cycle(self) -> float | None:
        """Of the slowest stage: what a signal may have to wait for at most."""
        known = [stage.seconds_a_cycle for stage in self.stages if stage.seconds_a_cycle is not None]
        return max(known, default=None)

    @property
    def seconds_a_save(self) -> float:
        """Of the largest checkpoint, at the assumed storage."""
        return max(stage.saved for stage in self.stages) / (self.cluster.storage * self.cluster.nodes)

    @property
    def seconds_to_start(self) -> float:
        """Processes, and the published weights: every replica reads them once."""
        return PROCESS_START + self.read * self.replicas / (self.cluster.storage * self.cluster.nodes)

    @property
    def seconds(self) -> float | None:
        """Of the whole run: start, cycles of every stage, arm and seed, and saves."""
        total = self.seconds_to_start
        for stage in self.stages:
            if stage.seconds_of_all is None:
                return None
            saves = self.saves[stage.name] * stage.saved / (self.cluster.storage * self.cluster.nodes)
            prepared = stage.preparing.total if stage.preparing else 0.0
            total += stage.runs * (stage.seconds_of_all + saves) + prepared
        return total

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.cluster.ranks / 3600


Variants = Mapping[tuple[str, str], Recipe]
"""The recipe as each (stage, arm of the study) sees it; "" where a stage has no arms."""


def plan(recipe: Recipe, cluster: Cluster, variants: Variants | None = None) -> Plan:
    """Plan a recipe on a cluster. variants: of its stages and arms (`variants_of`); None: all are as the recipe itself
    says, without overrides of their own.

    RecipeError where the ranks cannot share the batches.
    """
    check_layout(recipe, cluster.ranks)
    variants = variants or {(name, ""): recipe for name in recipe.stages}
    stages = tuple(_stage(own, name, arm, cluster) for (name, arm), own in variants.items())
    saves = {name: -(-stage.cycles // recipe.checkpoint.every_cycles) for name, stage in recipe.stages.items()}
    read = sum(2 * _published(recipe, name) for name in recipe.weights)
    assumed = tuple(_assumptions(recipe, cluster))
    return Plan(recipe.name, cluster, recipe.parallel.replicas, stages, saves, read, assumed)


def needed(recipe: Recipe, stage: str, cluster: Cluster) -> int:
    """Bytes that a rank needs in one stage: `Plan.peak`, without the rest of a plan. RecipeError as in `plan`."""
    check_layout(recipe, cluster.ranks)
    replicas = recipe.parallel.replicas
    found = memory.moments(recipe, recipe.stages[stage], (replicas, cluster.ranks // replicas))
    return _with_process(max(moment.total for moment in found), cluster)


def _with_process(tensors: int, cluster: Cluster) -> int:
    return int(tensors * SLACK) + cluster.context


def variants_of(resolved: Resolved) -> dict[tuple[str, str], Recipe]:
    """The recipe as every stage and arm sees it, in the order that they are trained in."""
    recipe, found = resolved.recipe, dict[tuple[str, str], Recipe]()
    for name in recipe.stages:
        if name == recipe.study_stage:
            found |= {(name, arm): resolved.of_arm(arm).recipe for arm in recipe.study.arms}
        else:
            found[name, ""] = resolved.of_stage(name).recipe
    return found


def _stage(recipe: Recipe, name: str, arm: str, cluster: Cluster) -> StagePlan:
    stage, replicas = recipe.stages[name], recipe.parallel.replicas
    check_layout(recipe, cluster.ranks)
    mesh = (replicas, cluster.ranks // replicas)
    updates = passes.updates(recipe, stage, cluster.ranks)
    held = passes.roles(recipe, stage)
    sharded = traffic.follower(recipe, stage, mesh).networks
    counts = {role: each.parameters.count for role, each in sharded.items()}
    saved = sum(counts[role] * (12 if role in held.trained else 0) for role in counts)
    saved += sum(counts[role] * 4 for role in held.averaged)
    machine = cluster.machine(recipe.parallel)
    without = passes.updates(recipe, stage, cluster.ranks, foresight=False)
    foresight = stage.kind == "dmd" and recipe.foresight.weight > 0
    return StagePlan(
        name=name,
        arm=arm,
        kind=stage.kind,
        cycles=stage.cycles,
        foresight_cycles=stage.cycles - recipe.foresight.start_cycle if foresight else 0,
        runs=len(recipe.study.seeds) if name == recipe.study_stage else 1,
        replicas=replicas,
        micro_batches=updates[0].micro_batches,
        parameters=counts,
        moments=memory.moments(recipe, stage, mesh),
        flops=_flops(recipe, updates),
        moved=_moved(recipe, stage, mesh, updates),
        saved=saved,
        preparation=_preparation(recipe, stage, cluster.ranks),
        preparing=_preparing(recipe, stage, machine, cluster.ranks),
        seconds=_seconds(recipe, stage, updates, machine) if machine else None,
        seconds_without=_seconds(recipe, stage, without, machine) if machine else None,
    )


def _flops(recipe: Recipe, updates: tuple[passes.Update, ...]) -> dict[str, Flops]:
    """Of a cycle, under the phase's name; what belongs to one update of a dmd cycle alone has that name before it."""
    found: dict[str, Flops] = {}
    for update in updates:
        for phase, counted in flops.of_update(recipe, update).items():
            key = _phase(update, phase, updates)
            found[key] = found.get(key, Flops()) + counted * update.times
    return found


def _phase(update: passes.Update, phase: str, updates: tuple[passes.Update, ...]) -> str:
    return phase if len(updates) == 1 or update.name == phase else f"{update.name} {phase}"


def _moved(
    recipe: Recipe, stage: Stage, mesh: tuple[int, int], updates: tuple[passes.Update, ...]
) -> traffic.Traffic:
    """Of a cycle in the steady state."""
    found: traffic.Traffic = {}
    for update, moved in _followed(recipe, stage, mesh, updates):
        for (phase, collective), each in moved.items():
            key = _phase(update, phase, updates), collective
            found[key] = found.get(key, traffic.Moved()) + each
    return found


def _followed(
    recipe: Recipe, stage: Stage, mesh: tuple[int, int], updates: tuple[passes.Update, ...]
) -> list[tuple[passes.Update, traffic.Traffic]]:
    """Traffic of every update of the second cycle, after which nothing changes."""
    follower = traffic.follower(recipe, stage, mesh)
    order = [update for each in updates for update in [each] * each.times]
    for update in order:
        follower.update(update)
    return [(update, follower.update(update)) for update in order]


def _seconds(
    recipe: Recipe, stage: Stage, updates: tuple[passes.Update, ...], machine: Machine
) -> dict[str, Seconds]:
    found: dict[str, Seconds] = {}
    networks = dict(traffic.follower(recipe, stage, machine.mesh).networks)
    for update, moved in _followed(recipe, stage, machine.mesh, updates):
        for phase, seconds in time.of_update(recipe, update, moved, networks, machine).items():
            key = _phase(update, phase, updates)
            found[key] = found.get(key, Seconds()) + seconds
    return found


def _preparation(recipe: Recipe, stage: Stage, ranks: int) -> Flops:
    """A rank's share of the trajectories that an ode stage makes before it trains."""
    if stage.kind != "ode" or recipe.data.ode_pairs:
        return Flops()
    one = sum((flops.forward(recipe, each) * each.count for each in passes.trajectory(recipe)), start=Flops())
    return one * (stage.trajectories / ranks)


def _preparing(recipe: Recipe, stage: Stage, machine: Machine | None, ranks: int) -> Seconds | None:
    """Seconds of the same; ranks make theirs without each other."""
    if machine is None or stage.kind != "ode" or recipe.data.ode_pairs:
        return None
    return time.of_passes(recipe, passes.trajectory(recipe), machine) * (stage.trajectories / ranks)


def _published(recipe: Recipe, name: str) -> int:
    """Parameters read from an entry of `weights`, once for each role that starts from it."""
    total = 0
    for stage in recipe.stages.values():
        trained = "teacher" if stage.kind == "bidirectional" else "generator"
        critic = stage.critic or stage.teacher if stage.kind == "dmd" else ""
        starts = (("teacher", stage.teacher), ("critic", critic), (trained, stage.parent))
        total += sum(memory.of_role(role, recipe).count for role, source in starts if source == name)
    return total


def _assumptions(recipe: Recipe, cluster: Cluster) -> list[str]:
    """What the numbers rest on, for whoever reads them."""
    lines = ["predictions from shapes: nothing here was measured; exit steps are drawn uniformly"]
    lines.append("not counted: gates, sample grids, the report, and the procedural world's clips")
    lines.append(f"memory: tensors x {SLACK} for the allocator, and {cluster.context / GIB:.1f} GiB for the process")
    if recipe.text.encoder == "umt5" and not passes.holds_text_encoder(recipe):
        lines.append(f"the text encoder is not counted: its shape is known for text.dim {passes.TEXT_DIM} alone")
    if passes.rollout_frames(recipe) > recipe.video.latent_frames:
        lines.append("the autoencoder's work on rollouts longer than what is scored is not counted")
    gpu = cluster.gpu
    if gpu is None or recipe.parallel.compute_dtype != "bfloat16":
        return [*lines, "no seconds: they need a GPU of the table, and bfloat16"]
    reached = gpu.attending(recipe.parallel.attention).efficiency
    attention = f"attention {reached.attention:.0%} forward and {reached.attention_backward:.0%} backward"
    lines.append(f"of {gpu.flops / 1e12:,.0f} TF/s dense bf16: products {reached.dense:.0%}, {attention}")
    lines.append(f"of {gpu.bandwidth / 1e12:.3g} TB/s of its memory: {reached.memory:.0%}")
    network = cluster.network or NETWORK_A_GPU * cluster.gpus_per_node
    inside = f"{time.LINK:.0%} of {gpu.link / 1e9:,.0f} GB/s inside a node"
    lines.append(f"collectives: {inside}, {time.NETWORK:.0%} of {network / 1e9:,.0f} GB/s a node between nodes")
    lines.append(f"storage: {cluster.storage / 1e9:g} GB/s a node; published weights of 2 bytes a parameter")
    return lines
