"""What a session measures of real cycles, on a CPU: recipe, phases, the trace's table, replay step, drawing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.session import cycles, draw, one_gpu, replay, traces
from benchmarks.session.measure import Desk
from benchmarks.session.one_gpu import RECIPE, SMALL, OneGpu
from mirai_dist.config import load
from mirai_dist.config.jobs import Job, jobs
from mirai_dist.config.rules import check_layout
from mirai_dist.method.arithmetic import PRESETS
from mirai_dist.method.replay import ReplayStep
from mirai_dist.observe.ledger import UNACCOUNTED
from mirai_dist.plan.estimate import Cluster
from mirai_dist.plan.gpus import GIB, GPUS
from mirai_dist.state.draws import Draws
from tests.procs import tiny
from tests.procs.conftest import run_threads

CPU = torch.device("cpu")
Measured = Callable[[int], list[dict[str, Any]]]


def job(*overrides: str) -> Job:
    (found,) = jobs(load(RECIPE, overrides), Path())
    return found


def on(gpu: str, *overrides: str) -> OneGpu:
    found = job(*overrides)
    return OneGpu(found, found.recipe, Cluster(1, 1, GPUS[gpu]), None)  # type: ignore[arg-type]


def rows(folder: Path, section: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{section}.jsonl").read_text().splitlines()]


# --- the recipe ------------------------------------------------------------------------------------------------


def test_the_exits_of_the_recipe_cost_what_uniform_ones_are_expected_to() -> None:
    found = job()
    check_layout(found.recipe, ranks=1)
    draws, steps = Draws(found.seed, CPU), len(found.recipe.rollout.steps)
    exits = [
        [draws.integer(f"{found.stage}/exit", cycle, position, 0, steps) for position in range(6)]
        for cycle in range(found.cycles)
    ]
    costs = [(each[0], sum(each[1:])) for each in exits]
    start = found.recipe.foresight.start_cycle
    assert costs[:start] == costs[start:], "cycles without and with foresight do not cost the same"
    assert [sum(pair) / start for pair in zip(*costs[:start], strict=True)] == [(steps - 1) / 2, 5 * (steps - 1) / 2]


def test_the_teacher_is_as_large_as_the_device_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_gpu.bootstrap, "start", lambda: None)
    found = {}
    for gpu in ("h200-141gb", "h100-80gb", "a100-40gb"):
        monkeypatch.setattr(one_gpu, "cluster_of", lambda ranks, gpu=gpu: Cluster(1, 1, GPUS[gpu]))
        found[gpu] = one_gpu.one_gpu(Desk("cycle", tmp_path, 10.0, rehearsal=False))
    large, small = found["h200-141gb"], found["h100-80gb"]
    assert large is not None and large.recipe == large.asked and large.size.endswith("teacher of 40 blocks")
    assert small is not None and 20 < small.recipe.teacher.blocks < 40 and "of 40 blocks, for want of" in small.size
    assert small.planned().peak.total < 0.95 * GPUS["h100-80gb"].memory
    assert found["a100-40gb"] is None


# --- cycles ----------------------------------------------------------------------------------------------------


def test_cycles_are_the_trainers_and_foresight_goes_by_their_number(tmp_path: Path) -> None:
    found = job(*SMALL)

    def body(rank: int) -> tuple[set[str], dict[int, cycles.Cycle]]:
        stage = OneGpu(found, found.recipe, Cluster(1, 1), tiny.world()).stage(tmp_path)
        networks = {name: network for name, network in tiny.networks_of(stage).items() if name != "predictor"}
        zeros = {name for name, network in networks.items() for p in network.parameters() if not tiny.whole(p).all()}
        return zeros, {number: cycles.run(stage, number) for number in (2, 0)}

    ((zeros, ran),) = run_threads(1, body, timeout=120)
    assert not zeros, "products of zeros are faster than those of numbers"
    planned = on("h200-141gb").planned()
    assert planned.seconds is not None and planned.seconds_without is not None
    extra = {UNACCOUNTED, "generator measures"}
    assert ran[2].seconds.keys() == planned.seconds.keys() | extra
    assert ran[0].seconds.keys() == planned.seconds_without.keys() | extra
    assert all(seconds > 0 for each in ran.values() for seconds in each.seconds.values())


class Gpu:
    """Stands for torch.cuda: memory as a test sets it, and how often somebody waited."""

    def __init__(self) -> None:
        self.now, self.peak, self.waits = 0, 0, 0

    def allocate(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.now

    def max_memory_allocated(self) -> int:
        return self.peak

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    for name in ("reset_peak_memory_stats", "max_memory_allocated", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    return found


@pytest.mark.parametrize("waits", [True, False])
def test_a_phase_has_its_own_peak_and_waits_for_its_work(gpu: Gpu, waits: bool) -> None:
    phases = cycles.Phases(torch.device("cuda"), waits)
    phases.begin("critic")
    with phases.phase("scores"):
        gpu.allocate(5)
        with phases.phase("measures"):
            gpu.allocate(20)
            gpu.allocate(-20)
        gpu.allocate(1)
    with phases.phase("critic"):
        gpu.allocate(3)
    for name in ("replay", "backward"):
        with phases.phase(name):
            gpu.allocate(-2)
    assert phases.close_cycle().keys() == {
        "critic scores", "critic measures", "critic", "replay", "replay backward", UNACCOUNTED
    }  # fmt: skip
    peaks = {"critic scores": 6, "critic measures": 25, "critic": 9, "replay": 9, "replay backward": 7, UNACCOUNTED: 9}
    assert phases.peaks == (peaks if waits else {UNACCOUNTED: 0})
    assert gpu.waits == (12 if waits else 0)  # once at the start and the end, and where a phase begins or ends


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Rows of cycles that take a tenth more than planned, with time for so many of them."""
    planned = on("h200-141gb").planned()

    def ran(stage: object, number: int, waits: bool = True) -> cycles.Cycle:
        seconds = cycles.predicted(planned, number >= 2)
        assert seconds is not None
        desk._ends -= 1.1 * seconds[one_gpu.ALL]
        spent = {name: 1.1 * each for name, each in seconds.items() if name != one_gpu.ALL}
        return cycles.Cycle(number, spent, {"generator scores": 80 * GIB}, 0.25, 90 * GIB)

    class Stage:
        recipe = job().recipe

    monkeypatch.setattr(cycles, "run", ran)
    monkeypatch.setattr(OneGpu, "by", "fused, cudnn")
    desk = Desk("cycle", tmp_path, 1000.0, rehearsal=True)

    def run_all(count: int) -> list[dict[str, Any]]:
        seconds = [ran(None, number).total for number in (cycles.WARM_UP, *cycles.ORDER, cycles.ORDER[-1])]
        desk._ends = cycles.time.monotonic() + sum(seconds[:count]) + 0.9 * min(seconds)
        found = cycles.Measured(desk, on("h200-141gb"))
        found.run_all(Stage())  # type: ignore[arg-type]
        found.write()
        return rows(tmp_path, "cycle")

    return run_all


