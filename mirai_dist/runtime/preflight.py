"""The pre-flight of a job: before hours are spent on a bad node, all ranks look at theirs and at each other.

    python -m mirai_dist.runtime.preflight --select N --run-dir RUN --out FILE      under srun: choose N of the nodes

It takes seconds, and two minutes at most. The result is RUN/preflight.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mirai_dist.config.cluster import TRANSPORTS
from mirai_dist.config.error import RecipeError
from mirai_dist.node import software, transport
from mirai_dist.runtime import bootstrap, nodelist
from mirai_dist.runtime.examination import Crew, Examination, Patience, Plan
from mirai_dist.runtime.guard import DO_NOT_REQUEUE, SUSPECT_NODE, guarded
from mirai_dist.runtime.rollcall import RollCall
from mirai_dist.runtime.verdict import Verdict

RECORD = "preflight.json"


class SuspectNode(RuntimeError):
    """The pre-flight names hosts that are unfit. One line; the job should start again without them."""

    exit_code = SUSPECT_NODE
    shared = True  # all ranks raise the same: rank 0 tells it

    def __init__(self, what: str, suspects: Sequence[str]) -> None:
        super().__init__(what)
        self.suspects = list(suspects)  # what the next start should avoid


class NotFit(RuntimeError):
    """The pre-flight found what would be no better on other hosts. One line; starting again will not help."""

    exit_code = DO_NOT_REQUEUE


def due(mode: str, world: bootstrap.World) -> bool:
    """Whether a run of this mode (auto, always or never) has a pre-flight: by default where it spans several hosts."""
    return mode == "always" or (mode == "auto" and world.world_size > world.local_size)


def run(world: bootstrap.World, plan: Plan) -> dict[str, Any]:
    """Examine the nodes of a job, from all of its ranks and before any other collective. Returns the record.

    Raises SuspectNode or NotFit on all ranks, after rank 0 has written the record to RUN/preflight.json.
    """
    call = RollCall(dist.PrefixStore("preflight", world.store), world.rank, world.world_size)
    if plan.expected and plan.env.get("NCCL_DEBUG_FILE"):
        # NCCL does not make the folder of its log.
        transport.log_file(plan.env["NCCL_DEBUG_FILE"]).parent.mkdir(parents=True, exist_ok=True)

    def conclude(verdict: Verdict) -> dict[str, Any]:
        document = verdict.document()
        if document["verdict"] in ("fail", "suspect"):
            write(plan.folder / RECORD, document)  # a run that goes on writes it when the directory is its own
        return document

    hosts = hosts_of_ranks(plan.env)
    crew = Crew(call, world.device, hosts if len(hosts) == world.world_size else [], expected_nodes(plan.env))
    found = Examination(crew, plan).hold(conclude)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # the run's own tensors are of other sizes
    refuse(found)
    return found


def refuse(found: Mapping[str, Any]) -> None:
    """Raise what a record amounts to: SuspectNode, NotFit, or nothing."""
    if found["verdict"] == "suspect":
        raise SuspectNode(f"pre-flight: {found['line']}", list(found["suspects"]))
    if found["verdict"] == "fail":
        raise NotFit(f"pre-flight: {found['line']}")


def expected_nodes(env: Mapping[str, str]) -> int | None:
    """Nodes that the launcher speaks of: torchrun's agents, or the nodes of the step; None where it does not."""
    number = env.get("GROUP_WORLD_SIZE") or env.get("SLURM_STEP_NUM_NODES") or ""
    return int(number) if number.isdigit() else None


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write the record of a pre-flight; it replaces that of an earlier attempt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(text(document), encoding="utf-8")
    beside.replace(path)


def text(document: Mapping[str, Any]) -> str:
    """The record of a pre-flight."""
    return json.dumps(document, indent=1) + "\n"


