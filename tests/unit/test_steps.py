"""The steps a run can be split into, and those that `--only` chooses."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirai_dist.config import RecipeError, load
from mirai_dist.config.schema import Recipe
from mirai_dist.config.steps import chosen, steps
from mirai_launch.__main__ import main

SMALL = Path(__file__).parent / "data" / "small.yaml"


def recipe(*overrides: str) -> Recipe:
    return load(SMALL, overrides).recipe


GATED = recipe("stages.distil.gate.clips=4", "stages.few_step.gate.clips=1")


def test_gates_stand_before_their_stages_and_the_report_is_last() -> None:
    assert steps(recipe()) == ["teacher", "ar_teacher", "few_step", "distil", "report"]
    assert steps(GATED) == ["teacher", "ar_teacher", "few_step.gate", "few_step", "distil.gate", "distil", "report"]


def test_without_a_dmd_stage_there_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    stage = "{kind: bidirectional, cycles: 1, batch: {global_size: 1}, optimizer: {lr: 1}}"
    path.write_text(f"extends: {SMALL.parent / 'small_world.yaml'}\nname: one\ncheckpoint: {{every_cycles: 1}}\n"
                    f"stages: {{teacher: {stage}}}\n")
    assert steps(load(path).recipe) == ["teacher"]


def test_only_takes_names_in_the_recipes_order() -> None:
    assert chosen(GATED, []) == steps(GATED)
    assert chosen(GATED, ["report,distil.gate", " teacher "]) == ["teacher", "distil.gate", "report"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("distill", "'distill' is no step of this recipe; did you mean distil? steps: teacher, ar_teacher, "),
        ("distil.gat", "did you mean distil.gate?"),
        ("teacher.gate", "stage teacher has no gate; give it one: stages.teacher.gate.clips=16"),
        ("teacher,", "'' is no step of this recipe; steps: teacher"),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_nearest(name: str, text: str) -> None:
    with pytest.raises(RecipeError, match="^--only: ") as caught:
        chosen(GATED, [name])
    assert text in str(caught.value)


def test_the_launcher_refuses_before_it_starts_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(SMALL), "--run-dir", str(tmp_path / "run"), "--only", "distl"]) == 20
    assert capsys.readouterr().err.startswith("mirai: --only: 'distl' is no step of this recipe; did you mean distil?")
