"""`mirai plan`: what a run will need and cost on a cluster, before anybody queues for it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mirai_dist.config import RecipeError, Resolved, load
from mirai_dist.plan import gpus, traffic
from mirai_dist.plan.estimate import Cluster, Plan, StagePlan, plan, variants_of
from mirai_dist.plan.gpus import GIB
from mirai_dist.plan.verdict import judged, refusal
from mirai_launch import console


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="recipe file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="override: parallel.replicas=8")
    parser.add_argument("--nodes", type=_count, default=1, help="nodes (default: 1)")
    parser.add_argument("--gpus-per-node", type=_count, default=8, help="GPUs, and ranks, a node (default: 8)")
    parser.add_argument("--gpu", default="h100-80gb", help=f"one of {', '.join(gpus.GPUS)} (default: h100-80gb)")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of one GPU instead of the table's: 80GiB")
    parser.add_argument("--network", metavar="SIZE", help="bandwidth of a node's network a second (50GB a GPU)")
    parser.add_argument("--storage", metavar="SIZE", default="2GB", help="bandwidth of storage a node, a second")
    parser.add_argument("--sweep", action="store_true", help="compare numbers of nodes up to --nodes, and mesh shapes")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. Exit code 0 where it fits or cannot be told, 1 where it does not. Raises RecipeError."""
    resolved = load(arguments.recipe, arguments.overrides)
    cluster = cluster_of(arguments)
    if arguments.sweep:
        rows = list(sweep(resolved, cluster))
        if arguments.json:
            console.say(json.dumps([as_dict(row) if isinstance(row, Plan) else row for row in rows], indent=1))
        else:
            _print_sweep(resolved, rows)
        return 0
    found = judged(resolved.recipe, cluster, variants_of(resolved))
    if arguments.json:
        console.say(json.dumps(as_dict(found), indent=1))
    else:
        _print(found, arguments.gpu)
    return 1 if found.fits is False else 0


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    """The cluster that the command line describes. RecipeError for sizes that are none."""
    return Cluster(
        arguments.nodes,
        arguments.gpus_per_node,
        gpus.find(arguments.gpu),
        gpus.bytes_of(arguments.gpu_memory) if arguments.gpu_memory else None,
        gpus.bytes_of(arguments.network) if arguments.network else 0.0,
        gpus.bytes_of(arguments.storage),
    )


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 1 or more")
    return int(text)


# --- one plan --------------------------------------------------------------------------------------------------------


def _print(found: Plan, gpu: str) -> None:
    cluster = found.cluster
    shape = f"{cluster.nodes} nodes x {cluster.gpus_per_node} {gpu}"
    shards = cluster.ranks // found.replicas
    console.say(f"{found.name} on {shape}: {cluster.ranks} ranks, {found.replicas} replicas x {shards} shards", "bold")
    if cluster.gpu is None:
        near = ", ".join(gpus.nearest(gpu))
        what = f"{gpu} is not in the table of GPUs (nearest: {near})"
        console.say(f"{what}: no seconds and no MFU; --gpu-memory sets a limit", "yellow")
    for stage in shown(found):
        console.table(f"{stage.title}: memory of a rank, GiB", *_memory(stage))
        roles = ", ".join(f"{role} {_gib(count)}" for role, count in stage.peak.by_role().items())
        console.say(f"  at the peak, in {stage.peak.update} {stage.peak.phase}: {roles}")
        console.table(f"{stage.title}: a cycle of a rank (expected)", *_phases(stage, cluster))
    console.table("the run", ("", "value"), _summary(found))
    for line in found.assumptions:
        console.say(f"  assumed: {line}", "dim")
    console.say(*verdict(found))


def shown(found: Plan) -> list[StagePlan]:
    """Stages with tables of their own: of the arms of a dmd stage, the one that needs most."""
    largest: dict[str, StagePlan] = {}
    for stage in found.stages:
        before = largest.get(stage.name)
        if before is None or before.peak.total < stage.peak.total:
            largest[stage.name] = stage
    return list(largest.values())


def verdict(found: Plan) -> tuple[str, str]:
    """The last line, and its style."""
    if found.headroom is None:
        return f"peak {_gib(found.peak)} GiB a rank; no limit is known, set one with --gpu-memory", "yellow"
    if found.fits:
        return f"fits: peak {_gib(found.peak)} GiB of {_gib(found.cluster.limit)}, {_gib(found.headroom)} free", "green"
    return f"does not fit: {refusal(found)}", "red"


