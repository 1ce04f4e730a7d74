"""Looking at all nodes of a job from all its ranks: each by itself, then together, then one verdict for everybody.

Everything is gathered at rank 0 once, over the store, and judged there (runtime/verdict.py). What ranks do together
runs in a thread: when it hangs, the ranks that still live say so, and the one that says nothing is named.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mirai_dist.node import examine, limits, software, storage, transport
from mirai_dist.node.finding import Finding
from mirai_dist.runtime import measures, torch_facts
from mirai_dist.runtime.rollcall import RollCall
from mirai_dist.runtime.verdict import EVERYWHERE, ON_CPU, ON_GPU, Report, Verdict, judge, load_report, silent

GOODBYE = 5.0  # seconds in which all ranks hear the verdict before the first of them leaves
IN_VAIN = {"error": "waited in vain for the others"}


@dataclass(frozen=True)
class Patience:
    """Seconds that rank 0 waits for the others: to be there, for what each does alone, and for what all do together."""

    arriving: float = 30.0
    alone: float = 35.0
    together: float = 40.0


@dataclass(frozen=True)
class Crew:
    """The ranks under examination.

    hosts: of each rank, where the launcher has told; a rank that never arrives is named by it. nodes: how many the
    launcher speaks of. join: makes the process group of these ranks, in this order; None: the job has its group, of
    all ranks, and all are needed.
    """

    call: RollCall
    device: torch.device
    hosts: Sequence[str] = ()
    nodes: int | None = None
    join: Callable[[Sequence[int]], None] | None = None


@dataclass(frozen=True)
class Plan:
    """folder: where checkpoints go. env: of this process. expected: transports that must be in use."""

    folder: Path
    env: Mapping[str, str]
    expected: tuple[str, ...] = ()
    patience: Patience = Patience()


class Examination:
    """One rank's part in it; `hold` is called once, by all ranks."""

    def __init__(self, crew: Crew, plan: Plan) -> None:
        self.crew, self.plan, self.call = crew, plan, crew.call
        self.host = software.node_name(plan.env)
        self.names: dict[int, str] = {}
        self.reports: dict[int, Report] = {}  # on rank 0
        self.quiet: list[tuple[str, Finding]] = []  # on rank 0: hosts that did not answer

    def hold(self, conclude: Callable[[Verdict], dict[str, Any]]) -> dict[str, Any]:
        """Examine. conclude: called on rank 0 alone with the verdict; what it returns is returned on every rank."""
        begin, patience = time.monotonic(), self.plan.patience
        self.call.tell("here", self.host)
        roster = self.call.decide("roster", self._roster, patience.arriving)
        self.names = {int(rank): host for rank, host in roster.items()}
        if self.call.rank not in self.names:
            return {"verdict": "late"}
        leads = min(rank for rank, host in self.names.items() if host == self.host) == self.call.rank
        self.call.tell("report", asdict(self._alone(leads)))
        talkers = self.call.decide("talkers", self._talkers, patience.alone)
        if self.call.rank in talkers:
            self._talk(talkers)

        def verdict() -> dict[str, Any]:
            self._hear(talkers)
            return conclude(replace(self._judge(), seconds=round(time.monotonic() - begin, 1)))

        outcome = self.call.decide("verdict", verdict, patience.together)
        self.call.tell("bye", "")
        if self.call.rank == 0:
            self.call.heard("bye", self.names, GOODBYE)
        return outcome

    def _roster(self) -> dict[int, str]:
        """On rank 0: the host of every rank that is there in time."""
        patience = self.plan.patience.arriving
        here = self.call.heard("here", range(self.call.ranks), patience)
        for rank in sorted(set(range(self.call.ranks)) - set(here)):
            host = self.crew.hosts[rank] if self.crew.hosts else f"the host of rank {rank}"
            self.quiet.append(silent(host, "joining the others", patience))
        return here

    def _alone(self, leads: bool) -> Report:
        """What this rank finds by itself. leads: it also speaks for its host."""
        device, env = self.crew.device, self.plan.env
        found, values = [limits.affinity(limits.read())], {}
        try:
            values["matrix products"] = measures.gemm(device)
        except RuntimeError as error:  # a wrong result, or CUDA's own error: this device is unfit
            what = str(error).splitlines()[0]
            found.append(Finding("matrix products", "suspect", f"rank {self.call.rank}: {what}"))
        uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
        report = Report(self.call.rank, self.host, tuple(found), uuid=uuid, values=values)
        if not leads:
            return report
        node, facts = examine.examine(env), torch_facts.read()
        values["writing checkpoints"], folder = storage.checkpoints(self.plan.folder)
        missing = torch_facts.without_gpu(node.gpus)
        found += [*node.findings, *facts.findings, folder, *([missing] if missing else [])]
        same, usual = node.same | facts.same, node.usual | facts.usual
        return replace(report, findings=tuple(found), same=same, usual=usual, values=values)

    def _talkers(self) -> list[int]:
        """On rank 0: the ranks that go on to measure together. An unfit host would only slow the others' measures."""
        patience = self.plan.patience.alone
        told = self.call.heard("report", self.names, patience)
        self.reports = {rank: load_report(document) for rank, document in told.items()}
        missing = dict.fromkeys(host for rank, host in self.names.items() if rank not in told)
        self.quiet += [silent(host, "looking at itself", patience) for host in missing]
        verdict = self._judge(expected=())
        unfit = {host for host, finding in verdict.found if finding.level in ("fail", "suspect")}
        if self.crew.join is None and (unfit or self.quiet):
            return []
        ranks = [rank for rank, host in self.names.items() if host not in unfit]
        return ranks if len(ranks) > 1 and EVERYWHERE not in unfit else []

    def _talk(self, talkers: Sequence[int]) -> None:
        """Measure together, in a thread; hand in the result, or that nothing came of it."""
        thread = threading.Thread(target=self._together, args=(talkers,), daemon=True)
        thread.start()
        if self.call.rank != 0:  # which has the others' answers to wait for
            thread.join(self.plan.patience.together)
            if thread.is_alive():
                self.call.tell("talk", IN_VAIN)

    def _together(self, talkers: Sequence[int]) -> None:
        device, hosts = self.crew.device, [self.names[rank] for rank in talkers]
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # of this thread
            if self.crew.join is not None:
                self.crew.join(talkers)
            together = measures.all_reduce(device)
            marks = measures.clock_marks(device)
            across, inside = measures.links(hosts, device)
            used = transport.seen(dist.get_backend(), self.plan.env)
        except RuntimeError as error:
            self.call.tell("talk", {"error": (str(error).splitlines() or [type(error).__name__])[0]})
            return
        values = {"all-reduce": together}
        values |= {"link to other hosts": max(across)} if across else {}
        values |= {"link inside the host": max(inside)} if inside else {}
        self.call.tell("talk", {"values": values, "marks": marks, "used": asdict(used)})

    def _hear(self, talkers: Sequence[int]) -> None:
        """On rank 0: add to the reports what the ranks measured together."""
        patience = self.plan.patience.together
        told = self.call.heard("talk", talkers, patience + 5.0)
        if self.call.rank in talkers:
            told.setdefault(self.call.rank, IN_VAIN)  # this rank lives, as it is the one that asks
        missing = dict.fromkeys(self.names[rank] for rank in talkers if rank not in told)
        self.quiet += [silent(host, "talking to the others", patience) for host in missing]
        errors = {answer["error"]: rank for rank, answer in told.items() if "error" in answer}
        if errors and not missing:
            what = "; ".join(f"rank {rank}: {error}" for error, rank in list(errors.items())[:3])
            self.quiet.append((EVERYWHERE, Finding("talking to each other", "fail", what, "check the network")))
        whole = {rank: answer for rank, answer in told.items() if "error" not in answer}
        for rank, answer in whole.items():
            clock = measures.clock_offset(answer["marks"], whole[min(whole)]["marks"])
            report = self.reports[rank]
            values = {**report.values, **answer["values"]}
            self.reports[rank] = replace(report, values=values, clock=clock, **answer["used"])

    def _judge(self, expected: Sequence[str] | None = None) -> Verdict:
        measured = ON_GPU if self.crew.device.type == "cuda" else ON_CPU
        expected = self.plan.expected if expected is None else expected
        return judge(list(self.reports.values()), measured, self.quiet, expected, self.crew.nodes)
