"""Loading recipes: composition, overrides, references, and one-line errors that name key, file and line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mirai_dist.config import RecipeError, load
from mirai_dist.config.keys import ROOT, Key, child, children, every_leaf, lookup

DATA = Path(__file__).parent / "data"
SMALL = DATA / "small.yaml"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe beside a copy of the small one."""
    for each in DATA.glob("small*.yaml"):
        (tmp_path / each.name).write_text(each.read_text())

    def write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    """The error's text, which is always one line."""
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert caught.value.exit_code == 20
    return message


def test_a_recipe_loads_with_defaults_types_and_order() -> None:
    recipe = load(SMALL).recipe
    assert recipe.video.latent_frames == 12
    assert recipe.video.channels == 16
    assert recipe.dmd.guidance == 2.0 and type(recipe.dmd.guidance) is float
    assert recipe.dmd.critic_optimizer.lr == 4e-7 and type(recipe.dmd.critic_optimizer.lr) is float
    assert recipe.rollout.steps == [1000, 500]
    assert list(recipe.stages) == ["teacher", "ar_teacher", "few_step", "distil"]
    assert recipe.study.arms["no_future"] == ["foresight.offsets=[0]", "foresight.encoder_attention=causal"]
    with pytest.raises(FrozenInstanceError):
        recipe.name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_two_loads_share_no_lists() -> None:
    first, second = load(SMALL).recipe, load(SMALL).recipe
    first.foresight.offsets.append(3)
    assert second.foresight.offsets == [0, 1] == load(SMALL).recipe.foresight.offsets


def test_origins_name_the_line_that_won(write: Callable[..., Path]) -> None:
    path = write("extends: small.yaml\nname: mine\nstages:\n  distil:\n    cycles: 7\n")
    origins = load(path, ["dmd.guidance=1"]).origins
    folder = path.parent
    assert origins["name"] == f"{path}:2"
    assert origins["stages.distil.cycles"] == f"{path}:5"
    assert origins["stages.distil.kind"] == f"{folder / 'small.yaml'}:29"
    assert origins["video.latent_width"] == f"{folder / 'small_world.yaml'}:5"
    assert origins["generator.dim"] == f"{folder / 'small_world.yaml'}:9"
    assert origins["dmd.guidance"] == "command line"
    assert origins["flow.shift"] == "default"
    assert set(origins) == {name for name in origins if lookup(tuple(name.split(".")), "test").is_leaf}


