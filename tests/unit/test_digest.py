"""A recipe's identity: stable where it must be, different where anything differs, and round trips through YAML."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mirai_dist.config import load
from mirai_dist.config.digest import conflicts, diff, digest, flatten, to_yaml
from mirai_dist.config.keys import lookup

SMALL = Path(__file__).parent / "data" / "small.yaml"


def test_the_digest_ignores_the_order_of_keys(tmp_path: Path) -> None:
    base = load(SMALL).recipe
    swapped = tmp_path / "swapped.yaml"
    lines = to_yaml(base).splitlines(keepends=True)
    starts = [index for index, line in enumerate(lines) if not line.startswith((" ", "-"))]
    blocks = ["".join(lines[start:end]) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
    swapped.write_text("".join(reversed(blocks)))
    assert swapped.read_text() != to_yaml(base)
    assert digest(load(swapped).recipe) == digest(base)


def test_the_digest_is_the_same_in_another_process() -> None:
    code = f"from mirai_dist.config import load, digest; print(digest.digest(load({str(SMALL)!r}).recipe))"
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest(load(SMALL).recipe)


def test_the_digest_does_not_care_how_a_number_was_written() -> None:
    base = digest(load(SMALL, ["dmd.guidance=2.0"]).recipe)
    assert digest(load(SMALL, ["dmd.guidance=2"]).recipe) == base == digest(load(SMALL, ["dmd.guidance=2e0"]).recipe)
    recipe = load(SMALL).recipe
    assert digest(replace(recipe, dmd=replace(recipe.dmd, guidance=2))) == base


def test_the_order_of_stages_counts_and_that_of_arms_does_not() -> None:
    recipe = load(SMALL).recipe
    reordered = replace(recipe, stages=dict(reversed(recipe.stages.items())))
    assert digest(reordered) != digest(recipe)
    assert diff(recipe, reordered) == [
        "stages: order teacher, ar_teacher, few_step, distil -> distil, few_step, ar_teacher, teacher"
    ]
    arms = dict(reversed(recipe.study.arms.items()))
    assert digest(replace(recipe, study=replace(recipe.study, arms=arms))) == digest(recipe)


def different(value: object) -> object:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    assert isinstance(value, list)
    return [*value, *(value[:1] or ["x"])]


def changed(node: object, path: list[str]) -> object:
    """A copy of the recipe with one leaf changed."""
    name, *rest = path
    if isinstance(node, dict):
        return {**node, name: changed(node[name], rest) if rest else different(node[name])}
    value = getattr(node, name)
    return replace(node, **{name: changed(value, rest) if rest else different(value)})  # pyright: ignore


def test_every_leaf_counts_and_diff_names_exactly_it() -> None:
    recipe = load(SMALL).recipe
    leaves = flatten(recipe)
    assert len(leaves) > 90
    for key in leaves:
        assert lookup(tuple(key.split(".")), "test").is_leaf
        other = changed(recipe, key.split("."))
        assert digest(other) != digest(recipe), key  # pyright: ignore[reportArgumentType]
        lines = diff(recipe, other)  # pyright: ignore[reportArgumentType]
        assert len(lines) == 1 and lines[0].startswith(f"{key}: ")


def test_yaml_round_trip(tmp_path: Path) -> None:
    odd = ["name=on", "study.arms.no=['dmd.guidance=1e-4']"]
    recipe = load(SMALL, [*odd, "stages.distil.optimizer.lr=1e-30"]).recipe
    path = tmp_path / "stored.yaml"
    path.write_text(to_yaml(recipe))
    assert load(path).recipe == recipe
    assert digest(load(path).recipe) == digest(recipe)
    assert load(path).recipe.name == "on"


def test_diff_shows_both_values_and_absent_entries() -> None:
    old = load(SMALL).recipe
    new = load(SMALL, ["foresight.weight=0", "study.arms.x=[dmd.guidance=1]", "rollout.steps=[900]"]).recipe
    assert diff(old, new) == [
        "rollout.steps: [1000, 500] -> [900]",
        "foresight.weight: 0.2 -> 0.0",
        "study.arms.x: (absent) -> [dmd.guidance=1]",
    ]
    assert diff(old, old) == []


@pytest.mark.parametrize(
    "override",
    [
        "stages.distil.cycles=60",
        "study.arms.x=[dmd.guidance=1]",
        "study.seeds=[1, 2, 3]",
        "stages.distil.gate={clips: 4, motion: [0, 9]}",
        "evaluate.samples=8",
        "checkpoint.keep=9",
        "parallel.recompute=none",
        "name=renamed",
    ],
)
def test_what_only_extends_a_run(override: str) -> None:
    old, new = load(SMALL).recipe, load(SMALL, [override]).recipe
    assert diff(old, new) and conflicts(old, new) == []


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["stages.distil.cycles=5"], ["stages.distil.cycles"]),  # shorter
        (["stages.teacher.cycles=60"], ["stages.teacher.cycles"]),  # others have started from it
        (["study.seeds=[1]"], ["study.seeds"]),
        (["study.arms.none=[foresight.weight=0.1]"], ["study.arms.none"]),
        (["parallel.compute_dtype=float32"], ["parallel.compute_dtype"]),
        (["seed=9", "checkpoint.keep=4"], ["seed"]),
        (["foresight.weight=0.1"], ["foresight.weight"]),
    ],
)
def test_what_makes_it_another_run(overrides: list[str], keys: list[str]) -> None:
    lines = conflicts(load(SMALL).recipe, load(SMALL, overrides).recipe)
    assert [line.split(":")[0] for line in lines] == keys


def test_more_cycles_under_a_schedule_that_spans_them_is_another_run() -> None:
    cosine = ["dmd.critic_optimizer.schedule=cosine"]
    lines = conflicts(load(SMALL, cosine).recipe, load(SMALL, [*cosine, "stages.distil.cycles=60"]).recipe)
    assert lines == ["stages.distil.cycles: 6 -> 60"]
