"""Every key of a recipe spoilt in turn, and whole files spoilt: one line, exit code 20, never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_origin

import pytest
import yaml

from mirai_dist.config import load
from mirai_dist.config.digest import to_yaml
from mirai_dist.config.keys import Key, child, lookup
from mirai_launch.__main__ import main

SMALL = Path(__file__).parent / "data" / "small.yaml"
WHOLE: dict[str, Any] = yaml.safe_load(to_yaml(load(SMALL).recipe))


def paths(node: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of the whole recipe, sections included, as a path."""
    if not isinstance(node, dict):
        return []
    found = []
    for name, below in node.items():
        found += [(*above, name), *paths(below, (*above, name))]
    return found


def wrong_value(key: Key) -> Any:
    """A value that the key's type cannot take."""
    if not key.is_leaf or get_origin(key.type) is list:
        return 7
    return ["a", "list"] if key.type is str else "nonsense"


def spoilt(path: tuple[str, ...], change: str) -> str:
    """The recipe as YAML with one key misspelt, of a wrong type, or empty."""
    recipe = yaml.safe_load(yaml.safe_dump(WHOLE))
    section = recipe
    for name in path[:-1]:
        section = section[name]
    name = path[-1]
    if change == "misspelt":
        section[f"{name}_x!"] = section.pop(name)
    else:
        section[name] = None if change == "empty" else wrong_value(lookup(path, "test"))
    return yaml.safe_dump(recipe, sort_keys=False)


CASES = [(path, change) for path in paths(WHOLE) for change in ("misspelt", "wrong", "empty")]

FILES = {
    "empty": b"",
    "only a comment": b"# nothing\n",
    "a list": b"- name: x\n",
    "a text": b"just words\n",
    "a tab": b"name: x\n\tseed: 1\n",
    "an open bracket": b"name: [x\n",
    "an open quote": b"name: 'x\n",
    "a key twice": b"name: x\nname: y\n",
    "not UTF-8": b"name: \xff\xfe\x80\n",
    "NUL": b"name: x\x00\n",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "extends nothing": b"extends: no_such_file.yaml\nname: x\n",
    "extends itself": b"extends: recipe.yaml\nname: x\n",
    "extends a number": b"extends: 3\nname: x\n",
    "a python object": b"name: !!python/object/apply:os.system [true]\n",
    "an unknown anchor": b"name: *nowhere\n",
    "an open interpolation": b"name: ${seed\n",
    "an unknown interpolation": b"name: ${nowhere.at.all}\n",
    "an interpolation of itself": b"name: ${name}\n",
    "two documents": b"name: x\n---\nname: y\n",
    "a number as a key": b"3: x\n",
    "a section as a key": b"? {a: b}\n: x\n",
}

OVERRIDES = ["", "=", "=3", "name", "video", "video=", "video.latent_frames", "video.latent_frames=[", "a.b.c=1",
             "stages.distil=3", "stages..cycles=1", ".name=x", "name.=x", "stages.di/stil.cycles=1", "seed=1e400",
             "seed=0x", "rollout.steps=1000", "rollout.steps=[a]", "study.arms.x=1", "foresight.weight=nan",
             "foresight.weight=inf", "text.encoder=umt6", "vae.kind=", "weights.x=1", "weights.x.kind=lora",
             "weights.x={kind: ode}", "stages.distil.teacher=${nowhere}", "extends=other.yaml"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused recipe is answered with."""
    code = main(["check", *arguments])
    said = capsys.readouterr()
    assert code == 20, f"exit code {code}: {said.out[:300]}"
    assert said.err.startswith("mirai: ") and len(said.err.splitlines()) == 1, said.err
    assert "Traceback" not in said.err
    return said.err


def test_there_are_many() -> None:
    assert len(CASES) + len(FILES) + len(OVERRIDES) > 300


@pytest.mark.parametrize(
    ("path", "change"), CASES, ids=lambda value: value if isinstance(value, str) else ".".join(value)
)
def test_a_spoilt_key(path: tuple[str, ...], change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(spoilt(path, change))
    line = refused([str(file)], capsys)
    assert path[-1] in line or str(file) in line


@pytest.mark.parametrize("name", FILES)
def test_a_spoilt_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(FILES[name])
    assert str(file) in refused([str(file)], capsys)


@pytest.mark.parametrize("where", ["missing", "a directory"])
def test_no_file(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused([str(tmp_path if where == "a directory" else tmp_path / "no.yaml")], capsys)


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_spoilt_override(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused([str(SMALL), override], capsys)


def test_the_recipe_itself_is_fine() -> None:
    """Else every case above would be refused for the same reason."""
    assert main(["check", str(SMALL)]) == 0
    assert child(lookup(("video",), "test"), "fps", "test").is_leaf