def test_rows_stand_beside_the_plan_and_foresight_is_held_against_the_baseline(measured: Measured) -> None:
    found = {row["case"]: row for row in measured(6)}
    assert not [row for row in found.values() if "skipped" in row]
    for row in found.values():
        if "phase" in row:
            assert row["ms"] == pytest.approx(1.1 * row["predicted_ms"])
    whole, base = found["cycle with foresight: all"], found["cycle without foresight: all"]
    assert (whole["cycles"], base["cycles"]) == ([2, 3], [0, 1])
    assert whole["peak_gib"] == pytest.approx(80) and whole["predicted_gib"] == pytest.approx(79.5, abs=1)
    added = found["what foresight adds"]
    assert added["added_ms"] == pytest.approx(whole["ms"] - base["ms"])
    assert "ms" not in added, "a difference may be negative, and bars of milliseconds are not"
    assert added["percent"] == pytest.approx(added["predicted_percent"])
    assert 2 < added["percent"] < 15
    assert "cycle 3, not waiting at phases" in found


def test_cycles_that_time_does_not_allow_are_said_to_be_missing(measured: Measured) -> None:
    found = {row["case"]: row for row in measured(2)}
    assert [name for name, row in found.items() if "skipped" in row] == [
        "cycle 2", "cycle 1", "cycle 3", "cycle 3, not waiting at phases", "what foresight adds",
    ]  # fmt: skip
    assert found["cycle without foresight: all"]["cycles"] == [0]
    assert "cycle with foresight: all" not in found