def test_origins_are_relative_to_the_working_directory(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("extends: small.yaml\nname: mine\n")
    monkeypatch.chdir(path.parent)
    assert load("recipe.yaml").origins["name"] == "recipe.yaml:2"


def test_extends_a_list_where_the_later_one_wins(write: Callable[..., Path]) -> None:
    write("seed: 8\nworld: {speed: 0.9}\n", "more.yaml")
    path = write("extends: [small.yaml, more.yaml]\nname: mine\n")
    recipe = load(path).recipe
    assert (recipe.seed, recipe.world.speed, recipe.world.radius, recipe.name) == (8, 0.9, 4.5, "mine")


def test_overrides_reach_sections_lists_and_named_entries() -> None:
    overrides = [
        "stages.distil.cycles=3",
        "study.arms.more=[foresight.weight=1, flow.shift=3]",
        "study.seeds=[4, 5]",
        "world={speed: 2, level: bounce}",
        "parallel.reshard_after_forward=false",
        "stages.teacher.parent=",
    ]
    recipe = load(SMALL, overrides).recipe
    assert recipe.stages["distil"].cycles == 3
    assert list(recipe.study.arms) == ["foresight", "none", "no_future", "more"]
    assert recipe.study.arms["more"] == ["foresight.weight=1", "flow.shift=3"]
    assert recipe.study.seeds == [4, 5]
    assert (recipe.world.speed, recipe.world.radius, recipe.world.level) == (2.0, 4.5, "bounce")
    assert recipe.parallel.reshard_after_forward is False
    assert list(recipe.stages) == ["teacher", "ar_teacher", "few_step", "distil"]


def test_the_last_of_equal_overrides_wins() -> None:
    assert load(SMALL, ["seed=4", "seed=5"]).recipe.seed == 5


def test_a_reference_follows_what_its_target_becomes() -> None:
    recipe = load(SMALL, ["critic.blocks=2", "teacher.dim=192", "teacher.blocks=2"]).recipe
    assert (recipe.generator.dim, recipe.critic.dim, recipe.critic.blocks) == (192, 192, 2)


def test_a_key_below_a_reference_changes_this_section_alone(write: Callable[..., Path]) -> None:
    path = write("extends: small.yaml\ndmd:\n  critic_optimizer: ${stages.distil.optimizer}\n")
    recipe = load(path, ["dmd.critic_optimizer.clip_norm=3"]).recipe
    assert (recipe.dmd.critic_optimizer.lr, recipe.dmd.critic_optimizer.clip_norm) == (2e-6, 3.0)
    assert recipe.stages["distil"].optimizer.clip_norm == 10.0


def test_a_reference_brings_the_targets_defaults() -> None:
    assert load(SMALL, ["dmd.critic_optimizer=${foresight.optimizer}"]).recipe.dmd.critic_optimizer.lr == 2e-6


def test_values_interpolate_and_are_checked_afterwards() -> None:
    assert load(SMALL, ["evaluate.samples=${video.latent_frames}"]).recipe.evaluate.samples == 12
    assert "evaluate.samples expects an integer, got 'small'" in refusal(SMALL, "evaluate.samples=${name}")


def test_written_arms_replace_the_default_one(write: Callable[..., Path]) -> None:
    path = write("extends: small.yaml\n")
    assert "foresight" in load(path).recipe.study.arms
    text = (DATA / "small.yaml").read_text().replace("    foresight: []\n", "")
    assert list(load(write(text)).recipe.study.arms) == ["none", "no_future"]


def test_numbers_and_words_read_as_people_write_them() -> None:
    assert load(SMALL, ["flow.shift=1e1"]).recipe.flow.shift == 10.0
    assert load(SMALL, ["stages.distil.optimizer.lr=.5"]).recipe.stages["distil"].optimizer.lr == 0.5
    for text in ("yes", "on", "1", "'true'"):
        assert "true or false" in refusal(SMALL, f"parallel.reshard_after_forward={text}")
    for text in ("1:30", "0x10", "010", "1_000", "3.0", "true", ".inf", "'3'"):
        assert f"seed expects an integer, got {'true' if text == 'true' else ''}" in refusal(SMALL, f"seed={text}")
    for text in (".nan", ".inf", "1.2.3", "true", "'3'"):
        assert "flow.shift expects a number" in refusal(SMALL, f"flow.shift={text}")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("foresight.wieght=0", ["unknown key foresight.wieght", "did you mean foresight.weight?"]),
        ("lr=1", ["unknown key lr", "stages.<name>.optimizer.lr"]),
        ("zzz=1", ["unknown key zzz", "valid here: name, seed"]),
        ("video.fps.x=1", ["unknown key video.fps.x", "video.fps is an integer"]),
        ("stages.distil.optimiser.lr=1", ["did you mean stages.distil.optimizer?"]),
        ("foresight.preset=papr", ["'papr'", "did you mean paper?", "choices: paper, release"]),
        ("stages.distil.cycles=x", ["stages.distil.cycles expects an integer, got 'x'"]),
        ("name=42", ["name expects text, got 42", "quotes"]),
        ("rollout.steps=[1000, a]", ["rollout.steps expects a list of integers"]),
        ("rollout.steps=1000", ["rollout.steps expects a list of integers, got 1000"]),
        ("video=3", ["video expects a section of keys"]),
        ("dmd.guidance={a: 1}", ["dmd.guidance expects a number, got a section"]),
        ("seed=", ["seed expects an integer, got ''"]),
        ("seed=~", ["seed expects an integer, got nothing"]),
        ("seed", ["'seed' is not of the form"]),
        ("seed=[", ["not valid YAML"]),
        ("extends=small.yaml", ["extends belongs in a recipe file"]),
        ("generator=${generator}", ["generator refers to itself"]),
        ("dmd=${foresight}", ["hold different keys"]),
        ("stages.few_step=${stages.nothing}", ["stages.few_step refers to ${stages.nothing}"]),
        ("flow.shift=${flow.shift}", ["flow.shift", "cannot be resolved"]),
        ("flow.shift=${nothing.there}", ["flow.shift", "cannot be resolved"]),
        ("flow.shift=${", ["flow.shift", "cannot be resolved"]),
        ("study.arms.a b=[]", ["the name 'a b'"]),
        ("study.arms.x=[foresight.wieght=0]", ["study.arms.x", "unknown key foresight.wieght"]),
        ("study.arms.x=[foresight.weight]", ["study.arms.x", "not of the form"]),
        ("study.arms.x=[foresight.weight=-1]", ["study.arms.x", "foresight.weight is -1"]),
    ],
)
def test_a_bad_override_says_what_and_where(override: str, parts: list[str]) -> None:
    message = refusal(SMALL, override)
    assert message.startswith("command line")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("extends: small.yaml\nnmae: x\n", 2, ["unknown key nmae", "did you mean name?"]),
        ("extends: small.yaml\nseed: 1\nseed: 2\n", 3, ["seed is written twice", "recipe.yaml:2"]),
        ("extends: small.yaml\nextends: small.yaml\n", 2, ["extends is written twice"]),
        ("extends: small.yaml\ndmd:\n  guidance: [1]\n", 3, ["dmd.guidance expects a number"]),
        ("extends: small.yaml\ndmd:\n", 2, ["dmd expects a section", "nothing"]),
        ("extends: small.yaml\nseed: !!python/name:os.system x\n", 2, ["YAML tag"]),
        ("extends: small.yaml\nseed: !!int x\n", 2, ["cannot be read as int"]),
        ("extends: nowhere.yaml\n", 1, ["no recipe file", "nowhere.yaml"]),
        ("extends: {a: b}\n", 1, ["extends expects a path"]),
        ("extends: []\n", 1, ["extends expects a path"]),
        ("extends: small.yaml\nname: [\n", 3, ["not valid YAML"]),
        ("extends: small.yaml\n? [a]\n: 1\n", 2, ["is not plain text"]),
        ("- a\n", 1, ["a recipe is a mapping"]),
        ("extends: small.yaml\n--- \nname: x\n", 2, ["not valid YAML"]),
        ("extends: small.yaml\nstages:\n  extra:\n    kind: dmd\n", 3, ["missing key stages.extra.cycles"]),
        ("extends: small.yaml\nstudy:\n  arms:\n    bad: [foresight.wieght=0]\n", 4, ["study.arms.bad", "wieght"]),
        ("extends: small.yaml\nstudy:\n  arms:\n    bad:\n      - foresight.weight: 0\n", 4, ["list of texts"]),
        ("extends: small.yaml\nvideo: {latent_frames: 13}\n", 2, ["video.latent_frames 13", "12 or 15"]),
    ],
)
def test_a_bad_file_says_what_and_at_which_line(
    write: Callable[..., Path], text: str, line: int, parts: list[str]
) -> None:
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    for part in parts:
        assert part in message


