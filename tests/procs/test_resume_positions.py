"""A stage resumed at any position computes, to the last bit, what the uninterrupted one does.

The straight runs are trained once, on two ranks, with a checkpoint before every position that is resumed at. In
float64, so that another world size can be compared sharply too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mirai_dist.config import schema
from mirai_dist.cycle.saver import Saver
from mirai_dist.cycle.stages import Stage
from tests.procs import tiny
from tests.procs.conftest import run_threads
from tests.procs.tiny import TIMEOUT

RANKS = 2
# Half the tensors to write and read, with all the kinds there are.
ONE_BLOCK = ("teacher.blocks=1", "generator.blocks=1", "foresight.depth=1")
# An average that does not exist yet at the first checkpoint, schedules that depend on the update count.
EMA_LATER = [f"stages.{name}.ema.start_update=2" for name in ("teacher", "ar_teacher")]
SCHEDULES = [f"{optimizer}.schedule=cosine" for optimizer in
             ("stages.teacher.optimizer", "stages.distil.optimizer", "dmd.critic_optimizer", "foresight.optimizer")]
STAGES = {"teacher": [1, 3], "ar_teacher": [1], "few_step": [2], "distil": [6, 7, 8, 9, 10, 11]}  # positions of saves
LENGTH = {"teacher": 5, "ar_teacher": 3, "few_step": 4, "distil": 13}  # the dmd run ends with a third generator update


class Straight(NamedTuple):
    """An uninterrupted run as one rank saw it: metrics of every position, and every number at the end."""

    metrics: list[dict[str, float]]
    end: dict[str, Any]


def the_recipe() -> schema.Recipe:
    return tiny.in_dtype(tiny.recipe("dmd.critic_updates=5", *ONE_BLOCK, *EMA_LATER, *SCHEDULES), "float64")


def saver(folder: Path, stage: Stage, position: int) -> Saver:
    place = folder / stage.name / str(position)
    return Saver(place, stage.recipe.checkpoint, "recipe", stage.run.rank, tiny.console(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def straight(folder: Path) -> list[dict[str, Straight]]:
    recipe = the_recipe()

    def body(rank: int) -> dict[str, Straight]:
        found = {}
        for name, saves in STAGES.items():
            stage = tiny.stage_of(recipe, name)
            metrics = []
            for position in range(LENGTH[name]):
                if position in saves:
                    saver(folder, stage, position).save(stage)
                metrics += tiny.train(stage, 1)
            found[name] = Straight(metrics, tiny.everything(stage))
        return found

    with tiny.lively("float64"):
        return run_threads(RANKS, body, timeout=TIMEOUT)


def resumed(folder: Path, recipe: schema.Recipe, name: str, position: int) -> tuple[Stage, list[dict[str, float]]]:
    """A stage resumed before a position and trained to the end, with the metrics of what it trained."""
    stage = tiny.stage_of(recipe, name)
    assert saver(folder, stage, position).resume(stage)
    assert (stage.cycle, stage.position) == divmod(position, len(stage.positions))
    return stage, tiny.train(stage, LENGTH[name] - position)


@pytest.mark.parametrize("name", STAGES)
def test_resume_at_every_position_is_bit_exact(threads, folder: Path, straight, name: str) -> None:
    recipe = the_recipe()

    def body(rank: int) -> None:
        expected = straight[rank][name]
        for position in STAGES[name]:
            stage, metrics = resumed(folder, recipe, name, position)
            for offset, (found, wanted) in enumerate(zip(metrics, expected.metrics[position:], strict=True)):
                assert found == wanted, f"resumed before {position}: position {position + offset} differs"
            different = tiny.unequal(tiny.everything(stage), expected.end)
            assert not different, f"resumed before {position}: {different[:5]}"

    with tiny.lively("float64"):
        threads(RANKS, timeout=TIMEOUT)(body)


def test_the_straight_runs_hold_what_a_checkpoint_could_lose(straight, folder: Path) -> None:
    """Otherwise equality above would show nothing."""
    end = straight[0]["distil"].end
    for part in ("generator.head.head.weight.exp_avg_sq", "critic.head.head.weight.exp_avg_sq", "replay_states.0",
                 "replay_targets.0", "average.generator.head.head.weight", "predictor.projection.weight.exp_avg_sq"):
        assert part in end, part
    states = [json.loads(path.read_text()) for path in sorted(folder.glob("teacher/*/cycle-*/state.json"))]
    assert [sorted(state["averages"]) for state in states] == [[], ["teacher"]]


def test_an_arm_without_foresight_resumes_too(threads, tmp_path: Path) -> None:
    """Its replay cache is empty, so the checkpoint holds no sample at all."""
    recipe = tiny.in_dtype(tiny.recipe("foresight.weight=0", *ONE_BLOCK), "float64")

    def body(rank: int) -> None:
        stage, again = tiny.stage_of(recipe, "distil"), tiny.stage_of(recipe, "distil")
        tiny.train(stage, 1)
        saver(tmp_path, stage, 1).save(stage)
        assert saver(tmp_path, again, 1).resume(again)
        assert tiny.train(again, 2) == tiny.train(stage, 2)
        assert not tiny.unequal(tiny.everything(again), tiny.everything(stage))

    with tiny.lively("float64"):
        threads(RANKS, timeout=TIMEOUT)(body)


@pytest.mark.parametrize("ranks", [1, 4])
def test_resume_on_another_world_size(threads, folder: Path, straight, ranks: int) -> None:
    """In the middle of a cycle, so that the replay pairs move to other ranks as well."""
    recipe, position = the_recipe(), STAGES["distil"][3]

    def body(rank: int) -> list[str]:
        stage, metrics = resumed(folder, recipe, "distil", position)
        different = [name for found, wanted in zip(metrics, straight[0]["distil"].metrics[position:], strict=True)
                     for name in tiny.unequal(found, wanted, 1e-9)]
        expected = {name: value for each in straight for name, value in each["distil"].end.items()}
        found = tiny.everything(stage)
        return different + tiny.unequal_run(found, {name: expected[name] for name in found})

    with tiny.lively("float64"):
        for different in threads(ranks, timeout=TIMEOUT)(body):
            assert not different, different[:5]