# --- traces ----------------------------------------------------------------------------------------------------


def event(category: str, name: str, begin: float, length: float, thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": begin, "dur": length}


def written(path: Path, *events: dict[str, Any]) -> Path:
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}, file)
    return path


def test_kernels_are_told_apart_and_gaps_are_when_none_runs(tmp_path: Path) -> None:
    trace = written(
        tmp_path / "t.json.gz",
        event("user_annotation", "a part", 1000.0, 100.0),
        event("kernel", "nvjet_tst_128x256", 900.0, 50.0, 7),  # before the part
        event("kernel", "nvjet_tst_128x256", 1000.0, 30.0, 7),
        event("kernel", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", 1030.0, 20.0, 7),
        event("kernel", "ncclDevKernel_AllGather_RING_LL", 1040.0, 20.0, 8),  # ten of them beside attention
        event("kernel", "norm_rope_forward", 1060.0, 5.0, 7),
        event("kernel", "void at::native::vectorized_elementwise_kernel<4>", 1070.0, 10.0, 7),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 1090.0, 5.0, 7),
        event("cpu_op", "aten::mm", 1000.0, 90.0),
        event("cuda_runtime", "cudaLaunchKernel", 1001.0, 1.0),
        event("cuda_driver", "cuLaunchKernelEx", 1002.0, 1.0, 2),
        event("cuda_runtime", "cudaDeviceSynchronize", 1003.0, 97.0),
    )
    found = traces.breakdown(trace, "a part")
    assert found.wall == pytest.approx(0.1)
    assert found.kinds == pytest.approx({
        traces.PRODUCTS: 0.03, traces.ATTENTION: 0.02, traces.COPIES: 0.025, traces.OURS: 0.005, traces.OTHERS: 0.01,
        traces.GAPS: 0.02,
    })  # fmt: skip
    assert found.calls[traces.COPIES] == 2 and found.launches == 2
    with pytest.raises(ValueError, match="has no part 'another'"):
        traces.breakdown(trace, "another")


def test_operators_count_without_those_inside_them_where_no_gpu_is(tmp_path: Path) -> None:
    trace = written(
        tmp_path / "t.json.gz",
        event("user_annotation", "a part", 0.0, 100.0),
        event("cpu_op", "aten::linear", 0.0, 50.0),
        event("cpu_op", "aten::addmm", 10.0, 30.0),
        event("cpu_op", "aten::view", 50.0, 10.0),
        event("cpu_op", "aten::addmm", 20.0, 60.0, 2),  # another thread
    )
    found = traces.breakdown(trace, "a part")
    assert found.names == pytest.approx({"aten::linear": 0.02, "aten::addmm": 0.09, "aten::view": 0.01})
    assert found.kinds == pytest.approx({traces.OTHERS: 0.03, traces.PRODUCTS: 0.09, traces.GAPS: 0.02})


def test_a_recorded_part_is_read_back(tmp_path: Path) -> None:
    path, square = tmp_path / "t.json.gz", torch.randn(64, 64)
    traces.recorded(path, {"warming up": lambda: square @ square, "three products": lambda: square @ square @ square})
    assert traces.breakdown(path, "three products").calls["aten::mm"] == 2
    assert {"norm_rope_forward", "norm_rope_backward", "cosine_rows"} <= traces.own_kernels()


# --- the replay step -------------------------------------------------------------------------------------------


