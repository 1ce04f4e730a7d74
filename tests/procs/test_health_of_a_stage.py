"""Measures and alarms of a dmd stage as it really takes them: over ranks, over a resume, and where there is nothing."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mirai_dist.config.jobs import Job
from mirai_dist.cycle import account, phases
from mirai_dist.cycle.cycle import Alarmed, Stopped
from mirai_dist.evaluate.report import AlarmChange, RunAlarms
from mirai_dist.method import health
from mirai_dist.observe.sinks import Sinks
from mirai_dist.runtime.signals import StopRequest
from tests.procs import tiny
from tests.procs.conftest import run_threads
from tests.procs.tiny import TIMEOUT

ONE_BLOCK = ("teacher.blocks=1", "generator.blocks=1", "foresight.depth=1")
TWO_FRAMES = (*ONE_BLOCK, "video.latent_frames=6", "video.frames_per_segment=2")  # then there are boundaries to jump at
GATED = "foresight.preset=release"


def generator_update(ranks: int, *overrides: str) -> tuple[list[health.Scores], dict[str, float]]:
    """What the scores of a first generator update were, over all ranks, and the metrics that came of them."""
    recipe, found = tiny.in_dtype(tiny.recipe(*TWO_FRAMES, *overrides), "float64"), []
    compare = phases.score_difference

    def kept(*arguments: Any) -> health.Scores:
        found.append(compare(*arguments))
        return found[-1]

    def body(rank: int) -> dict[str, float]:
        stage = tiny.stage_of(recipe, "distil")
        return tiny.train(stage, 1)[0]

    with tiny.lively("float64"), mock.patch.object(phases, "score_difference", kept):
        metrics = run_threads(ranks, body, TIMEOUT)
    assert all(each == metrics[0] for each in metrics)
    return found, metrics[0]


def test_ranks_and_micro_batches_measure_what_the_whole_batch_would() -> None:
    """Parts are averaged first and divided afterwards: means of quotients would be something else."""
    found, metrics = generator_update(2)
    assert len(found) == 4
    whole = health.Scores(*(torch.cat(each) for each in zip(*found, strict=True)))
    expected = health.combined({name: float(part) for name, part in health.measures(whole, 2).items()})
    del expected["critic_error/to_gaussian"]  # its Gaussian is each micro-batch's own
    assert {"motion/relative", "boundary_jump", "score/guided_std", "drift/mean"} < expected.keys()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert not [name for name in metrics if "#" in name]
    assert "gate/ffn" not in metrics  # the paper's predictor has none


def test_gates_are_those_of_all_ranks() -> None:
    """Of the six rows of a modulation each of four ranks holds two, one none, and two of them a gate."""
    alone, together = (generator_update(ranks, GATED)[1] for ranks in (1, 4))
    for name in health.GATES:
        assert alone[name] > 0 and together[name] == pytest.approx(alone[name], rel=1e-6)


def test_no_reduction_is_added() -> None:
    """All measures of a position travel with its losses."""
    recipe = tiny.recipe()

    def body(rank: int) -> int:
        stage = tiny.stage_of(recipe, "distil")
        stage.step()
        with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as reduce:
            stage.observe()
        return reduce.call_count

    with tiny.lively():
        assert run_threads(1, body, TIMEOUT) == [1]


def test_only_what_is_trained_is_measured() -> None:
    late = tiny.recipe("foresight.start_cycle=1", GATED)
    baseline = tiny.recipe("foresight.weight=0", "alarms.warmup_cycles=1", "alarms.window_cycles=1",
                           *ONE_BLOCK)

    def body(rank: int) -> None:
        stage = tiny.stage_of(late, "distil")
        positions = tiny.train(stage, 6)
        trained = [{name.partition("/")[2] for name in values if name.startswith("moved/")} for values in positions]
        assert trained == [{"generator"}, {"critic"}, {"critic"}, {"generator", "predictor"},
                           {"critic"}, {"critic", "predictor"}]  # the release replays from the second critic update on
        assert ["gate/ffn" in values for values in positions] == [False, False, False, True, False, False]
        stage = tiny.stage_of(baseline, "distil")
        positions = tiny.train(stage, 6)
        assert not [name for values in positions for name in values if "predictor" in name or name.startswith("gate/")]
        seen = stage.alarms.state()["alarms"]["predictor_frozen"]
        assert "predictor_frozen" not in stage.alarms.raised and not seen["start"]

    with tiny.lively():
        run_threads(1, body, TIMEOUT)


# --- alarms in the loop ----------------------------------------------------------------------------------------

# Every clip of such networks stands stiller than a thousand times the teacher's estimate: one alarm, in cycle 1.
ALARMED = (*ONE_BLOCK, "alarms.warmup_cycles=1", "alarms.window_cycles=1", "alarms.motion=1000",
           *(f"alarms.{other}=0" for other in
             ("saturation", "mean_drift", "critic_lag", "moved", "score_scale", "timesteps")), "stages.distil.cycles=3")
POSITIONS = 3


def run(folder: Path, *overrides: str, stop_before: int = 0) -> Any:
    """The dmd stage from where it stands in `folder`; a stop is asked for before this position of this start."""
    recipe = tiny.recipe(*ALARMED, *overrides)

    def body(rank: int) -> Any:
        stage = tiny.stage_of(recipe, "distil", run_dir=folder)
        with closing(Sinks.of_stage(rank, folder)) as sinks:
            stop = StopRequest()
            looped = tiny.loop_of(stage, folder, sinks, stop)
            looped.saver.resume(stage)
            if stop_before:
                step = stage.step
                taken = iter(range(1, 1000))
                stage.step = lambda: (step(), next(taken) == stop_before and stop.ask("a test"))
            looped.run(stage, "distil")
        return stage.alarms.state()

    with tiny.lively():
        return run_threads(1, body, TIMEOUT)[0]


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time", "seconds"))} for line in lines]


def said(folder: Path) -> list[str]:
    return [line for line in (folder / "logs" / "rank-0.log").read_text().splitlines() if "alarm motion" in line]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(folder)


def test_an_alarm_is_told_once_and_written_beside_the_metrics(straight: tuple[Path, Any]) -> None:
    folder, state = straight
    assert state["alarms"]["motion_collapse"]["raised"]
    found = records(folder)
    (told,) = [record for record in found if "alarm" in record]
    assert found.index(told) == 2 * POSITIONS and (told["cycle"], told["position"]) == (1, POSITIONS - 1)
    assert told["alarm"] == "motion_collapse" and told["alarm/motion_collapse"] == 1.0
    (line,) = said(folder)
    assert "warning: alarm motion_collapse at cycle 1: motion/relative is " in line and told["sentence"] in line
    job = Job("distil", "distil foresight", folder, tiny.recipe(*ALARMED), tiny.SEED, "foresight")
    assert account.alarms([job]) == [
        RunAlarms("distil foresight", [AlarmChange(1, True, told["sentence"])], "")]
    curves = {chart.title: chart for group in account.curves([job]) for chart in group.charts}
    assert [line.name for line in curves["fraction of weights moved, foresight"].series] == [
        "generator", "critic", "predictor"]
    buckets = curves["mean |DMD gradient| by timestep, foresight"].series
    assert len(buckets) > 2 and {line.name for line in buckets} <= set(health.bucket_names())


# before the position that ends the cycle it rises in, and after it
@pytest.mark.parametrize("position", [2 * POSITIONS - 1, 2 * POSITIONS])
def test_a_resumed_run_says_what_the_uninterrupted_one_does(straight: tuple[Path, Any], tmp_path: Path,
                                                            position: int) -> None:
    folder, state = straight
    with pytest.raises(Stopped):
        run(tmp_path, stop_before=position)
    assert run(tmp_path) == state
    assert records(tmp_path) == records(folder) and len(said(tmp_path)) == 1


def test_a_run_that_is_to_stop_saves_says_why_and_goes_on_when_told_again(straight: tuple[Path, Any],
                                                                         tmp_path: Path) -> None:
    folder, state = straight
    with pytest.raises(Alarmed, match=r"distil: alarm motion_collapse at cycle 1: .*; saved before cycle 2") as caught:
        run(tmp_path, "alarms.on_alarm=stop")
    assert caught.value.exit_code == 20 and "\n" not in str(caught.value)
    assert run(tmp_path, "alarms.on_alarm=stop") == state
    assert records(tmp_path) == records(folder)