def test_a_missing_section_is_named_with_its_help(write: Callable[..., Path]) -> None:
    text = "\n".join(
        line for line in SMALL.read_text().splitlines() if "checkpoint" not in line and "every_" not in line
    )
    assert "missing key checkpoint (" in refusal(write(text))


def test_files_that_cannot_be_read(write: Callable[..., Path]) -> None:
    assert "no recipe file" in refusal(Path("nowhere.yaml"))
    assert "is empty" in refusal(write(""))
    assert "cannot read" in refusal(write("x").parent)
    path = write("")
    path.write_bytes(b"name: \xff\xfe\n")
    assert "cannot read" in refusal(path)


def test_recipes_that_extend_each_other_are_refused(write: Callable[..., Path]) -> None:
    write("extends: recipe.yaml\n", "other.yaml")
    message = refusal(write("extends: other.yaml\n"))
    assert "in a circle" in message and "other.yaml" in message


def test_a_base_that_two_parents_share_is_no_circle(write: Callable[..., Path]) -> None:
    write("extends: small.yaml\nseed: 5\n", "left.yaml")
    write("extends: small.yaml\nname: right\n", "right.yaml")
    recipe = load(write("extends: [left.yaml, right.yaml]\n")).recipe
    assert (recipe.name, recipe.seed) == ("right", 3)  # right.yaml comes later and sets small.yaml's seed again


