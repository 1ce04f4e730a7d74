"""Every recipe key is read by the code: a key that does nothing is a promise that nobody keeps.

A reader is an attribute access `.key` in the sources, apart from the schema itself and from code that treats all
keys alike (rules that only refuse values; the comparison of two recipes).
"""

from __future__ import annotations

import ast
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from mirai_dist.config import schema
from mirai_dist.config.keys import children

ROOT = Path(__file__).parents[2]
NO_READERS = {"mirai_dist/config/schema.py", "mirai_dist/config/digest.py", "launcher/mirai_launch/verbs/check.py"}


def accesses(text: str) -> set[str]:
    """Names read as attributes, outside functions decorated as rules."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef) and any(_is_rule(each) for each in node.decorator_list):
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        waiting.extend(ast.iter_child_nodes(node))
    return found


def _is_rule(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "rule"


def read_names() -> set[str]:
    paths = [*ROOT.glob("mirai_dist/**/*.py"), *ROOT.glob("launcher/mirai_launch/**/*.py")]
    return set().union(*(accesses(path.read_text()) for path in paths if str(path.relative_to(ROOT)) not in NO_READERS))


SECTIONS = [each for each in vars(schema).values() if isinstance(each, type) and is_dataclass(each)]
FIELDS = sorted(f"{section.__name__}.{name}" for section in SECTIONS for name in children(section))


@pytest.fixture(scope="module")
def names() -> set[str]:
    return read_names()


@pytest.mark.parametrize("field", FIELDS)
def test_the_key_is_read(field: str, names: set[str]) -> None:
    name = field.split(".")[1]
    assert name in names, f"no source reads .{name}: remove {field} from the schema, or make it do something"


def test_what_counts_as_reading() -> None:
    text = "@rule('x')\ndef a(r): r.in_rule\ndef b(r):\n    r.read\n    r.written = 1\n    'r.text'"
    assert accesses(text) == {"read"}
