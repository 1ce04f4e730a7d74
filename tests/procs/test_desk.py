"""What signals and operators ask is decided by all ranks alike, at the cost of no collective, and answered."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from mirai_dist.cycle import phases
from mirai_dist.cycle.cycle import Stopped
from mirai_dist.cycle.stages import DmdStage, Stage
from mirai_dist.observe.sinks import Sinks
from mirai_dist.observe.slow import WINDOW
from mirai_dist.operate import control, events
from mirai_dist.operate.control import Request
from mirai_dist.runtime.signals import StopRequest
from mirai_dist.state import commit
from tests.procs import tiny
from tests.procs.conftest import run_threads

RANKS = 2
TITLE = "teacher"
Hook = Callable[[Stage, StopRequest], None]


class Ran(dict[str, Any]):
    """How a rank's loop ended: stopped (the message, or empty), cycle and position."""


def run(folder: Path, hook: Hook, *overrides: str, name: str = TITLE) -> list[Ran]:
    """Run a stage on two ranks; `hook(stage, stop)` is called after each position's update on each rank."""
    small = ("teacher.blocks=1", "generator.blocks=1", "foresight.depth=1", f"stages.{name}.batch.global_size={RANKS}")
    recipe = tiny.recipe(*small, *overrides)

    def body(rank: int) -> Ran:
        stage = tiny.stage_of(recipe, name)
        stop = StopRequest(folder / "STOP" if rank == 0 else None)
        loop = tiny.loop_of(stage, folder, Sinks.of_stage(rank, folder), stop, hosts=("a", "b"))
        step = stage.step

        def stepped() -> None:
            step()
            hook(stage, stop)

        stage.step = stepped
        try:
            loop.run(stage, name)
        except Stopped as error:
            return Ran(stopped=str(error), cycle=stage.cycle, position=stage.position)
        return Ran(stopped="", cycle=stage.cycle, position=stage.position)

    control.open_for(folder)
    with tiny.lively():
        return run_threads(RANKS, body, timeout=tiny.TIMEOUT)


def at(cycle: int, what: Callable[[StopRequest], object], rank: int = 0, position: int = 0) -> Hook:
    """Do something on one rank when it has run this cycle and position."""

    def hook(stage: Stage, stop: StopRequest) -> None:
        if (stage.run.rank, stage.cycle, stage.position) == (rank, cycle, position):
            what(stop)

    return hook


def told(folder: Path, event: str) -> list[dict[str, Any]]:
    return [record for record in events.read(folder) if record["event"] == event]


def saved(folder: Path) -> list[str]:
    return [path.name for path in commit.complete(folder / "checkpoints")]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_position(tmp_path: Path, rank: int) -> None:
    found = run(tmp_path, at(0, lambda stop: stop.ask("SIGUSR2"), rank=rank, position=1), name="distil")
    assert found == [found[0]] * RANKS and (found[0]["cycle"], found[0]["position"]) == (0, 2)
    assert "stopped by SIGUSR2 in distil before cycle 0 position 2" in found[0]["stopped"]
    assert saved(tmp_path) == ["cycle-000000-position-2"]
    [end] = told(tmp_path, "stopped")
    assert (end["by"], end["stage"], end["cycle"], end["position"]) == ("SIGUSR2", "distil", 0, 2)
    assert not control.held(tmp_path), "the batch script may requeue it"


def test_a_stop_file_is_seen_by_rank_zero_for_all(tmp_path: Path) -> None:
    found = run(tmp_path, at(1, lambda stop: (tmp_path / "STOP").touch()))
    assert found == [found[0]] * RANKS and "stopped by STOP file" in found[0]["stopped"]
    assert found[0]["cycle"] == 2 and not control.held(tmp_path)


def test_an_operators_stop_is_held_and_answered(tmp_path: Path) -> None:
    request = Request("stop", by="ann@login", stage=TITLE)
    found = run(tmp_path, at(3, lambda stop: control.ask(tmp_path, request)))
    assert found == [found[0]] * RANKS and found[0]["cycle"] == 4
    assert "stopped by an operator" in found[0]["stopped"]
    assert control.held(tmp_path).startswith("stopped by ann@login")
    assert [end["by"] for end in told(tmp_path, "stopped")] == ["ann@login"]
    [answer] = told(tmp_path, "answered")
    assert answer["answer"] == "stopped before cycle 4 position 0 of teacher" and not control.pending(tmp_path)
    assert saved(tmp_path) == ["cycle-000004-position-0"]


@pytest.mark.parametrize(("stage", "after", "ends"), [(TITLE, 6, 6), ("an earlier stage", 6, 2), (TITLE, 1, 2)])
def test_a_stop_after_a_cycle_waits_for_it(tmp_path: Path, stage: str, after: int, ends: int) -> None:
    request = Request("stop", stage=stage, after=after)
    found = run(tmp_path, at(1, lambda stop: control.ask(tmp_path, request)))
    assert {each["cycle"] for each in found} == {ends}


def test_a_stop_after_the_last_cycle_still_stops(tmp_path: Path) -> None:
    request = Request("stop", stage=TITLE, after=9)
    found = run(tmp_path, at(1, lambda stop: control.ask(tmp_path, request)))
    assert all(each["stopped"] for each in found) and saved(tmp_path) == ["cycle-000009-position-0"]


