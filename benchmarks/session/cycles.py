"""Real cycles on one device: the trainer's stage, phase by phase, with foresight and without, beside the plan."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean

import torch

from benchmarks.session.measure import Case, Desk
from benchmarks.session.one_gpu import ALL, NAMES, TOO_LARGE, DrawnStage, OneGpu, one_gpu, phase_name
from mirai_dist.observe.ledger import UNACCOUNTED, Ledger
from mirai_dist.plan.estimate import StagePlan
from mirai_dist.plan.gpus import GIB

# By number in the recipe. The first warms up: with foresight it meets every shape that there is. Then without and with
# foresight by turns, so that a device that slows down slows both.
WARM_UP, ORDER = 2, (0, 2, 1, 3)


class Phases(Ledger):
    """The trainer's phases as the planner names them: "generator rollout", "critic backward", "replay".

    On a GPU each phase waits for its own work where it begins and ends, and its peak of memory is noted (in bytes); the
    clock of a trainer charges a phase with launching it, and with whatever it happens to wait for. waits False: a
    trainer's clock, and the peaks mean nothing.
    """

    def __init__(self, device: torch.device, waits: bool = True) -> None:
        self._on_gpu = device.type == "cuda" and waits
        self.peaks = {UNACCOUNTED: 0}
        self._open = [UNACCOUNTED]
        self._update = ""
        super().__init__(self._read)

    def _read(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self, update: str) -> None:
        """What is done next belongs to this update, until it comes to the replay."""
        self._update = update

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name == "replay":
            self._update = name
        whole = phase_name(self._update, name)
        self._note_peak()
        self._open.append(whole)
        with super().phase(whole):
            yield
        self._note_peak()
        self._open.pop()

    def _note_peak(self) -> None:
        if self._on_gpu:
            peak = torch.cuda.max_memory_allocated()
            self.peaks[self._open[-1]] = max(peak, self.peaks.get(self._open[-1], 0))
            torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class Cycle:
    """What one cycle took: seconds and peak bytes (0: not on a GPU) by phase; seconds in collectives, within phases;
    bytes that the allocator has reserved."""

    number: int
    seconds: dict[str, float]
    peaks: dict[str, int]
    collectives: float
    reserved: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def run(stage: DrawnStage, number: int, waits: bool = True) -> Cycle:
    """The cycle of this number, as a resumed run would take it up. waits: see `Phases`."""
    stage.cycle, stage.position = number, 0
    device = stage.run.draws.device
    phases = stage.ledger = Phases(device, waits)
    for update in stage.positions:
        phases.begin(update)
        stage.step()
        stage.observe()
        stage.advance()
    collectives = sum(stage.run.waits.take().values())  # waits for the device
    reserved = torch.cuda.memory_reserved() if device.type == "cuda" else 0
    return Cycle(number, phases.close_cycle(), phases.peaks, collectives, reserved)


@dataclass
class Measured:
    """Cycles so far, without foresight and with it."""

    desk: Desk
    one: OneGpu
    by_foresight: dict[bool, list[Cycle]] = field(default_factory=lambda: {False: [], True: []})

    def case(self, name: str) -> Case:
        return Case(name, self.one.by, self.one.size)

    def run_all(self, stage: DrawnStage) -> None:
        """A row a cycle, at once; as many of them as there is time for."""
        latest = 0.0  # seconds of the cycle before
        plan = [(WARM_UP, "the first cycle, warming up", True)]
        plan += [(number, f"cycle {number}", True) for number in ORDER]
        plan += [(ORDER[-1], f"cycle {ORDER[-1]}, not waiting at phases", False)]
        for number, name, waits in plan:
            if self.desk.left < latest:
                self.desk.skip(self.case(name), "the section's deadline came too near")
                continue
            done = run(stage, number, waits)
            latest = done.total
            took = {"ms": 1e3 * done.total, "collectives_ms": 1e3 * done.collectives}
            self.desk.write(self.case(name), **took, reserved_gib=done.reserved / GIB)
            if name == f"cycle {number}":
                self.by_foresight[number >= stage.recipe.foresight.start_cycle].append(done)

    def write(self) -> None:
        """A row a phase and one for all, with foresight and without; and what foresight adds."""
        planned = self.one.planned()
        for foresight, cycles in self.by_foresight.items():
            if cycles:
                self._write_phases(foresight, cycles, planned)
        self._write_overhead(planned)

    def _write_phases(self, foresight: bool, cycles: Sequence[Cycle], planned: StagePlan) -> None:
        seconds = predicted(planned, foresight) or {}
        held = {phase_name(each.update, each.phase): each.total for each in planned.moments}
        held[ALL] = planned.peak.total
        measured = [each.seconds | {ALL: each.total} for each in cycles]
        for phase in dict.fromkeys(name for each in measured for name in each):
            peaks = [max(each.peaks.values()) if phase == ALL else each.peaks.get(phase, 0) for each in cycles]
            self.desk.write(
                self.case(f"{NAMES[foresight]}: {phase}"),
                phase=phase,
                foresight=foresight,
                cycles=[each.number for each in cycles],
                ms=1e3 * fmean(each.get(phase, 0.0) for each in measured),
                predicted_ms=1e3 * seconds[phase] if phase in seconds else None,
                predicted_from=["mirai plan"],
                peak_gib=max(peaks) / GIB if any(peaks) else None,
                predicted_gib=held[phase] / GIB if phase in held else None,
            )

    def _write_overhead(self, planned: StagePlan) -> None:
        """Of cycles that come in pairs, whose exits cost the same. Noise may make it negative: not a bar."""
        pairs = min(map(len, self.by_foresight.values()))
        if not pairs:
            self.desk.skip(self.case("what foresight adds"), "there was no pair of cycles, with it and without")
            return
        without, with_it = (fmean(each.total for each in self.by_foresight[on][:pairs]) for on in (False, True))
        found: dict[str, float] = {}
        base, foresight = predicted(planned, False), predicted(planned, True)
        if base and foresight:
            found["predicted_added_ms"] = 1e3 * (foresight[ALL] - base[ALL])
            found["predicted_percent"] = 100 * (foresight[ALL] / base[ALL] - 1)
        case, percent = self.case("what foresight adds"), 100 * (with_it / without - 1)
        added = 1e3 * (with_it - without)
        self.desk.write(case, added_ms=added, percent=percent, predicted_from=["mirai plan"], **found)


def predicted(planned: StagePlan, foresight: bool) -> dict[str, float] | None:
    """Seconds by phase as the planner expects them, and of all; None for a device that it does not know."""
    found = planned.seconds if foresight else planned.seconds_without
    if found is None:
        return None
    seconds = {phase: each.total for phase, each in found.items()}
    return seconds | {ALL: sum(seconds.values())}


def cycles(desk: Desk) -> None:
    """The recipe's cycles, as many as fit into the section's time."""
    one = one_gpu(desk)
    if one is None:
        desk.skip(Case("cycle", "any", "one sample"), TOO_LARGE)
        return
    measured = Measured(desk, one)
    try:
        measured.run_all(one.stage(desk.out))
    except torch.OutOfMemoryError as error:
        needed = f"the plan said {one.planned().peak.total / GIB:.1f} GiB of tensors"
        desk.skip(measured.case("cycle"), f"{needed}, and: {str(error).splitlines()[0]}")
    measured.write()