def test_references_in_a_circle_through_their_insides_end() -> None:
    message = refusal(SMALL, "stages.teacher=${stages.few_step}", "stages.few_step=${stages.teacher}")
    assert "refers to itself" in message
    message = refusal(
        SMALL, "stages.teacher=${stages.few_step}", "stages.few_step.optimizer=${stages.teacher.optimizer}"
    )
    assert "refers to itself" in message


def test_with_overrides_has_its_label_and_leaves_the_original() -> None:
    resolved = load(SMALL)
    arm = resolved.with_overrides(resolved.recipe.study.arms["none"], "study.arms.none")
    assert (arm.recipe.foresight.weight, arm.origins["foresight.weight"]) == (0.0, "study.arms.none")
    assert (resolved.recipe.foresight.weight, resolved.origins["foresight.weight"]) == (0.2, "default")
    with pytest.raises(RecipeError, match=r"^study\.arms\.x: unknown key dmd\.gidance; did you mean dmd\.guidance\?$"):
        resolved.with_overrides(["dmd.gidance=1"], "study.arms.x")


def test_loading_imports_no_torch() -> None:
    code = f"import sys; from mirai_dist.config import load; load({str(SMALL)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def schema_keys(key: Key = ROOT) -> list[tuple[str, ...]]:
    """Every key of the schema, sections too, with `distil` and `none` as the named entries."""
    if key.is_leaf:
        return [key.path]
    if key.is_named:
        entry = child(key, "distil" if key.path == ("stages",) else "none", "test")
        return [key.path, *(path for path in schema_keys(entry) if path != entry.path)]
    below = [path for name in children(key.type) for path in schema_keys(child(key, name, "test"))]
    return [key.path, *below] if key.path else below


@settings(max_examples=300, deadline=None)
@given(
    path=st.sampled_from(schema_keys()),
    position=st.integers(0, 40),
    letter=st.sampled_from("abcdefghijklmnopqrstuvwxyz_"),
    how=st.sampled_from(["replace", "insert", "drop"]),
)
def test_a_key_with_one_wrong_letter_is_refused_by_name(
    path: tuple[str, ...], position: int, letter: str, how: str
) -> None:
    name = path[-1]
    at = position % len(name)
    wrong = name[:at] + {"replace": letter, "insert": letter + name[at], "drop": ""}[how] + name[at + 1 :]
    assume(wrong and wrong not in children(lookup(path[:-1], "test").type))
    dotted = ".".join((*path[:-1], wrong))
    message = refusal(SMALL, f"{dotted}=1")
    assert f"unknown key {dotted};" in message
    assert "did you mean" in message or "valid here" in message


def test_every_written_key_of_a_recipe_is_refused_with_one_wrong_letter(write: Callable[..., Path]) -> None:
    """The same in a file, at every line that writes a schema key: the message has the key and the line."""
    lines = SMALL.read_text().splitlines()
    known = {leaf for path in schema_keys() for leaf in path} - {"distil", "none"}
    tried = 0
    for index, line in enumerate(lines):
        name = line.strip().partition(":")[0]
        if name not in known or _section(lines, index) in ("stages:", "  arms:"):
            continue
        changed = [*lines[:index], line.replace(name, name[:-1] + "q", 1), *lines[index + 1 :]]
        path = write("\n".join(changed))
        message = refusal(path)
        assert message.startswith(f"{path}:{index + 1}: unknown key"), message
        assert f"{name[:-1]}q;" in message
        tried += 1
    assert tried > 25


def _section(lines: list[str], index: int) -> str:
    indent = len(lines[index]) - len(lines[index].lstrip())
    above = (line for line in reversed(lines[:index]) if line.strip() and len(line) - len(line.lstrip()) < indent)
    return next(above, "")


def test_every_leaf_has_help() -> None:
    assert all(leaf.field and leaf.help and "\n" not in leaf.help for leaf in every_leaf())