def test_a_save_between_two_positions_goes_on(tmp_path: Path) -> None:
    ask = at(0, lambda stop: control.ask(tmp_path, Request("save", by="ann")))
    found = run(tmp_path, ask, "stages.distil.cycles=1", name="distil")
    assert found == [Ran(stopped="", cycle=1, position=0)] * RANKS
    assert saved(tmp_path) == ["cycle-000000-position-1", "cycle-000001-position-0"]
    assert [(each["cycle"], each["position"], each["checkpoint"]) for each in told(tmp_path, "saved")] == [
        (0, 1, "checkpoints/cycle-000000-position-1"), (1, 0, "checkpoints/cycle-000001-position-0")]
    assert told(tmp_path, "answered")[0]["answer"] == "saved before cycle 0 position 1 of distil"


def test_a_profile_is_of_whole_cycles_of_one_rank_and_one_at_a_time(tmp_path: Path) -> None:
    def ask(stop: StopRequest) -> None:
        for cycles in (2, 1):
            control.ask(tmp_path, Request("profile", rank=1, cycles=cycles))

    found = run(tmp_path, at(0, ask), "stages.teacher.cycles=6")
    assert {each["cycle"] for each in found} == {6}
    # asked in cycle 0: cycles 1 and 2 are recorded; the second is taken when the first is over
    traces = [record["trace"] for record in told(tmp_path, "profiled")]
    assert [trace.split("-rank-")[0] for trace in traces] == [
        "profiles/teacher-cycle-000001", "profiles/teacher-cycle-000004"]
    updates = []
    for trace in traces:
        with gzip.open(tmp_path / trace, "rt") as file:
            names = [each.get("name", "") for each in json.load(file)["traceEvents"]]
        updates.append(sum(name.startswith("Optimizer.step#") for name in names))
    assert updates == [2, 1], "one update a cycle"


@pytest.mark.parametrize(
    ("request_of", "answer"),
    [
        (lambda: Request("profile", rank=RANKS, cycles=1), f"refused: rank {RANKS} of {RANKS}, 1 cycles"),
        (lambda: Request("reboot"), "refused: it cannot be read"),
    ],
)
def test_what_cannot_be_done_is_refused_and_does_no_harm(
    tmp_path: Path, request_of: Callable[[], Request], answer: str
) -> None:
    found = run(tmp_path, at(1, lambda stop: control.ask(tmp_path, request_of())), "stages.teacher.cycles=3")
    assert {each["stopped"] for each in found} == {""}
    assert [each["answer"] for each in told(tmp_path, "answered")] == [answer]
    assert control.pending(tmp_path) == []


@pytest.fixture
def collectives() -> Iterator[list[tuple[int, str]]]:
    """(rank, function) of every collective that Python starts."""
    calls: list[tuple[int, str]] = []
    with ExitStack() as patches:
        for name in COLLECTIVES:
            if hasattr(dist, name):
                patches.enter_context(mock.patch.object(dist, name, counted(name, calls)))
        yield calls


COLLECTIVES = ("all_reduce", "broadcast", "barrier", "all_gather", "all_gather_object", "broadcast_object_list",
               "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single")


def counted(name: str, calls: list[tuple[int, str]]) -> Callable[..., Any]:
    function = getattr(dist, name)

    def call(*args: Any, **named: Any) -> Any:
        calls.append((dist.get_rank(), name))
        return function(*args, **named)

    return call


def test_a_position_costs_one_collective_beside_its_update(
    tmp_path: Path, collectives: list[tuple[int, str]]
) -> None:
    """Metrics, requests, and who is slow: one all-reduce together, whether anything is asked or not."""
    begun: dict[tuple[int, int, int], int] = {}
    between: list[list[str]] = []

    def hook(stage: Stage, stop: StopRequest) -> None:
        if stage.run.rank == 0 and stage.cycle == 0 and stage.position == 0:
            control.ask(tmp_path, Request("profile", rank=1, cycles=1))
        begun[stage.run.rank, stage.cycle, stage.position] = len(collectives)

    step = DmdStage.step

    def stepped(stage: DmdStage) -> None:
        cycle, position = (stage.cycle, stage.position - 1) if stage.position else (stage.cycle - 1, 2)
        where = stage.run.rank, cycle, position
        if where in begun:
            between.append([name for rank, name in collectives[begun[where] :] if rank == stage.run.rank])
        step(stage)

    with mock.patch.object(DmdStage, "step", stepped):
        run(tmp_path, hook, "stages.distil.cycles=2", name="distil")
    assert len(between) == RANKS * (2 * 3 - 1)
    assert between == [["all_reduce"]] * len(between)


def test_a_delayed_rank_is_named_with_host_and_phase(tmp_path: Path) -> None:
    """Every rank's wall time is that of the delayed one: only its own time differs."""
    flow_loss = phases._flow_loss

    def delayed(stage: Any, *args: Any) -> Any:
        if stage.run.rank == 1:
            time.sleep(0.25)
        return flow_loss(stage, *args)

    with mock.patch.object(phases, "_flow_loss", delayed):
        run(tmp_path, lambda stage, stop: None, f"stages.teacher.cycles={WINDOW}")
    [alarm] = told(tmp_path, "alarm")
    assert alarm["name"] == "slow rank 1 in forward" and alarm["up"]
    assert alarm["text"].startswith("b:1 is slow in phase forward: 0.2")
    assert "warning: teacher cycle" in (tmp_path / "logs/rank-0.log").read_text()