def _memory(stage: StagePlan) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: what is held in each phase."""
    columns = list(dict.fromkeys(what for moment in stage.moments for what in moment.by_what()))
    rows = []
    for moment in stage.moments:
        held = moment.by_what()
        name = moment.phase if moment.update in (moment.phase, stage.kind) else f"{moment.update} {moment.phase}"
        rows.append((name, *(_gib(held.get(what, 0)) for what in columns), _gib(moment.total)))
    return ("phase", *columns, "sum"), rows


def _phases(stage: StagePlan, cluster: Cluster) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows, mesh = [], _mesh(stage, cluster)
    total = traffic.Wire()
    names = [*stage.flops, *(phase for phase, _ in stage.moved), *(stage.seconds or {})]
    for phase in sorted(set(names), key=names.index):
        counted = stage.flops.get(phase)
        wire = traffic.Wire()
        for (where, collective), moved in stage.moved.items():
            if where == phase:
                wire += traffic.wire(collective, moved.payload, mesh, cluster.gpus_per_node)
        total += wire
        seconds = (stage.seconds or {}).get(phase)
        rows.append(
            (
                phase,
                _si(counted.dense) if counted else "",
                _si(counted.attention) if counted else "",
                *_wire(wire),
                *((f"{seconds.compute:.2f}", f"{seconds.exposed:.2f}") if seconds else ("", "")),
            )
        )
    flops = [sum(getattr(each, kind) for each in stage.flops.values()) for kind in ("dense", "attention")]
    last = (f"{stage.seconds_a_cycle:.2f}", "") if stage.seconds_a_cycle is not None else ("", "")
    rows.append(("all", *map(_si, flops), *_wire(total), *last))
    header = ("phase", "dense FLOPs", "attention FLOPs", "bytes in node", "node to network", "s computing", "s waiting")
    return header, rows


def _mesh(stage: StagePlan, cluster: Cluster) -> tuple[int, int]:
    return stage.replicas, cluster.ranks // stage.replicas


def _wire(wire: traffic.Wire) -> tuple[str, str]:
    return _si(wire.intra), _si(wire.inter)


def _summary(found: Plan) -> list[tuple[str, str]]:
    rows = []
    for stage in found.stages:
        counts = ", ".join(f"{role} {count:,}" for role, count in stage.parameters.items())
        rows.append((f"{stage.title} parameters", counts))
        runs = f"{stage.runs} seeds x " if stage.runs > 1 else ""
        rows.append((f"{stage.title} cycles", f"{runs}{stage.cycles}, {stage.micro_batches} micro-batches a rank"))
        if stage.seconds_a_cycle is not None:
            rows.append((f"{stage.title} s a cycle", f"{stage.seconds_a_cycle:.1f} (model, not measured)"))
    for stage in found.stages:
        if stage.preparing is not None:
            made = f"{_si(stage.preparation.total)}FLOPs a rank, {stage.preparing.total / 3600:.2f} h"
            rows.append((f"{stage.title} trajectories", f"{made} (model, not measured)"))
    rows.append(("start", f"{found.seconds_to_start:.0f} s"))
    rows.append(("a save", f"{found.seconds_a_save:.0f} s, {_gib(max(each.saved for each in found.stages))} GiB"))
    if found.seconds is not None:
        hours = f"{found.seconds / 3600:,.2f} h, {found.gpu_hours:,.1f} GPU-hours (model, not measured)"
        rows.append(("whole run", hours))
    return rows


# --- sweep -----------------------------------------------------------------------------------------------------------


def sweep(resolved: Resolved, cluster: Cluster) -> Iterator[Plan | dict[str, Any]]:
    """Plans over numbers of nodes and mesh shapes; where a shape cannot be, which and why."""
    recipe, variants = resolved.recipe, variants_of(resolved)
    for nodes in nodes_up_to(cluster.nodes):
        place = replace(cluster, nodes=nodes)
        for replicas in shapes_of(place):

            def laid_out(each: Any, replicas: int = replicas) -> Any:
                return replace(each, parallel=replace(each.parallel, replicas=replicas))

            try:
                yield plan(laid_out(recipe), place, {key: laid_out(own) for key, own in variants.items()})
            except RecipeError as error:
                yield {"nodes": nodes, "replicas": replicas, "refused": error.what}
                break  # another mesh of the same ranks splits no batch either


def nodes_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and the number itself."""
    powers = [1 << power for power in range(most.bit_length())]
    return sorted({*(each for each in powers if each <= most), most})


