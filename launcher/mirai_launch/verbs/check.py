"""`mirai check`: what a recipe says, where each value comes from, and who reads it."""

from __future__ import annotations

import argparse
import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path

from mirai_dist.config import RecipeError, Resolved, keys, load
from mirai_dist.config.digest import digest, flatten
from mirai_dist.config.rules import check_layout
from mirai_dist.config.source import dump
from mirai_launch import console

PACKAGES = ("mirai_dist", "mirai_launch")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="recipe file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="override: foresight.weight=0")
    parser.add_argument("--explain", metavar="KEY", help="say everything about one key, such as foresight.weight")
    parser.add_argument("--ranks", metavar="N", type=int, help="check that N ranks can share the batches")


def run(arguments: argparse.Namespace) -> int:
    """Print the resolved recipe, or one key, or the batch split. Raises RecipeError."""
    resolved = load(arguments.recipe, arguments.overrides)
    if arguments.explain:
        for label, text in explain(resolved, arguments.explain):
            console.say(f"{label:<8}  {text}")
        return 0
    if arguments.ranks is not None:
        for variant in resolved.variants():
            check_layout(variant.recipe, arguments.ranks)
        for stage, count in check_layout(resolved.recipe, arguments.ranks).items():
            batch = resolved.recipe.stages[stage].batch
            split = f"{batch.global_size} = {arguments.ranks} ranks x {batch.micro_size} x {count} accumulated"
            console.say(f"{stage}: batch {split}")
        return 0
    console.two_columns([*lines(resolved), (f"# digest {digest(resolved.recipe)}", "")])
    return 0


def lines(resolved: Resolved) -> list[tuple[str, str]]:
    """YAML-like lines of the whole recipe, each leaf with its origin."""
    rows: list[tuple[str, str]] = []
    opened: tuple[str, ...] = ()
    for key, value in flatten(resolved.recipe).items():
        *above, name = key.split(".")
        for depth, section in enumerate(above):
            if opened[: depth + 1] != tuple(above[: depth + 1]):
                rows.append((f"{'  ' * depth}{section}:", ""))
        opened = tuple(above)
        rows.append((f"{'  ' * len(above)}{name}: {dump(value, flow=True)}", resolved.origins[key]))
    return rows


def explain(resolved: Resolved, dotted: str) -> list[tuple[str, str]]:
    """Labelled facts about one key. RecipeError, with the nearest key, where there is none."""
    key = keys.lookup(tuple(dotted.split(".")), "--explain")
    if not key.is_leaf:
        below = [leaf for leaf in resolved.origins if leaf.startswith(f"{dotted}.")]
        what = f"{dotted} is {key.describe()}; name one key, such as {next(iter(below), dotted)}"
        raise RecipeError("--explain", what)
    leaves = flatten(resolved.recipe)
    if dotted not in leaves:
        raise RecipeError("--explain", f"the recipe has no {dotted}; it has {', '.join(_same_name(leaves, key))}")
    facts = [
        ("key", dotted),
        ("help", key.help or "overrides of this arm"),
        ("value", dump(leaves[dotted], flow=True)),
        ("origin", resolved.origins[dotted]),
        ("type", key.describe()),
        ("default", _default(key)),
    ]
    if key.choices:
        facts.append(("choices", ", ".join(key.choices)))
    facts.append(("read by", ", ".join(readers(key)) or "nothing"))
    return facts


def readers(key: keys.Key) -> list[str]:
    """Source files that read a key: those that write `section.key`, else those that write `.key` at all."""
    field = key.path[-1] if key.field else key.path[-2]
    section = key.path[-2] if key.field and len(key.path) > 1 else ""
    precise, loose = [], []
    for name, path in sources():
        chains = {tuple(chain) for chain in _chains(path)}
        if any(chain[-2:] == (section, field) for chain in chains):
            precise.append(name)
        elif any(chain[-1] == field for chain in chains):
            loose.append(name)
    return precise or loose


def sources() -> Iterator[tuple[str, Path]]:
    """Every installed source file (as package/path.py, path), without the schema, which defines and reads nothing."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations if spec else None) or []:
            for path in sorted(Path(root).rglob("*.py")):
                name = f"{package}/{path.relative_to(root)}"
                if name != "mirai_dist/config/schema.py":
                    yield name, path


def _chains(path: Path) -> Iterator[list[str]]:
    """Each attribute access as the names it ends in: `recipe.dmd.guidance` -> [recipe, dmd, guidance]."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            chain = [node.attr]
            inner = node.value
            while isinstance(inner, ast.Attribute):
                chain.insert(0, inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                chain.insert(0, inner.id)
            yield chain


def _default(key: keys.Key) -> str:
    if key.field is None:
        return "none: written by the recipe"
    if key.field.default is not MISSING:
        return dump(key.field.default, flow=True)
    if key.field.default_factory is not MISSING:
        return dump(key.field.default_factory(), flow=True)
    return "none: the recipe must set it"


def _same_name(leaves: dict[str, object], key: keys.Key) -> list[str]:
    return [leaf for leaf in leaves if leaf.split(".")[-1] == key.path[-1]] or ["no key of that name"]
