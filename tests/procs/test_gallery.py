"""Sample grids during a dmd stage: written when due, in fixed noise, and without a trace in what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mirai_dist.cycle.gallery import SHOWN, Gallery
from mirai_dist.evaluate import video_files
from mirai_dist.observe.sinks import Sinks
from tests.procs import tiny
from tests.procs.conftest import run_threads

POSITIONS = 3  # of a cycle
CYCLES = 4


def trained(folder: Path, every: int, ranks: int) -> list[dict[str, Any]]:
    """All numbers of each rank after some cycles with grids in between."""
    recipe = tiny.recipe(f"evaluate.grid_every={every}", "evaluate.samples=6")

    def body(rank: int) -> dict[str, Any]:
        stage = tiny.stage_of(recipe, "distil")
        gallery = Gallery(folder, Sinks.of_stage(rank, folder))
        for _ in range(CYCLES):
            tiny.train(stage, POSITIONS)
            gallery.cycle_ended(stage)
        return tiny.everything(stage)

    with tiny.lively():
        return run_threads(ranks, body, tiny.TIMEOUT)


@pytest.mark.parametrize("ranks", [1, 2])
def test_grids_are_written_when_due_and_change_nothing(tmp_path: Path, ranks: int) -> None:
    with_grids, without = trained(tmp_path / "some", 2, ranks), trained(tmp_path / "none", 0, ranks)
    for one, other in zip(with_grids, without, strict=True):
        assert tiny.unequal(one, other) == []
    assert not (tmp_path / "none" / "samples").exists()
    found = sorted(path.name for path in (tmp_path / "some" / "samples").iterdir())
    assert found == ["cycle-000002-judged.mp4", "cycle-000004-judged.mp4"]
    frames, fps = video_files.read_mp4(tmp_path / "some" / "samples" / found[0])
    height, width = 16, 32  # pixels of a video of the recipe
    scale = frames.shape[1] / (3 * (height + 2) + 2)
    assert fps == 16 and frames.shape[2] == scale * (SHOWN * (width + 2) + 2)  # three rows of six


def test_the_rows_are_generator_teacher_and_critic() -> None:
    """With the critic in the teacher's place and no guidance, those two rows are the same, and not the first."""
    from mirai_dist.cycle.studio import Studio

    def body(rank: int) -> tuple[bool, bool]:
        stage = tiny.stage_of(tiny.recipe("dmd.guidance=0", "evaluate.samples=6"), "distil")
        rows = Studio(stage.run, SHOWN).judged_samples(stage.generator, stage.critic, stage.critic)
        assert list(rows) == ["generator", "teacher x0", "critic x0"]
        same = bool((rows["teacher x0"] == rows["critic x0"]).all())
        return same, bool((rows["generator"] == rows["critic x0"]).all())

    with tiny.lively():
        assert run_threads(1, body, tiny.TIMEOUT) == [(True, False)]
