"""Identity of a recipe: its digest, its text, and what differs between two of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from mirai_dist.config import keys
from mirai_dist.config.schema import Recipe, Stage
from mirai_dist.config.source import dump


def digest(recipe: Recipe) -> str:
    """sha256 over every value, independent of the order keys were written in, of the process and of YAML.

    The order of the stages counts: they run in it.
    """
    data = _canonical(keys.ROOT, recipe)
    data["stages"] = list(data["stages"].items())
    text = json.dumps(data, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; loading it gives an equal recipe."""
    return str(dump(asdict(recipe)))


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted leaf key -> value, in the order of the schema."""
    leaves: dict[str, Any] = {}

    def walk(key: keys.Key, value: Any) -> None:
        if key.is_leaf:
            leaves[key.dotted] = value
            return
        below = value if key.is_named else {name: getattr(value, name) for name in keys.children(key.type)}
        for name, each in below.items():
            walk(keys.child(key, name, "recipe"), each)

    walk(keys.ROOT, recipe)
    return leaves


def diff(a: Recipe, b: Recipe) -> list[str]:
    """One line a leaf that differs: `foresight.weight: 0.2 -> 0.0`."""
    old, new = flatten(a), flatten(b)
    lines = [
        f"{key}: {_show(old, key)} -> {_show(new, key)}"
        for key in [*old, *(key for key in new if key not in old)]
        if (key in old) != (key in new) or old[key] != new[key]
    ]
    if list(a.stages) != list(b.stages) and sorted(a.stages) == sorted(b.stages):
        lines.append(f"stages: order {', '.join(a.stages)} -> {', '.join(b.stages)}")
    return lines


def conflicts(old: Recipe, new: Recipe) -> list[str]:
    """The lines of `diff` that keep a run of `old` from going on as `new`; empty: `new` only extends it.

    A run may be extended by more cycles of a last stage (where no schedule stretches over them), more arms and
    seeds, other gates, checkpoint, alarm and report settings, another layout of the same arithmetic, another name.
    """
    return [line for line in diff(old, new) if not _extends(line.partition(":")[0], old, new)]


_FREE = ("alarms.", "checkpoint.", "evaluate.", "parallel.")


def _extends(key: str, old: Recipe, new: Recipe) -> bool:
    if key == "parallel.compute_dtype":
        return False
    if key == "study.seeds":
        return set(old.study.seeds) <= set(new.study.seeds)
    if key.startswith("study.arms."):
        return key.removeprefix("study.arms.") not in old.study.arms
    if key.startswith("stages.") and key.split(".")[2:3] == ["gate"]:
        return True
    if key.startswith("stages.") and key.endswith(".cycles"):
        name = key.split(".")[1]
        return name in old.stages and name in new.stages and _lengthens(name, old, new)
    return key == "name" or key.startswith(_FREE)


def _lengthens(name: str, old: Recipe, new: Recipe) -> bool:
    stage = new.stages[name]
    used = any(name in (each.parent, each.teacher, each.critic) for each in new.stages.values())
    schedules = {each.schedule for each in _schedules(stage, new)}
    return not used and stage.cycles > old.stages[name].cycles and schedules == {"constant"}


def _schedules(stage: Stage, recipe: Recipe) -> list[Any]:
    extra = [recipe.dmd.critic_optimizer, recipe.foresight.optimizer] if stage.kind == "dmd" else []
    return [stage.optimizer, *extra, *([stage.foresight.optimizer] if stage.foresight.weight else [])]


def _canonical(key: keys.Key, value: Any) -> Any:
    if key.is_leaf:
        # Zero has one spelling, and a whole number in a float key is a float.
        return float(value) + 0.0 if key.type is float else value
    below = value if key.is_named else {name: getattr(value, name) for name in keys.children(key.type)}
    return {name: _canonical(keys.child(key, name, "recipe"), each) for name, each in below.items()}


def _show(leaves: dict[str, Any], key: str) -> str:
    return str(dump(leaves[key], flow=True)) if key in leaves else "(absent)"