def test_a_replay_that_leaves_other_numbers_is_seen(tmp_path: Path) -> None:
    desk, recipe = Desk("replay", tmp_path, 100.0, rehearsal=True), job(*SMALL).recipe
    desk.dtype = torch.float32
    way = replay.ways(desk, recipe, replay.Case("replay step", "", ""))["plain"]
    network = replay.predictor(desk, recipe, replay.chosen(desk, recipe)[1], way.ops)
    states, targets = desk.drawn(1, 3, 8, recipe.generator.dim), desk.drawn(1, 3, 8, recipe.teacher.dim)
    cosine_of = partial(replay.mean_cosine, network, way.comparison)
    step = ReplayStep(cosine_of, list(network.parameters()), states, targets)
    assert replay.replayed_difference(step, step, (states, targets)) == 0.0
    assert replay.replayed_difference(step, lambda: None, (states, targets)) > replay.CLOSE
    plain = replay.autograd_step(network, way.comparison, states, -targets)()
    step()
    for mine, other in zip(step.gradients, plain, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_replay_step_is_predicted_from_what_it_computes() -> None:
    work = {each.kind: each.amount for each in replay.work(job().recipe, "cudnn")}
    tokens, dim, target = 7 * 4680, 1536, 5120
    assert PRESETS[job().recipe.foresight.preset].wide_fusion
    # forward and twice that backward, without the gradient of the states
    assert work["gemm"] == 3 * tokens * (3 * 24 * dim**2 + 2 * dim * target) - 6 * tokens * dim**2
    assert work["attention cudnn"] == 3 * 4 * tokens * 4680 * dim


# --- the drawing -----------------------------------------------------------------------------------------------


def phase(section: str, name: str, foresight: bool, ms: float, **more: Any) -> dict[str, Any]:
    row = {"section": section, "case": name, "variant": "plain", "shape": "s", "work": {}, "phase": name}
    return row | {"foresight": foresight, "ms": ms, "predicted_ms": None} | more


def test_the_cycle_is_drawn_by_phase() -> None:
    found = [
        phase("cycle", "scores", False, 10.0, predicted_ms=9.0),
        phase("cycle", "all", False, 10.0, predicted_ms=9.0),
        phase("cycle", "scores", True, 11.0, predicted_ms=9.0, peak_gib=70.1234, predicted_gib=71.0),
        phase("cycle", "encoder", True, 2.0),
        phase("cycle", "all", True, 13.0, predicted_ms=9.0),
        {"section": "cycle", "case": "what foresight adds", "variant": "plain", "shape": "s", "work": {}}
        | {"added_ms": -3.0, "percent": -30.0, "predicted_percent": 0.0},
        phase("assembled", "scores", True, 8.0),
        phase("assembled", "all", True, 8.0),
    ]
    assert draw.stacks(found) == {
        "measured, without foresight": {"scores": 10.0},
        "planned, without foresight": {"scores": 9.0},
        "measured, with foresight": {"scores": 11.0, "encoder": 2.0},
        "planned, with foresight": {"scores": 9.0},
        "of blocks, plain": {"scores": 8.0},
    }
    table = "\n".join(draw.cycle_table(found))
    assert "| scores | 10.0 | 9.0 | 11.0 | 9.0 | 70.12 | 71.00 |" in table
    assert "| encoder |  |  | 2.0 |  |  |  |" in table
    assert "Foresight adds -30.0 % (planned 0.0 %)" in table
    assert "<title>encoder: 2.0 ms</title>" in draw.picture([row for row in found if "ms" in row])
    session: dict[str, Any] = {"began": "now", "rehearsal": True, "gpu": "none", "commit": "c", "versions": {}}
    session["sections"] = {"cycle": {"ended": "done", "seconds": 1, "rows": found}}
    listed = "\n".join(draw.table(session, {}))
    assert "| what foresight adds | plain | s |  |  |  |  |  | ms -3, per cent -30, per cent planned 0 |" in listed
    assert list(draw.cycle_table([])) == [] and draw.stacks([]) == {}