def choose(verdict: Verdict, wanted: int) -> tuple[list[str], dict[str, str]]:
    """The best hosts, in the scheduler's order, and why each other one was left out.

    Unfit ones never; then those with nothing to remark before those with warnings, and the faster before the slower.
    Fewer than `wanted` where there are not enough.
    """
    unfit = verdict.suspects
    fit = [host for host in verdict.hosts if host not in unfit]
    ranked = sorted(fit, key=lambda host: (bool(verdict.reasons(host)), -verdict.paces[host]))
    chosen = set(ranked[:wanted])
    common = set.intersection(*(set(verdict.reasons(host)) for host in fit)) if fit else set()
    left = dict(unfit)
    for host in ranked[wanted:]:
        own = [reason for reason in verdict.reasons(host) if reason not in common]
        left[host] = "; ".join(["spare", *own, f"worst measure {verdict.paces[host]:.2f} of the median"])
    return [host for host in verdict.hosts if host in chosen], left


def select(options: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Choose `options.select` of the nodes of this step and write their names, joined by commas, to `options.out`.

    The record goes beside it, with the ending .json. Returns 0; raises SuspectNode where too few are fit, NotFit where
    no other nodes would help.
    """
    place = bootstrap.find_place(env)
    patience = Patience(arriving=options.patience)
    host = software.node_name(env)
    store = bootstrap.connect(place, host, timedelta(seconds=options.patience), everybody=False)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = bootstrap.choose_device(place, gpus)
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def join(ranks: Sequence[int]) -> None:
        # A connection of its own: a store's client serves one thread at a time, and this one waits for the others.
        own = dist.PrefixStore("talk", store.clone())  # pyright: ignore[reportAttributeAccessIssue]  missing in stubs
        backend = "nccl" if gpus else "gloo"
        timeout, rank = timedelta(seconds=patience.together), ranks.index(place.rank)
        dist.init_process_group(backend, store=own, rank=rank, world_size=len(ranks), timeout=timeout)

    def conclude(verdict: Verdict) -> dict[str, Any]:
        chosen, left = choose(verdict, options.select)
        document = verdict.document() | {"chosen": chosen, "left_out": left}
        write(options.out.with_suffix(".json"), document)
        return document

    call = RollCall(dist.PrefixStore("preflight", store), place.rank, place.world_size)
    crew = Crew(call, device, hosts_of_ranks(env), expected_nodes(env), join)
    found = Examination(crew, Plan(options.run_dir, env, patience=patience)).hold(conclude)
    if place.rank != 0:
        return 0  # rank 0 speaks
    if len(found["chosen"]) < options.select or found["verdict"] == "fail":
        refuse(found)
        raise NotFit(f"pre-flight: {options.select} nodes are wanted, and there are {len(found['hosts'])}")
    for name, why in found["left_out"].items():
        sys.stdout.write(f"pre-flight: {name} left out: {why}\n")
    sys.stdout.write(f"pre-flight: {found['seconds']} s; starting on {','.join(found['chosen'])}\n")
    options.out.write_text(",".join(found["chosen"]) + "\n")
    return 0


def hosts_of_ranks(env: Mapping[str, str]) -> list[str]:
    """The node of every task of this SLURM step, as --distribution=block lays them out; empty without SLURM.

    Under torchrun the tasks are its agents, not the ranks.
    """
    if "SLURM_STEP_NODELIST" not in env:
        return []
    hosts = nodelist.expand(env["SLURM_STEP_NODELIST"])
    counts = nodelist.tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", ""))
    return [host for host, count in zip(hosts, counts, strict=True) for _ in range(count)]


def transports(names: str) -> tuple[str, ...]:
    """Transports as written on a command line, `ib,nvlink`. Raises RecipeError for an unknown one."""
    listed = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in listed:
        if name not in TRANSPORTS:
            raise RecipeError("--expect-transport", f"{name!r} is none of {', '.join(TRANSPORTS)}")
    return listed


def main() -> int:
    """One rank of `srun python -m mirai_dist.runtime.preflight`."""
    parser = argparse.ArgumentParser(prog="python -m mirai_dist.runtime.preflight", description=__doc__)
    parser.add_argument("--select", type=int, required=True, metavar="N", help="nodes to choose")
    parser.add_argument("--run-dir", type=Path, required=True, help="where checkpoints go")
    parser.add_argument("--out", type=Path, required=True, help="file of the chosen nodes, joined by commas")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds in which all nodes must have arrived")
    options = parser.parse_args()
    return guarded(lambda: select(options, os.environ), options.run_dir)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread may still wait for a node that has hung