def shapes_of(cluster: Cluster) -> list[int]:
    """Replicas to compare: shards over all ranks, over 2, 4, ... nodes, and within one."""
    ranks = cluster.ranks
    shards = {ranks, *(cluster.gpus_per_node << power for power in range(ranks.bit_length()))}
    return sorted(ranks // each for each in shards if each <= ranks and ranks % each == 0)


def _print_sweep(resolved: Resolved, rows: list[Plan | dict[str, Any]]) -> None:
    header = ("nodes", "replicas x shards", "micro-batches", "peak GiB", "verdict")
    header += ("s a cycle", "GPU-hours", "node to network")
    cells = []
    for row in rows:
        if not isinstance(row, Plan):
            cells.append((str(row["nodes"]), "", "", "", row["refused"], "", "", ""))
            continue
        slowest = max(row.stages, key=lambda stage: stage.seconds_a_cycle or 0.0)
        fits = {True: "fits", False: "does not fit", None: "no limit known"}[row.fits]
        moved = traffic.Wire()
        for (_, collective), each in slowest.moved.items():
            moved += traffic.wire(collective, each.payload, _mesh(slowest, row.cluster), row.cluster.gpus_per_node)
        cells.append(
            (
                str(row.cluster.nodes),
                f"{row.replicas} x {row.cluster.ranks // row.replicas}",
                str(slowest.micro_batches),
                _gib(row.peak),
                fits,
                "" if row.seconds_a_cycle is None else f"{row.seconds_a_cycle:.1f}",
                "" if row.gpu_hours is None else f"{row.gpu_hours:,.1f}",
                _si(moved.inter),
            )
        )
    console.table(f"{resolved.recipe.name}: model, not measured", header, cells)


# --- JSON ------------------------------------------------------------------------------------------------------------


def as_dict(found: Plan) -> dict[str, Any]:
    """The plan as JSON holds it: bytes, FLOPs and seconds as numbers, None for what is not known."""
    cluster = found.cluster
    return {
        "name": found.name,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "gpu": cluster.gpu.name if cluster.gpu else None,
        "replicas": found.replicas,
        "limit_bytes": cluster.limit,
        "peak_bytes": found.peak,
        "headroom_bytes": found.headroom,
        "fits": found.fits,
        "change": found.change,
        "seconds_a_cycle": found.seconds_a_cycle,
        "seconds_a_save": found.seconds_a_save,
        "seconds_to_start": found.seconds_to_start,
        "seconds": found.seconds,
        "gpu_hours": found.gpu_hours,
        "assumptions": list(found.assumptions),
        "stages": [_stage_as_dict(stage, cluster) for stage in found.stages],
    }


def _stage_as_dict(stage: StagePlan, cluster: Cluster) -> dict[str, Any]:
    moved: Mapping[tuple[str, str], traffic.Moved] = stage.moved
    mesh = _mesh(stage, cluster)
    return {
        "stage": stage.name,
        "arm": stage.arm,
        "kind": stage.kind,
        "cycles": stage.cycles,
        "runs": stage.runs,
        "micro_batches": stage.micro_batches,
        "parameters": dict(stage.parameters),
        "memory": [
            {
                "update": moment.update,
                "phase": moment.phase,
                "bytes": moment.total,
                "held": [{"what": what, "role": role, "bytes": n} for (what, role), n in moment.held.items()],
            }
            for moment in stage.moments
        ],
        "flops": {phase: {"dense": each.dense, "attention": each.attention} for phase, each in stage.flops.items()},
        "traffic": [
            {
                "phase": phase,
                "collective": collective,
                "count": each.count,
                "payload_bytes": each.payload,
                "rank_bytes_in_node": traffic.wire(collective, each.payload, mesh, cluster.gpus_per_node).intra,
                "node_bytes_to_network": traffic.wire(collective, each.payload, mesh, cluster.gpus_per_node).inter,
            }
            for (phase, collective), each in moved.items()
        ],
        "seconds": {phase: asdict(each) for phase, each in stage.seconds.items()} if stage.seconds else None,
        "seconds_a_cycle": stage.seconds_a_cycle,
        "checkpoint_bytes": stage.saved,
        "trajectories_flops": stage.preparation.total,
        "trajectories_seconds": stage.preparing.total if stage.preparing else None,
    }


def _si(value: float) -> str:
    """Three digits and a prefix: 1.65 P, 58.4 G."""
    power = 0 if value < 1 else min(int(math.log10(value)) // 3, len(PREFIXES) - 1)
    return f"{value / 1000**power:.3g} {PREFIXES[power]}" if value else "0"


PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def _gib(count: int | None) -> str:
    if count is None:
        return ""
    size = count / GIB
    return f"{size:.1f}" if size >= 9.95 else f"{size:.2f}" if size >= 0.01 or not size else f"{size:.1g}"
